"""Figure 1 of the PowerSGD+ paper: a problem on which PowerSGD never learns and PowerSGD+ does, under momentum SGD and
under Adam.

    python examples/counterexample.py [--steps 600] [--output counterexample.png]

The problem is that of Theorem 1 (arXiv 2509.11254): f(X) = psi(D^T X D), psi(x) = x^2 for |x| <= 1 and 2|x| - 1 beyond,
with the gradient oracle g_i = G + xi_i (sigma B - G), G the true gradient, B all ones, xi_i = +1 or -1 by a fair coin,
rank 1. If all coins of the first step show +1 (probability 2^-N, and the figure shows that case), the first Delta is
sigma B, the subspace is span(1, ..., 1), and D is orthogonal to it: no later step sees G, and it piles up in the error
memory unseen.

Both curves are made by the library's own compressors, in the simulation of N workers; nothing is re-implemented here.

What is exact. In floating point, round-off in the subspace grows with the error memory and frees PowerSGD after some 10
to 20 steps when X is 2 x 2 as in the paper, because 1 / sqrt(2) has no finite binary form. Here every entry of the
paper's example is repeated in a 2 x 2 block (X is 4 x 4, D = (1, 1, -1, -1)), so that the basis is (1, 1, 1, 1) / 2;
with sigma = 3 and N = 3 all of PowerSGD's numbers are integers or halves far below 2^53, and its float64 arithmetic
*is* exact arithmetic: every applied update is a multiple of B, bit by bit, which this program checks. Not exact: the
optimizer's own step on X (its rounding moves D^T X D by about 1e-13, and psi' does not change), and all of PowerSGD+,
which needs no exactness to escape. N is odd because with an even N the coins may cancel, P is 0 then, and the random
vector that takes its place opens the trap; the paper's proof passes over this case."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_comm import Identity, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation

WORKERS, SIGMA, RESTART_EVERY = 3, 3.0, 10
D = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
A, B = torch.outer(D, D), torch.ones(4, 4, dtype=torch.float64)
FIRST_BASIS = torch.tensor(
    [[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64
)  # any Q_{-1} whose sum is not 0 leads to the trap

COMPRESSORS: dict[str, Compressor] = {
    "PowerSGD": PowerSGD(rank=1),
    "PowerSGD+": PowerSGDPlus(rank=1, restart_every=RESTART_EVERY),
    "uncompressed": Identity(),
}
OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "MSGD": lambda parameters: torch.optim.SGD(parameters, lr=3e-4, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}


@dataclass
class Run:
    """One training run.

    Attributes:
        losses: f(X_t) before each step, and after the last.
        squared_gradients: ||grad f(X_t)||^2 likewise.
        updates: what the compressor applied at each step.
    """

    losses: list[float]
    squared_gradients: list[float]
    updates: list[torch.Tensor]

    @property
    def trapped_exactly(self) -> bool:
        """Whether every update was a multiple of B to the last bit: nothing of the gradient, a multiple of A, came
        through."""
        return all(torch.equal(update, update[0, 0] * B) for update in self.updates)


def loss_and_slope(x: torch.Tensor) -> tuple[float, float]:
    """psi(D^T X D) and psi' there."""
    value = float(D @ x @ D)
    return (value * value, 2 * value) if abs(value) <= 1 else (2 * abs(value) - 1, 2.0 if value > 0 else -2.0)


def coins(steps: int, seed: int) -> torch.Tensor:
    """xi: (steps, WORKERS) of +1 and -1; all +1 at the first step, the case of the theorem."""
    xi = 2.0 * torch.randint(0, 2, (steps, WORKERS), generator=torch.Generator().manual_seed(seed)).double() - 1
    xi[0] = 1.0
    return xi


def train(compressor: Compressor, optimizer_of: Callable[..., torch.optim.Optimizer], steps: int, seed: int = 0) -> Run:
    """`steps` steps from X_0 = A / 8, where D^T X D = 2, f = 3 and psi' = 2."""
    x = torch.nn.Parameter(A / 8)
    optimizer = optimizer_of([x])
    basis = {"X": FIRST_BASIS} if compressor.low_rank else None
    workers = Simulation(
        {"X": (4, 4)}, compressor, WORKERS, dtype=torch.float64, min_compression_rate=0, initial_basis=basis
    )
    losses, squared_gradients, updates = [], [], []
    for xi in coins(steps, seed):
        loss, slope = loss_and_slope(x.detach())
        gradient = slope * A
        losses.append(loss)
        squared_gradients.append(float((gradient**2).sum()))
        applied = workers.reduce([{"X": gradient + coin * (SIGMA * B - gradient)} for coin in xi])["X"]
        updates.append(applied.clone())
        x.grad = applied
        optimizer.step()
    losses.append(loss_and_slope(x.detach())[0])
    return Run(losses, squared_gradients, updates)


def draw(runs: dict[str, dict[str, Run]], output: Path) -> None:
    """One panel an optimizer, loss against step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(runs), figsize=(5.2 * len(runs), 3.8), sharey=True, layout="constrained")
    styles = {"PowerSGD": "C3-", "PowerSGD+": "C0-", "uncompressed": "C7:"}
    for panel, (optimizer, by_compressor) in zip(panels, runs.items(), strict=True):
        for name, run in by_compressor.items():
            panel.semilogy([max(loss, 1e-8) for loss in run.losses], styles[name], label=name, linewidth=1.2)
        panel.set(title=optimizer, xlabel="step", ylim=(1e-8, 30))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss f(X)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Theorem 1's problem, rank 1, {WORKERS} workers, restart every {RESTART_EVERY} steps")
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Run]]:
    """Train, check, print, draw; returns the runs by optimizer and compressor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of each run (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the coins (default 0)")
    parser.add_argument("--output", type=Path, default=Path("counterexample.png"), help="where the picture goes")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    runs = {
        optimizer: {name: train(compressor, build, options.steps, options.seed) for name, compressor in COMPRESSORS.items()}
        for optimizer, build in OPTIMIZERS.items()
    }
    print(f"{'optimizer':10} {'compressor':13} {'first loss':>10} {'last loss':>10} {'last |grad|^2':>14}  updates")
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
