"""What a whole step would cost an accelerator, counted without one: operations started,
each about one kernel launch, bytes that they touch, and numbers that the host waits for
(`tests.support.launches`).

The model has the matrices of a LLaMA with 8 and with 32 layers, in five shapes, at 1/16
of the width; counts of launches do not depend on the width. The step is
`CompressedOptimizer.step` over plain SGD, ordinary or with a restart of all matrices,
on the path that an accelerator takes and on a CPU's. PyTorch's hook stands beside it,
in one bucket; it makes no step, and SGD's own counts are told apart. The counts do not
vary, so this is no timing.

    python -m benchmarks.bench_launches [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.bench_compress import counted_step
from benchmarks.evidence import envelope, published, write
from benchmarks.limit import matrices_of
from benchmarks.sides import SEED, Shapes, group_of_one, theirs, told
from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.numerics.device import accelerator_path
from tests.support.launches import Launches, count

LAYERS = (8, 32)
RANK = 4
STEPS = 4
"""Before the step that is counted."""
COMPRESSORS: dict[str, Compressor] = {
    "PowerSGD": PowerSGD(RANK),
    "PowerSGD+ with a restart": PowerSGDPlus(RANK, restart_every=STEPS),
}
HOOK, BASE = "powerSGD_hook", "SGD alone"


def llama(layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of a LLaMA at 1/16 of the width."""
    hidden, mlp, vocabulary, keys = 256, 896, 8192, 64
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *(layer * layers), (hidden,), (vocabulary, hidden)]


def of_a_step(shapes: Shapes, compressor: Compressor | None) -> Launches:
    """Return the counts of a step of SGD, compressed unless that is None."""
    generator = torch.Generator().manual_seed(SEED)
    model = nn.ParameterList(torch.zeros(shape) for shape in shapes)
    base = torch.optim.SGD(model.named_parameters(), lr=1e-3, foreach=True)
    optimizer = CompressedOptimizer(base, compressor) if compressor else base
    for _ in range(1 + STEPS):
        for parameter in model:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        counted = count(optimizer.step)
        optimizer.zero_grad()
    restarts = getattr(compressor, "restart_every", None) is not None
    if isinstance(optimizer, CompressedOptimizer):
        assert optimizer.last_report is not None
        assert optimizer.last_report.restarts == restarts * len(matrices_of(shapes))
    return counted


def rows_of(layers: int) -> list[dict[str, Any]]:
    """Return the rows of a model: what makes the step, on which path, its counts."""
    shapes = llama(layers)
    about: dict[str, Any] = {"layers": layers, "matrices": len(matrices_of(shapes))}
    rows = []
    for path, context in (("accelerator", accelerator_path), ("cpu", contextlib.nullcontext)):
        for name, compressor in COMPRESSORS.items():
            with context():
                counted = of_a_step(shapes, compressor)
            rows.append(about | {"step": name, "path": path} | told(counted, shapes))
    for batch in (False, True):
        counted = counted_step(*theirs(shapes, RANK, batch, bucket_bytes=2**62))
        name = f"{HOOK}, batched" if batch else HOOK
        rows.append(about | {"step": name, "path": None} | told(counted, shapes))
    base = told(of_a_step(shapes, None), shapes)
    return [*rows, about | {"step": BASE, "path": None} | base]


def growth(few: list[dict[str, Any]], many: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the launches that a further matrix costs, between two models of the same
    shapes.
    """
    return [
        {
            "step": after["step"],
            "path": after["path"],
            "launches_a_matrix": (after["launches"] - before["launches"])
            / (after["matrices"] - before["matrices"]),
        }
        for before, after in zip(few, many, strict=True)
    ]


def main(
    quick: Annotated[bool, typer.Option(help="1 and 2 layers, for tests")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="file of figures")] = None,
) -> None:
    """Count all rows and print them."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    evidence = envelope(__file__, seeds=[SEED], quick=quick)
    with group_of_one():
        few, many = (rows_of(layers) for layers in ((1, 2) if quick else LAYERS))
    table = Table("step", "path", "matrices", "launches", "bytes / gradients", "host reads")
    for row in [*few, *many]:
        table.add_row(
            row["step"],
            row["path"] or "",
            str(row["matrices"]),
            str(row["launches"]),
            f"{row['bytes_over_gradients']:.1f}",
            str(row["host_reads"]),
        )
    Console(width=100).print(table)
    output = output or published(evidence)
    if output is not None:
        results = {"rank": RANK, "rows": [*few, *many], "growth": growth(few, many)}
        write(output, evidence, results)


if __name__ == "__main__":
    typer.run(main)
