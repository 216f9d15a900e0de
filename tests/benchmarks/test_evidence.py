"""benchmarks/evidence.py: a measurement's JSON file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence import current, envelope, paired, read, summary, write
from tests.support import ROOT

SCRIPT = str(ROOT / "benchmarks" / "compare_commits.py")


def test_a_file_says_on_what_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--rounds", "7", "--json", "/somewhere/else.json"])
    write(tmp_path / "made" / "one.json", envelope(SCRIPT, seeds=[0]), {"rows": [1 / 3]})
    found = read(tmp_path / "made" / "one.json")
    assert found["command"] == "python -m benchmarks.compare_commits --rounds 7"
    assert found["results"] == {"rows": [0.33333]}
    assert found["seeds"] == [0]
    assert {"cpu", "cores", "threads", "torch", "memory_gib"} <= set(found["machine"])
    assert len(found["load"]["before"]) == len(found["load"]["after"]) == 3
    assert 0 <= found["seconds"] < 60
    assert str(tmp_path) not in (tmp_path / "made" / "one.json").read_text()


def test_a_measurement_of_other_sources_is_not_current() -> None:
    measured = envelope(SCRIPT, seeds=[0], runs=["examples/train.py"])
    assert current(measured)
    assert not current(measured | {"runs": []})
    assert not current(measured | {"sources": "0" * 16})


def test_summaries_are_medians_with_quartiles() -> None:
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"n": 5, "median": 3.0, "low": 2.0, "high": 4.0}
    # a machine that is ten times as slow in one round changes no ratio
    assert paired([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == summary([0.5, 0.5, 0.5])
