"""The section of `benchmarks.bench_svd`: the leading singular vectors of a restart."""

from __future__ import annotations

from typing import Any

from benchmarks.page.tables import median, table

ABOUT = """\
Leading singular vectors of one matrix of noise in float32, for which an SVD restart of a
matrix of more than 2^20 elements takes a block Krylov space (`numerics/block_krylov.py`);
seconds, the median of several calls, beside `torch.linalg.svd` where that is bearable.
"""
CAPTURED = """\
The captured energy over that of the exact leading vectors, for a short side of {sides}
and given singular values: at least {gap:.5f} where value r + 1 is at most 0.9 of value r,
and {flat:.4f} elsewhere.
"""


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    times = [
        [
            f"{row['m']} x {row['n']}",
            str(row["rank"]),
            median(row["krylov"]),
            median(row["exact"]) if row["exact"] else "",
        ]
        for row in results["times"]
    ]
    rows = results["energies"]
    ranks = sorted({row["rank"] for row in rows})
    of = {(row["spectrum"], row["rank"]): f"{row['captured']:.4f}" for row in rows}
    energies = [
        [name, *(of[name, rank] for rank in ranks)]
        for name in dict.fromkeys(row["spectrum"] for row in rows)
    ]
    sides = " or ".join(map(str, sorted({row["s"] for row in rows})))
    return "\n".join(
        [
            "## The SVD of a restart\n",
            ABOUT,
            table(["matrix", "rank", "leading vectors, s", "torch.linalg.svd, s"], times),
            CAPTURED.format(sides=sides, **results["least"]),
            table(["singular values", *(f"rank {rank}" for rank in ranks)], energies),
        ]
    )
