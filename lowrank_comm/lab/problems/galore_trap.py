"""A problem on which GaLore never learns and GoLore does: noise that is stronger than
the gradient holds the subspace.

f(X) = 0.5 ||A X||^2 with A = [I, 0] on R^(n x n), which sees the first n - r rows only;
X_0 = 0.5 I there, 0 elsewhere, so that all n - r singular values of the gradient are
0.5. The noise is sigma xi I on the last r x r diagonal block, xi = +1 or -1 by a fair
coin. If sigma > 0.5, the r leading singular vectors of every noisy gradient are the
noise's, and GaLore's subspace is orthogonal to the gradient at every refresh: the
counterexample of GoLore (arXiv 2410.11289). If sigma < 0.5, they are the gradient's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowrank_comm.lab.experiment import Progress
from lowrank_comm.lab.training.averaging import Crew
from lowrank_comm.numerics.randomness import stream


def train(
    section: Mapping[str, Any],
    *,
    size: int,
    block: int,
    sigma: float,
    rate: float,
    steps: int,
    seeds: Sequence[int],
    every: int,
    progress: Progress,
) -> dict[int, list[float]]:
    """Run SGD from X_0 with one worker; return, by seed, ||grad f(X_t)||^2 at every
    `every`-th step and after the last.

    Args:
        section: the compressor, as in a configuration file.
        size: n.
        block: r of the noise.
        sigma: of the noise.
        rate: learning rate.
        steps: number of steps.
        seeds: one run for each, all in one batch.
        every: steps between two records.
        progress: called with the share that is done.
    """
    names = {seed: f"X of seed {seed}" for seed in seeds}
    seen = torch.zeros(size, 1, dtype=torch.float64)
    seen[: size - block] = 1.0
    x = {seed: 0.5 * torch.diag(seen[:, 0]) for seed in seeds}
    noise = torch.diag(sigma * (1 - seen[:, 0]))
    coins = {
        seed: 2.0 * torch.randint(0, 2, (steps,), generator=stream(seed, "X", -1, "coins")).double()
        - 1
        for seed in seeds
    }
    averager = Crew(1).averager(section, dict.fromkeys(names.values(), (size, size)))
    records: dict[int, list[float]] = {seed: [] for seed in seeds}

    def record() -> None:
        for seed in seeds:
            records[seed].append(float(((seen * x[seed]) ** 2).sum()))

    for t in range(steps):
        if t % every == 0:
            record()
            progress(t / steps, f"step {t}")
        applied = averager.average(
            [{names[seed]: seen * x[seed] + coins[seed][t] * noise for seed in seeds}]
        )
        for seed in seeds:
            x[seed] = x[seed] - rate * applied[names[seed]]
    record()
    return records
