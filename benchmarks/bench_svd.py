"""What an SVD restart of a large matrix costs, and what it captures next to the exact
singular vectors (`numerics.block_krylov`).

Times are of one matrix of noise, beside `torch.linalg.svd` where that is bearable; of
several calls, median and quartiles. The captured energy is ||U^T A||^2 over that of the
exact leading r: of diagonal matrices with given singular values, which is no loss of
generality, since the method starts from a Gaussian matrix and that has no direction of
its own; and of noise, whose singular values `torch.linalg.svdvals` gives. The least of
each kind is what counts.

    python -m benchmarks.bench_svd [--quick] [--json FILE]
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.evidence import envelope, published, summary, write
from lowrank_comm.numerics.block_krylov import columns_of_space, leading_left_vectors

SEED = 0
SHAPES = ((1024, 1024, 4), (2048, 2048, 4), (4096, 14_336, 4), (14_336, 4096, 4))
SHAPES += ((4096, 14_336, 32), (4096, 14_336, 64))
"""m, n and rank of the matrices that are timed."""
EXACT = 1 << 22
"""Elements up to which torch.linalg.svd is timed, too."""
REPETITIONS = 5
RANKS = (1, 4, 32, 64)
SIDE = 4096
"""Of the matrices whose captured energy is looked at."""
NOISE = ((2048, 2048), (2048, 7168))
QUICK_SHAPES, QUICK_SIDE, QUICK_NOISE = ((300, 500, 4),), 700, ((700, 900),)


def noise(m: int, n: int) -> Tensor:
    """Return one matrix of normal numbers, (1, m, n)."""
    return torch.randn(1, m, n, generator=torch.Generator().manual_seed(SEED))


def seconds_of(call: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Return a summary of the times of several calls."""
    call()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return summary(seconds)


def times(shapes: tuple[tuple[int, int, int], ...], repetitions: int) -> list[dict[str, Any]]:
    """Return the rows of times."""
    rows = []
    for m, n, r in shapes:
        a = noise(m, n)
        row: dict[str, Any] = {"m": m, "n": n, "rank": r, "exact": None}
        row["krylov"] = seconds_of(lambda: leading_left_vectors(a, r), repetitions)  # noqa: B023
        if m * n <= EXACT:
            row["exact"] = seconds_of(lambda: torch.linalg.svd(a, full_matrices=False), 1)  # noqa: B023
        rows.append(row)
    return rows


def spectra(r: int, s: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, singular values, descending): "gap" where value r + 1 is at
    most 0.9 of value r, else "flat".
    """
    places, ones = torch.arange(s, dtype=torch.float64), torch.ones(s, dtype=torch.float64)
    behind = (places - r).clamp_min(0) / (s - r)

    def after(tail: Tensor) -> Tensor:
        return torch.where(places < r, ones, tail)

    yield "gap", "0.9 in all others", after(0.9 * ones)
    yield "gap", "0.9 falling slowly", after(0.9 - 0.2 * behind)
    yield "gap", "0.9 falling to 0", after(0.9 - 0.9 * behind)
    yield "gap", "0.9 and Chebyshev's", after(0.9 * torch.cos(math.pi / 2 * behind))
    yield "gap", "0.9^k", 0.9**places
    yield "flat", "flat", ones
    yield "flat", "falling by a tenth", 1 - 0.1 * places / s
    yield "flat", "linear", 1 - places / s
    yield "flat", "1/sqrt k", (1 + places) ** -0.5
    yield "flat", "0.999^k", 0.999**places
    yield (
        "flat",
        "a cluster around r",
        torch.where(places < 4 * r, 1 - 0.005 * places / r, 0.97 * (1 - behind)),
    )


def captured(a: Tensor, values: Tensor, r: int) -> float:
    """Return the captured energy of a matrix over the exact one."""
    u = leading_left_vectors(a, r)
    return float((u.mT @ a).double().square().sum() / values[:r].double().square().sum())


def energies(side: int, noises: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Return the rows of captured energies."""
    rows = []
    ranks = [r for r in RANKS if columns_of_space(r) < side]
    for r in ranks:
        for kind, name, values in spectra(r, side):
            share = captured(torch.diag(values.float())[None], values, r)
            rows.append({"rank": r, "s": side, "kind": kind, "spectrum": name, "captured": share})
    for m, n in noises:
        a = noise(m, n)
        values = torch.linalg.svdvals(a)[0]
        for r in ranks:
            share = captured(a, values, r)
            rows.append(
                {"rank": r, "s": m, "kind": "flat", "spectrum": f"noise, {m} x {n}"}
                | {"captured": share}
            )
    return rows


def main(
    quick: Annotated[bool, typer.Option(help="small matrices, for tests")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="file of figures")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    evidence = envelope(__file__, seeds=[SEED], quick=quick)
    timed = times(QUICK_SHAPES if quick else SHAPES, 2 if quick else REPETITIONS)
    table = Table("matrix", "rank", "leading vectors", "torch.linalg.svd")
    for row in timed:
        exact = f"{row['exact']['median']:.3f} s" if row["exact"] else "-"
        table.add_row(
            f"{row['m']} x {row['n']}", str(row["rank"]), f"{row['krylov']['median']:.3f} s", exact
        )
    console = Console(width=100)
    console.print(table)
    shares = energies(QUICK_SIDE, QUICK_NOISE) if quick else energies(SIDE, NOISE)
    table = Table("singular values", "rank", "captured, of the exact energy")
    for row in shares:
        table.add_row(row["spectrum"], str(row["rank"]), f"{row['captured']:.5f}")
    console.print(table)
    least = {
        kind: min(row["captured"] for row in shares if row["kind"] == kind)
        for kind in ("gap", "flat")
    }
    console.print(f"least: {least['gap']:.5f} behind a gap of 0.9, {least['flat']:.5f} without one")
    output = output or published(evidence)
    if output is not None:
        write(output, evidence, {"times": timed, "energies": shares, "least": least})


if __name__ == "__main__":
    typer.run(main)
