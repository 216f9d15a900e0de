"""The lab: experiments that show whether each algorithm does what its paper says.

    python -m lowrank_comm.lab list
    python -m lowrank_comm.lab run speedup --preset small

An experiment (`experiment`) is a list of independent cases and what is drawn and
written from their results. A preset (`presets/*.yaml`) is an experiment's name with its
settings; `small` presets run on a laptop in minutes, `paper` presets have the paper's
own settings. A run (`running`) appends one JSON line a finished case, so that it can be
stopped and goes on where it was. A page (`pages`) is computed from such lines alone:
docs/results holds lines, pages and figures, and a test compares.

Needs the extra `lab`: pip install 'lowrank-comm[lab]'.
"""
