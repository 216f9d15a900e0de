"""The section of `benchmarks.bench_launches`: what a step would cost an accelerator."""

from __future__ import annotations

from typing import Any

from benchmarks.page.tables import table

ABOUT = """\
Counted without an accelerator, on the path that one would take: operations started, each
about one kernel launch; the bytes that they touch, in multiples of the gradients'; and
numbers that the host waits for. The matrices are those of a LLaMA in five shapes, at rank
{rank}. This library's step is `CompressedOptimizer.step` with SGD, whose own counts are in
the last row; the hook makes no step. The last column is how many launches a further matrix
of the same shapes adds.
"""
PATHS = {"accelerator": "accelerator", "cpu": "CPU", None: "either"}


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    rows, models = results["rows"], sorted({row["layers"] for row in results["rows"]})
    of = {(row["layers"], row["step"], row["path"]): row for row in rows}
    few, many = models
    heads = ["step", "path"]
    heads += [f"launches, {of_model(rows, layers)} matrices" for layers in models]
    heads += ["bytes / gradients", "host reads", "a further matrix"]
    cells = []
    for one in results["growth"]:
        here, there = of[few, one["step"], one["path"]], of[many, one["step"], one["path"]]
        cells.append(
            [
                one["step"],
                PATHS[one["path"]],
                str(here["launches"]),
                str(there["launches"]),
                f"{there['bytes_over_gradients']:.1f}",
                str(there["host_reads"]),
                f"{one['launches_a_matrix']:.2f}",
            ]
        )
    return "\n".join(
        [
            "## Launches and bytes of a step\n",
            ABOUT.format(rank=results["rank"]),
            table(heads, cells),
        ]
    )


def of_model(rows: list[dict[str, Any]], layers: int) -> int:
    """Return how many matrices the model of so many layers has."""
    return next(int(row["matrices"]) for row in rows if row["layers"] == layers)
