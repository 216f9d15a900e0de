"""How a step grows: with the parameters, with the matrices of one total size, with the
rank, and with the workers.

A point of the first three is a row of bench_compress.py: times beside PyTorch's hook
and the machine's limit, launches and bytes on either path. `growth_workers` tells the
points of the workers.

    python -m benchmarks.bench_growth [--rounds 7] [--quick] [--json FILE]
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bench_compress import counts, measure
from benchmarks.evidence import envelope, published, write
from benchmarks.growth_workers import as_processes, simulated
from benchmarks.sides import MODELS, SEED, TINY, Model, Shapes, group_of_one

RANK = 4
PARAMETERS = [
    MODELS[0],
    Model("10M", 384, 5, 1024, 3072),
    MODELS[1],
    Model("40M", 640, 7, 1728, 6144),
    MODELS[2],
]
ELEMENTS = 4_100_000
"""In all matrices together, however many they are."""
MATRICES = [10, 40, 160, 640, 1600, 4000]
RANK_GROWS = [1, 2, 4, 8, 16, 32, 64]
PROCESSES = [2, 4, 8]
SIMULATED = [1, 4, 16, 64, 256]


def squares(number: int, elements: int) -> list[tuple[int, ...]]:
    """Return the shapes of so many square matrices of that many elements together."""
    side = round((elements / number) ** 0.5)
    return [(side, side)] * number


def point(x: int, shapes: Shapes, rank: int, rounds: int) -> dict[str, Any]:
    """Return a point of a curve."""
    row = measure(shapes, rank, rounds)
    return {"x": x} | row | {"launches": counts(shapes, rank)}


def curves(quick: bool, rounds: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield name and points of each curve."""
    shapes = (TINY if quick else MODELS[0]).shapes()
    yield "processes", as_processes(shapes, RANK, [2] if quick else PROCESSES, rounds)
    models = [TINY] if quick else PARAMETERS
    numbers, elements = ([4, 16], 160_000) if quick else (MATRICES, ELEMENTS)
    ranks, of_rank = ([1, 2], TINY) if quick else (RANK_GROWS, MODELS[1])
    workers = [1, 4] if quick else SIMULATED
    with group_of_one():
        yield "parameters", [point(m.parameters, m.shapes(), RANK, rounds) for m in models]
        yield "matrices", [point(k, squares(k, elements), RANK, rounds) for k in numbers]
        yield "rank", [point(rank, of_rank.shapes(), rank, rounds) for rank in ranks]
        few = max(2, rounds // 3)
        yield "simulated", [simulated(TINY.shapes(), RANK, n, few) for n in workers]


def table_of(name: str, points: list[dict[str, Any]]) -> Table:
    """Return the table of a curve that is printed."""
    table = Table(name, "ours ms", "quartiles", "launches", "bytes / gradients")
    for one in points:
        ours, counted = one["ours_ms"], next(iter(one["launches"].values()))
        table.add_row(
            str(one["x"]),
            f"{ours['median']:.1f}",
            f"{ours['low']:.1f}-{ours['high']:.1f}",
            f"{counted['launches']:.0f}",
            f"{counted['bytes_over_gradients']:.1f}",
        )
    return table


def main(
    rounds: Annotated[int, typer.Option(help="timed rounds for each point", min=1)] = 7,
    quick: Annotated[bool, typer.Option(help="two small points a curve, for tests")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="file of figures")] = None,
) -> None:
    """Measure all curves and print them."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    evidence = envelope(__file__, seeds=[SEED], quick=quick)
    rounds = 2 if quick else rounds
    found = {}
    for name, points in curves(quick, rounds):
        found[name] = points
        Console(width=100).print(table_of(name, points))
    output = output or published(evidence)
    if output is not None:
        write(output, evidence, {"rank": RANK, "elements": ELEMENTS, "curves": found})


if __name__ == "__main__":
    typer.run(main)
