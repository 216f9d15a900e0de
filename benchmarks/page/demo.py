"""docs/demo_cluster.md and its plots, made of benchmarks/results/demo_cluster.json as
docs/benchmarks.md is of the others.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence import RESULTS, ROOT
from benchmarks.page.building import Part, section_of, write_plots

PAGE = ROOT / "docs" / "demo_cluster.md"
PLOTS = PAGE.with_suffix("")
PART = Part(
    "demo_cluster",
    "benchmarks.demo.page:section",
    "## Seconds to a common loss\n\nNot measured: `make demo-cluster`.\n",
    "benchmarks.demo.page:figures",
)
HEAD = """\
# Four hosts on slow links

<!-- Made from demo_cluster.json by `make benchmarks-page`. Measure anew; do not edit. -->

    make demo-cluster      # as root, Linux: 25 minutes at 100 Mbit/s, 8 at 1 Gbit/s; resumable
    make benchmarks-page   # this page anew from the file of figures
"""


def page(results: Path = RESULTS) -> str:
    """Return the page of the file in a folder."""
    return "\n".join([HEAD, section_of(PART, results, PLOTS.name)])


def write_all() -> list[Path]:
    """Write the page and its plots, and delete old ones; return what was written."""
    PAGE.write_text(page(), encoding="utf-8")
    return [PAGE, *write_plots((PART,), PLOTS)]
