"""Puts the page together: a section for each JSON file of benchmarks/results, with the
run that it comes from, and a plain word where nothing has been measured.

The page is a function of the files, so a test compares it byte by byte; the one line
that may differ says that a section's figures are of an earlier tree. A plot carries the
sha256 of its file in its PNG header, since pixels differ between versions of the
plotting library.
"""

from __future__ import annotations

import hashlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import RESULTS, ROOT, current, read
from lowrank_comm.lab.runner.pages import SOURCE

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = PAGE.with_suffix("")
"""The folder of the page's plots."""
HEAD = """\
# Benchmarks

<!-- Made from benchmarks/results/*.json by `make benchmarks-page`. Measure anew; do not edit. -->

    make bench             # all but the network and the GPU, about six minutes; writes this page
    make bench-network     # four hosts on shaped links (as root, Linux)
    make gpu-check         # on a machine with a GPU
    make benchmarks-page   # this page anew from the files of figures

Every figure here comes from a run's JSON file, which is named below the heading and holds
machine, versions, command, seeds, quartiles and the hash of the sources that were measured.
A quiet machine is asked for: the load averages before and after a run are told.
"""
EARLIER = "**Measured on an earlier tree: the sources that this depends on have changed since.**"
BUSY = "**The machine was busy with other work when this was measured: no figures to go by.**"
BUSY_LOAD = 0.75
"""Load average before a run, for each core, above which a machine is busy."""
AGAINST = """\
## Against another commit

    git worktree add ../base HEAD~1
    make bench-against BASE=../base

times models and ranks of the first table with the library of this checkout and of `BASE`, step
by step in alternation, and prints for each row the ratio of the two with its 95 % confidence
interval. A row whose interval lies wholly above 1.03 is slower: the exit code is then 1.
`BENCH_ARGS="--rounds 30 --repeats 10 --json FILE"` sets the length and keeps the figures.
"""


@dataclass(frozen=True)
class Part:
    """A section.

    Attributes:
        benchmark: name of the script, and of its JSON file.
        maker: "module:function" that returns the section, beginning with its heading.
        missing: the section where there is no file.
        plots: "module:function" that returns the plots, "" for none.
        timed: whether its figures depend on how busy the machine is.
    """

    benchmark: str
    maker: str
    missing: str
    plots: str = ""
    timed: bool = True

    @property
    def file(self) -> Path:
        """Its JSON file."""
        return RESULTS / f"{self.benchmark}.json"


PARTS = (
    Part(
        "bench_compress",
        "benchmarks.page.compress:section",
        "## One step beside PyTorch's hook and beside the machine\n\nNot measured: `make bench`.\n",
    ),
    Part(
        "bench_growth",
        "benchmarks.page.growth:section",
        "## How a step grows\n\nNot measured: `make bench`.\n",
        "benchmarks.page.growth:figures",
    ),
    Part(
        "bench_launches",
        "benchmarks.page.launches:section",
        "## Launches and bytes of a step\n\nNot counted: `make bench`.\n",
        timed=False,
    ),
    Part(
        "bench_svd",
        "benchmarks.page.svd:section",
        "## The SVD of a restart\n\nNot measured: `make bench`.\n",
    ),
    Part(
        "bench_network",
        "benchmarks.network.page:section",
        "## Peers on a shaped network\n\nNot measured: `make bench-network`.\n",
    ),
    Part(
        "gpu_check",
        "benchmarks.page.gpu:section",
        (
            "## On a GPU\n\nNothing has been measured on a GPU; `make gpu-check` does it, and"
            " [gpu.md](gpu.md) tells what was only read.\n"
        ),
    ),
)


def page(results: Path = RESULTS) -> str:
    """Return the page of the files in a folder."""
    sections = (section_of(part, results, PLOTS.name) for part in PARTS)
    return "\n".join([HEAD, *sections, AGAINST])


def without_notes(text: str) -> str:
    """Return a page without what it says of earlier trees."""
    return text.replace(f"{EARLIER}\n\n", "")


def plots_of(part: Part) -> dict[str, Figure]:
    """Return file stem -> plot of a section."""
    if not part.plots or not part.file.is_file():
        return {}
    made: dict[str, Figure] = pkgutil.resolve_name(part.plots)(read(part.file))
    return made


def write_all() -> list[Path]:
    """Write the page and its plots, and delete old ones; return what was written."""
    PAGE.write_text(page(), encoding="utf-8")
    return [PAGE, *write_plots(PARTS, PLOTS)]


def write_plots(parts: Iterable[Part], folder: Path) -> list[Path]:
    """Write the plots of a page's sections, and delete old ones."""
    written: list[Path] = []
    for old in folder.glob("*.png"):
        old.unlink()
    for part in parts:
        for stem, figure in plots_of(part).items():
            folder.mkdir(exist_ok=True)
            written.append(folder / f"{stem}.png")
            figure.savefig(written[-1], dpi=110, metadata={SOURCE: sha256(part.file)})
    return written


def not_current() -> list[str]:
    """Return the benchmarks whose sources have changed since they were measured."""
    there = (part for part in PARTS if part.file.is_file())
    return [part.benchmark for part in there if not current(read(part.file))]


def sha256(path: Path) -> str:
    """Return the hash that a file's plots carry."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def section_of(part: Part, results: Path, plots: str) -> str:
    """Return a section with the run that it comes from.

    Args:
        part: the section.
        results: folder of the files of figures.
        plots: folder of the plots beside the page.
    """
    path = results / part.file.name
    if not path.is_file():
        return part.missing
    evidence = read(path)
    section: Callable[[dict[str, Any]], str] = pkgutil.resolve_name(part.maker)
    heading, _, body = section(evidence).partition("\n")
    body = re.sub(r"\]\(([\w-]+\.png)\)", rf"]({plots}/\1)", body.strip())
    busy = evidence["load"]["before"][0] > BUSY_LOAD * evidence["machine"]["cores"]
    notes = [] if current(evidence) else [EARLIER]
    if part.timed and busy:
        notes.append(BUSY)
    return "\n\n".join([heading, run_of(evidence, path.name), *notes, body]) + "\n"


def run_of(evidence: dict[str, Any], name: str) -> str:
    """Return from which run a section's figures are."""
    computer, load = evidence["machine"], evidence["load"]
    seeds = evidence["seeds"]
    return (
        f"[{name}](../benchmarks/results/{name}): `{evidence['command']}` on"
        f" {computer['accelerator'] or computer['cpu']}, {computer['cores']} cores,"
        f" {computer['threads']} thread(s), torch {computer['torch']}, {evidence['date']};"
        f" {evidence['seconds']:.0f} s, load {load['before'][0]:.1f} before and"
        f" {load['after'][0]:.1f} after; seed{'s' if len(seeds) > 1 else ''}"
        f" {', '.join(map(str, seeds))}; sources `{evidence['sources']}`."
    )
