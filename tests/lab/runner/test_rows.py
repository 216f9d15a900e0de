"""Rows as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_comm import ConfigError
from lowrank_comm.lab.runner.rows import Rows, line, plain, read_lines


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    Rows(tmp_path).append({"key": "a"})
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"key": \n' + file.read_bytes())
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        read_lines(file)


def test_numbers_that_json_does_not_have() -> None:
    assert (
        line({"a": float("inf"), "b": [1.23456789, (1, None)]}, digits=3)
        == '{"a":null,"b":[1.23,[1,null]]}\n'
    )
    assert plain({"x": True, "n": 12345678}, digits=3) == {"x": True, "n": 12345678}
