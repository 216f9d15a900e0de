"""benchmarks/compare_commits.py: the statistics of its rows, and a comparison of the
checkout with itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from compare_commits import ROWS, summary  # noqa: E402


def test_a_row_is_slower_where_its_whole_interval_is_above_the_limit() -> None:
    """A row counts by the medians of its repeats, so one slow round changes nothing."""
    slower = summary([[(ratio, 1.0), (ratio, 1.0), (9.0, 1.0)] for ratio in (1.1, 1.11, 1.12)])
    assert slower["slower"]
    assert slower["ratio"] == pytest.approx(1.11, abs=1e-3)
    assert 1.03 < slower["low"] < slower["ratio"] < slower["high"]
    unclear = summary([[(ratio, 1.0)] for ratio in (0.9, 1.1, 1.5)])
    assert not unclear["slower"]
    assert unclear["low"] < 1.03 < unclear["ratio"]


@pytest.mark.slow
def test_a_checkout_is_compared_with_itself(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/compare_commits.py", str(ROOT), "--rounds", "1"]
    command += ["--repeats", "2", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    # 1: with two repeats a row may look slower by chance
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [(row["model"], row["rank"]) for row in rows] == ROWS
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
