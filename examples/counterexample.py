"""Figure 1 of the PowerSGD+ paper: a problem on which PowerSGD never learns and
PowerSGD+ does, under momentum SGD and under Adam.

    python examples/counterexample.py [--steps 600] [--output counterexample.png]

The problem is that of Theorem 1 (arXiv 2509.11254);
`lowrank_comm.lab.problems.theorem1` defines it and says what of it is exact. Both
curves are made by the library's own compressors, in the simulation of N workers;
nothing is re-implemented here. `python -m lowrank_comm.lab run counterexamples` has
more methods, and GaLore's trap.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lowrank_comm.lab.problems.theorem1 import OptimizerOf, Problem, Run, train

PROBLEM, RESTART_EVERY = Problem(), 10
SECTIONS: dict[str, dict[str, Any]] = {
    "PowerSGD": {"compressor": "powersgd", "rank": 1},
    "PowerSGD+": {"compressor": "powersgd_plus", "rank": 1, "restart_every": RESTART_EVERY},
    "uncompressed": {"compressor": "identity"},
}
OPTIMIZERS: dict[str, OptimizerOf] = {
    "MSGD": lambda parameters: torch.optim.SGD(parameters, lr=3e-4, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}


def draw(runs: dict[str, dict[str, Run]], output: Path) -> None:
    """One panel an optimizer, loss against step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(5.2 * len(runs), 3.8), sharey=True, layout="constrained"
    )
    styles = {"PowerSGD": "C3-", "PowerSGD+": "C0-", "uncompressed": "C7:"}
    for panel, (optimizer, by_compressor) in zip(panels, runs.items(), strict=True):
        for name, run in by_compressor.items():
            panel.semilogy(
                [max(loss, 1e-8) for loss in run.losses], styles[name], label=name, linewidth=1.2
            )
        panel.set(title=optimizer, xlabel="step", ylim=(1e-8, 30))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss f(X)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        f"Theorem 1's problem, rank 1, {PROBLEM.workers} workers, restart every {RESTART_EVERY}"
        " steps"
    )
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Run]]:
    """Train, check, print, draw; returns the runs by optimizer and compressor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of each run (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the coins (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("counterexample.png"), help="where the picture goes"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    runs = {
        optimizer: {
            name: train(PROBLEM, section, build, options.steps, options.seed)
            for name, section in SECTIONS.items()
        }
        for optimizer, build in OPTIMIZERS.items()
    }
    print(
        f"{'optimizer':10} {'compressor':13} {'first loss':>10} {'last loss':>10}"
        f" {'last |grad|^2':>14}  updates"
    )
    for optimizer, by_compressor in runs.items():
        for name, run in by_compressor.items():
            updates = "all multiples of B, exactly" if run.trapped_exactly else "reach the gradient"
            last = f"{run.losses[-1]:10.3g} {run.squared_gradients[-1]:14.3g}"
            print(f"{optimizer:10} {name:13} {run.losses[0]:10.3g} {last}  {updates}")
    draw(runs, options.output)
    print(f"drawn: {options.output}")
    return runs


if __name__ == "__main__":
    main()
