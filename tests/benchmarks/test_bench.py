"""`make bench` on small models: each script writes a file of figures of which its
section of the page can be made. No time is asserted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_compress import RANKS
from benchmarks.evidence import read
from benchmarks.page import compress, growth, launches
from benchmarks.sides import TINY
from tests.support import ROOT


def figures_of(script: str, folder: Path) -> dict[str, Any]:
    """The file of a quick run, which goes nowhere else."""
    target = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--json", str(target)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = read(target)
    assert found["quick"]
    assert found["benchmark"] == script
    assert found["command"] == f"python -m benchmarks.{script} --quick"
    return found


def check_summary(summary: dict[str, float]) -> None:
    assert summary["n"] > 0
    assert summary["low"] <= summary["median"] <= summary["high"]


@pytest.mark.slow
def test_a_step_beside_the_hook_and_the_limit(tmp_path: Path) -> None:
    evidence = figures_of("bench_compress", tmp_path)
    rows = evidence["results"]["rows"]
    assert [(row["model"], row["rank"]) for row in rows] == [(TINY.name, rank) for rank in RANKS]
    for row in rows:
        for key, value in row.items():
            if key.endswith("_ms") or "_over_" in key:
                check_summary(value)
        assert row["compress_limit_ms"]["median"] < row["limit_ms"]["median"]
        assert all(speed > 0 for speed in row["gflop_per_s"].values())
        # counts do not vary: a step reads the flag and which gradients there are
        assert row["launches"]["accelerator"]["host_reads"] == 2
        assert row["launches"]["accelerator"]["launches"] > 0
    assert f"| {TINY.name} | 32 | " in compress.section(evidence)


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    evidence = figures_of("bench_growth", tmp_path)
    curves = evidence["results"]["curves"]
    assert curves.keys() == growth.CURVES.keys()
    for name, points in curves.items():
        assert [point["x"] for point in points] == sorted({point["x"] for point in points})
        for point in points:
            check_summary(point["ours_ms"])
            assert all(counted["launches"] > 0 for counted in point["launches"].values()), name
    assert growth.figures(evidence).keys() == curves.keys()
    assert all(f"({name}.png)" in growth.section(evidence) for name in curves)


@pytest.mark.slow
def test_launches(tmp_path: Path) -> None:
    evidence = figures_of("bench_launches", tmp_path)
    steps = {(row["step"], row["path"]) for row in evidence["results"]["rows"]}
    assert {(one["step"], one["path"]) for one in evidence["results"]["growth"]} == steps
    assert len(steps) == 7
    section = launches.section(evidence)
    assert "| PowerSGD | accelerator | " in section
