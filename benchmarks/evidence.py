"""A measurement's JSON file: on what it was measured, by which command, its figures.

Every benchmark writes one, and docs/benchmarks.md is made of them and of nothing else
(`benchmarks.page`). The file is an object:

    benchmark   name of the script
    command     that measures the same again
    date        UTC
    machine     processor, cores, threads, memory, accelerator, versions
    load        load averages of the machine before and after (1, 5 and 15 minutes)
    seeds       of all that is drawn
    sources     hash of the files that the figures depend on (lab.runner.sources)
    seconds     that the run took
    runs        further scripts that it starts
    quick       whether it was a short run, for tests, whose figures are not published
    results     the benchmark's own; a figure of many repetitions is a `summary`

    evidence = envelope(__file__, seeds=[0])
    ...
    write(path, evidence, {"rows": rows})
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_comm.lab.runner.machine import machine
from lowrank_comm.lab.runner.rows import plain
from lowrank_comm.lab.runner.sources import sources_hash

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
"""The published files."""
DIGITS = 5
"""Significant digits of what is written."""


def envelope(
    script: str, *, seeds: Sequence[int], quick: bool = False, runs: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all of the file but `seconds` and `results`, as the run begins; after
    `torch.set_num_threads`.

    Args:
        script: the benchmark's `__file__`.
        seeds: of all that it draws.
        quick: whether this is a short run.
        runs: further scripts that it starts, by their path in the checkout.
    """
    path = Path(script).resolve()
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    # where the file is written does not matter to who measures again
    given = [text for k, text in enumerate(sys.argv[1:]) if "--json" not in sys.argv[k : k + 2]]
    return {
        "benchmark": path.stem,
        "command": " ".join(["python", "-m", name.replace("/", "."), *given]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads(), "memory_gib": _memory()},
        "load": {"before": os.getloadavg()},
        "seeds": list(seeds),
        "sources": sources_hash(path, *(ROOT / other for other in runs)),
        "runs": list(runs),
        "quick": quick,
        "seconds": time.monotonic(),
    }


def write(path: Path, evidence: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the file, as the run ends."""
    seconds = round(time.monotonic() - evidence["seconds"], 1)
    load = evidence["load"] | {"after": os.getloadavg()}
    whole = evidence | {"load": load, "seconds": seconds, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(whole, DIGITS), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def published(evidence: dict[str, Any]) -> Path | None:
    """Return where the file of a run belongs unless it is told: of a quick one,
    nowhere.
    """
    return None if evidence["quick"] else RESULTS / f"{evidence['benchmark']}.json"


def read(path: Path) -> dict[str, Any]:
    """Return the content of a file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def current(evidence: dict[str, Any]) -> bool:
    """Return whether the sources are still those that were measured."""
    scripts = [f"benchmarks/{evidence['benchmark']}.py", *evidence["runs"]]
    return bool(sources_hash(*(ROOT / script for script in scripts)) == evidence["sources"])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return n, the median and the quartiles."""
    if len(values) == 1:
        return summary([*values, *values]) | {"n": 1}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"n": len(values), "median": median, "low": low, "high": high}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the summary of the ratios ours / theirs, round by round: machines drift,
    and two that were timed one after the other drifted together.
    """
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def _memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
