"""ckpt-chaos judges the plain loop, on one rank and at a few points; the campaign has
more points, two ranks, and `examples/train.py` (docs/reliability.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.judge import TARGETS, judge, loop


@pytest.mark.slow
def test_kills_at_file_events_of_a_plain_loop(tmp_path: Path) -> None:
    """Before a change of a file, with the file cut in half, and with all that was not
    fsynced gone.
    """
    target = loop("plain loop", "plain", True, points=3, ranks=1)
    found = judge(target, tmp_path / "judge")
    assert found["control"] == "PASS"
    assert found["points"] == 3
    assert found["counts"]["PASS"] == 3, found["failed"]


def test_every_script_is_judged_with_compression_and_without() -> None:
    names = [target.name for target in TARGETS]
    compressed = [name for name in names if not name.endswith("uncompressed")]
    assert names == [one for name in compressed for one in (name, f"{name}, uncompressed")]
    assert all(target.points >= 6 for target in TARGETS)
