"""Time of one compressed reduction beside PyTorch's own PowerSGD hook on equal
gradients, and beside what this machine allows.

It measures what a worker computes in a step beside the communication, for the gradients
of LLaMA shapes of about 5M, 20M and 60M parameters at rank 4 and 32, with equal threads
(`sides`). Each round times this library, the hook as it is and with
`batch_tensors_with_same_shape`, and a copy of the model's size, one after the other, in
turning order; the limit of `limit` is formed of the round's own copy. The table shows
medians, and medians of the paired ratios with their quartiles, since a machine's speed
drifts. After timing, the last results of all are compared, dense parameters exactly and
matrices by their norms, so that none has left work out.

Beside the times stand the operations that a step starts, the bytes that they touch
(`tests.support.launches`) and the numbers that the host waits for: on the path that a
CPU takes, and on an accelerator's.

The clock is time.perf_counter: torch.utils.benchmark.Timer repeats a statement to warm
up, and a step changes the compressor's state.

    python -m benchmarks.bench_compress [--rounds 15] [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.evidence import envelope, paired, published, summary, write
from benchmarks.limit import COMPRESSING, PRODUCTS, Copy, Products, limit, matrices_of
from benchmarks.sides import (
    MODELS,
    SEED,
    TINY,
    Shapes,
    Side,
    Step,
    check_alike,
    done_at_once,
    drawn,
    elements_of,
    group_of_one,
    ours,
    theirs,
    told,
)
from lowrank_comm.numerics.device import accelerator_path
from tests.support.launches import Launches, count

RANKS = (4, 32)
WARM_UP = 3
AIM = 1.25
"""Of the limit, for 20M and 60M parameters."""


def measure(shapes: Shapes, rank: int, rounds: int) -> dict[str, Any]:
    """Return the row of a model and a rank, without counts."""
    generator = torch.Generator().manual_seed(SEED)
    pool = [drawn(shapes, generator) for _ in range(3)]
    own = Step(shapes, rank)
    sides: dict[str, Side] = {
        "ours": (own.grads, own),
        "hook": theirs(shapes, rank, batch=False),
        "hook_batched": theirs(shapes, rank, batch=True),
    }
    copy, products = Copy(shapes), Products(shapes, rank)
    steps: dict[str, Callable[[], None]] = {side: step for side, (_, step) in sides.items()}
    steps["copy"] = copy
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in [*names, "compress"]}
    products.measure()
    for k in range(WARM_UP + rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            if name in sides:
                for grad, fresh in zip(sides[name][0], pool[k % 3], strict=True):
                    grad.copy_(fresh)
            start = time.perf_counter()
            steps[name]()
            if k >= WARM_UP:
                times[name].append(time.perf_counter() - start)
        if k >= WARM_UP:
            times["compress"].append(own.seconds["compress"])
    products.measure()
    for hook in ("hook", "hook_batched"):
        check_alike(own.grads, sides[hook][0], pool[(WARM_UP + rounds - 1) % 3])
    return {
        "parameters": elements_of(shapes),
        "matrices": len(matrices_of(shapes)),
        **figures(times, [limit(spent, products) for spent in times["copy"]]),
        "copy_gb_per_s": summary([2 * copy.bytes / spent / 1e9 for spent in times["copy"]]),
        "gflop_per_s": {kind: products.gflops(kind) for kind in PRODUCTS},
    }


def figures(
    times: dict[str, list[float]], limits: list[list[tuple[float, float]]]
) -> dict[str, Any]:
    """Return times in ms and paired ratios.

    Args:
        times: of every round, in seconds.
        limits: of every round, the (memory, products) of each stage in seconds.
    """
    times["limit"] = [sum(map(max, stages)) for stages in limits]
    times["compress_limit"] = [sum(map(max, stages[:COMPRESSING])) for stages in limits]
    times["decode"] = _differences(times["ours"], times["compress"])
    times["decode_limit"] = _differences(times["limit"], times["compress_limit"])
    times["memory"] = [sum(memory for memory, _ in stages) for stages in limits]
    times["products"] = [sum(products for _, products in stages) for stages in limits]
    found: dict[str, Any] = {
        f"{name}_ms": summary([spent * 1e3 for spent in spents]) for name, spents in times.items()
    }
    for other in ("hook", "hook_batched", "limit"):
        found[f"ours_over_{other}"] = paired(times["ours"], times[other])
    return found


def _differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def counts(shapes: Shapes, rank: int) -> dict[str, Any]:
    """Return what a step starts and touches, on either path and by the hook."""
    found = {}
    for name, make, path in (
        ("cpu", lambda: ours(shapes, rank), contextlib.nullcontext()),
        ("accelerator", lambda: ours(shapes, rank), accelerator_path()),
        ("hook", lambda: theirs(shapes, rank, batch=False), contextlib.nullcontext()),
        ("hook_batched", lambda: theirs(shapes, rank, batch=True), contextlib.nullcontext()),
    ):
        with path:
            found[name] = told(counted_step(*make()), shapes)
    return found


def counted_step(grads: list[torch.Tensor], step: Callable[[], None]) -> Launches:
    """Return the counts of a step that is not the first."""
    generator = torch.Generator().manual_seed(SEED)
    for k in range(WARM_UP):
        for grad in grads:
            grad.normal_(generator=generator)
        if k < WARM_UP - 1:
            step()
    with done_at_once():
        return count(step)


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the table that is printed."""
    table = Table(
        *("model", "rank", "ours ms", "hook ms", "batched", "limit", "ours / hook"),
        *("/ batched", "/ limit", "quartiles", "launches", "accelerator"),
        title="one step: compress + decompress + error feedback",
    )
    for row in rows:
        ratio, launches = row["ours_over_limit"], row["launches"]
        table.add_row(
            row["model"],
            str(row["rank"]),
            *(f"{row[f'{n}_ms']['median']:.1f}" for n in ("ours", "hook", "hook_batched", "limit")),
            f"{row['ours_over_hook']['median']:.2f}",
            f"{row['ours_over_hook_batched']['median']:.2f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            str(launches["cpu"]["launches"]),
            str(launches["accelerator"]["launches"]),
        )
    return table


def main(
    rounds: Annotated[int, typer.Option(help="timed rounds for each row", min=1)] = 15,
    quick: Annotated[bool, typer.Option(help="a tiny model and few rounds, for tests")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="file of figures")] = None,
) -> None:
    """Run all rows and print the table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    evidence = envelope(__file__, seeds=[SEED], quick=quick)
    rows = []
    with group_of_one():
        for model in [TINY] if quick else MODELS:
            shapes = model.shapes()
            for rank in RANKS:
                row: dict[str, Any] = {"model": model.name, "rank": rank}
                row |= measure(shapes, rank, 3 if quick else rounds)
                rows.append(row | {"launches": counts(shapes, rank)})
    Console(width=130).print(table_of(rows))
    output = output or published(evidence)
    if output is not None:
        write(output, evidence, {"aim": AIM, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
