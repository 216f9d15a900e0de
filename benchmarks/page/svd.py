"""The section of `benchmarks.bench_svd`: what an SVD restart costs and captures."""

from __future__ import annotations

from typing import Any

from benchmarks.page.tables import digits, table

ABOUT = """\
The leading singular vectors of one matrix of noise, on one thread, by block Krylov iteration
with oversampling, as a restart takes them of a large matrix; beside them the whole
decomposition, where that is bearable. Medians with quartiles, in seconds.
"""
CAPTURED = """\
The captured energy, ||U^T A||^2 over that of the exact leading vectors: the least over all
spectra that were tried, of those with a gap (singular value r + 1 is at most 0.9 of value r),
and of flat and clustered ones.
"""
KINDS = {"gap": "with a gap", "flat": "flat or clustered"}


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    times = [
        [
            f"{row['m']} x {row['n']}",
            str(row["rank"]),
            _seconds(row["krylov"]),
            _seconds(row["exact"]) if row["exact"] else "not timed",
        ]
        for row in results["times"]
    ]
    energies = results["energies"]
    shares = [
        [str(rank), *(_least(energies, rank, kind) for kind in KINDS)]
        for rank in sorted({one["rank"] for one in energies})
    ]
    return "\n".join(
        [
            "## The SVD of a restart\n",
            ABOUT,
            table(["matrix", "rank", "leading vectors", "torch.linalg.svd"], times),
            CAPTURED,
            table(["rank", *KINDS.values()], shares),
        ]
    )


def _least(energies: list[dict[str, Any]], rank: int, kind: str) -> str:
    of_kind = [one for one in energies if (one["rank"], one["kind"]) == (rank, kind)]
    return f"{min(one['captured'] for one in of_kind):.4f}"


def _seconds(summary: dict[str, Any]) -> str:
    middle = digits(summary["median"])
    if summary["n"] == 1:
        return middle
    return f"{middle} ({digits(summary['low'])}-{digits(summary['high'])})"
