"""The section of `benchmarks.bench_compress`: a step beside PyTorch's hook and beside
what the machine allows.
"""

from __future__ import annotations

from typing import Any

from benchmarks.page.tables import listed, median, ratio, table

ABOUT = """\
What a worker computes in a step beside the communication: compress, decompress, error
feedback, for the gradients of LLaMA shapes, in one process over a gloo group of one.
PyTorch's `powerSGD_hook` gets equal gradients in buckets of 25 MB, as from DDP, with
error feedback and warm start; *batched* is its `batch_tensors_with_same_shape`. Rounds
time all sides in turn. Times are medians; a ratio is the median of the ratios within a
round, in brackets its quartiles. Below 1, this library is faster.

*limit* is what this machine allows: the sum over the stages of a step of the time that
memory (at the speed of a copy of the model's size, in the same round) or multipliers (at
the best speed that the BLAS reaches for these shapes) need at least, whichever is longer.
`benchmarks/limit.py` tells the count: seven arrays of the model's size are read or
written, and four thin products formed.
"""
PARTS = """\
Where the time goes. The first part forms Delta, P and Q, orthonormalises and packs; the
second decodes and writes the error memory. Memory and products are the limit's two sides.
"""
PRODUCTS = """\
What the machine did in the same run: the copy, and each product at its best. Multiplication
and addition count as two operations.
"""
NOTE = """\
Where rank is high, matrix products decide. This library forms four of them for each matrix
and the hook three: the error memory subtracts the worker's own contribution P Q_i^T, as
the paper's algorithm does, and the hook the decoded mean, which it has anyway and by which
the workers' memories part without bound ([how it works](how_it_works.md)).
"""


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    rows = evidence["results"]["rows"]
    heads = ["model", "rank", "ours ms", "hook ms", "batched ms", "limit ms"]
    heads += ["ours / hook", "ours / batched", "ours / limit"]
    times = ("ours_ms", "hook_ms", "hook_batched_ms", "limit_ms")
    ratios = ("ours_over_hook", "ours_over_hook_batched", "ours_over_limit")
    beside = [
        [*_names(row), *(median(row[key]) for key in times), *(ratio(row[key]) for key in ratios)]
        for row in rows
    ]
    parts = [
        [*_names(row)]
        + [
            median(row[f"{key}_ms"])
            for key in ("compress", "compress_limit", "decode", "decode_limit")
        ]
        + [median(row["memory_ms"]), median(row["products_ms"])]
        for row in rows
    ]
    speeds = [
        [
            *_names(row),
            median(row["copy_gb_per_s"]),
            *(f"{speed:.0f}" for speed in row["gflop_per_s"].values()),
        ]
        for row in rows
    ]
    second = ["form, ms", "its limit", "decode, ms", "its limit", "memory, ms", "products, ms"]
    third = ["copy GB/s", "Delta Q, GFLOP/s", "Delta^T P", "P Q^T", "e - P Q^T"]
    return "\n".join(
        [
            "## One step beside PyTorch's hook and beside the machine\n",
            ABOUT,
            table(heads, beside),
            _above_the_aim(evidence["results"]),
            _lost(rows),
            NOTE,
            PARTS,
            table(["model", "rank", *second], parts),
            PRODUCTS,
            table(["model", "rank", *third], speeds),
        ]
    )


def _names(row: dict[str, Any]) -> list[str]:
    return [row["model"], str(row["rank"])]


def _above_the_aim(results: dict[str, Any]) -> str:
    aim = results["aim"]
    above = [
        f"{row['model']} at rank {row['rank']}"
        for row in results["rows"]
        if row["ours_over_limit"]["median"] > aim
    ]
    aimed = f"The aim is {aim} times the limit for 20M and 60M parameters."
    return f"{aimed} Above it: {listed(above)}.\n" if above else f"{aimed} No row is above it.\n"


def _lost(rows: list[dict[str, Any]]) -> str:
    lost = [
        f"{row['model']} at rank {row['rank']} ({name})"
        for row in rows
        for key, name in (("ours_over_hook", "as it is"), ("ours_over_hook_batched", "batched"))
        if row[key]["median"] > 1
    ]
    return f"The hook is faster: {listed(lost)}.\n" if lost else "The hook is faster in no row.\n"
