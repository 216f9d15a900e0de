"""The lab: experiments that show whether each algorithm does what its paper says.

    python -m lowrank_comm.lab list
    python -m lowrank_comm.lab run speedup --preset small

An experiment (`experiment`) is a list of independent cases, with a page and figures
computed from their results. A preset (`presets/*.yaml`) is an experiment's name with
its settings: `small` presets run on a laptop in minutes, `paper` presets have the
paper's own settings. A run (`runner.running`) appends one JSON line for each finished
case, so a run that was stopped continues where it was. A page (`runner.pages`) is
computed from these lines alone: docs/results holds lines, pages and figures, and a test
compares them. `run --published docs/results` goes on from published lines, e.g. with
more seeds.

`experiments/` holds the experiments and their pages, `problems/` small problems whose
solution is known, `data/` texts, tasks, models and metrics, `training/` workers and
training loops, `peers/` methods of others, `runner/` presets, runs and pages.

Needs the extra `lab`: pip install 'lowrank-comm[lab]'.
"""
