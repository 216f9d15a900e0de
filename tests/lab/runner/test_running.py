"""Runs go on where they stopped, and refuse rows of other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from lowrank_comm import ConfigError, LowRankCommError
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.runner import running
from lowrank_comm.lab.runner.pages import published_text
from lowrank_comm.lab.runner.rows import line, read_lines
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from tests.support.toy_experiment import Toy, toy_preset


def test_a_run_goes_on_where_it_stopped(toy: type[Toy], tmp_path: Path) -> None:
    first = run_preset(toy_preset(), tmp_path, only="case[01]")
    assert (first.finished, first.total, toy.ran) == (2, 3, ["case0", "case1"])
    again = run_preset(toy_preset(), tmp_path)
    assert (again.finished, again.failed, toy.ran) == (3, {}, ["case0", "case1", "case2"])
    rows = ordered_rows(toy_preset(), tmp_path)
    assert [(row["key"], row["result"]["square"]) for row in rows] == [
        ("case0", 0.0),
        ("case1", 1.0),
        ("case2", 4.0),
    ]
    # not finite
    assert rows[0]["result"]["lost"] is None


def test_a_case_that_fails_is_run_again_and_does_not_stop_the_others(
    toy: type[Toy], tmp_path: Path
) -> None:
    ended = run_preset(toy_preset(broken=1), tmp_path)
    assert ended.finished == 2
    assert "broken on purpose" in ended.failed["case1"]
    toy.ran.clear()
    run_preset(toy_preset(broken=1), tmp_path)
    assert toy.ran == ["case1"]


def test_a_line_that_a_kill_has_cut_off_is_run_again(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    toy.ran.clear()
    assert run_preset(toy_preset(), tmp_path).finished == 3
    assert toy.ran == ["case2"]
    assert len(read_lines(file)) == 3
    assert [row["key"] for row in read_lines(file)] == ["case0", "case1", "case2"]


def test_rows_of_other_settings_are_refused_with_the_fix(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"3 rows that were made for other settings.*--output-dir.*delete that file",
    ):
        run_preset(toy_preset(scale=2.0), tmp_path)


def test_rows_of_another_version_are_kept_and_named(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_preset(toy_preset(), tmp_path, only="case[01]")
    monkeypatch.setattr(running, "sources_hash", lambda file: "another")
    console = Console(record=True, width=300)
    toy.ran.clear()
    run_preset(toy_preset(), tmp_path, console=console)
    assert toy.ran == ["case2"]
    assert (
        "2 of 2 finished cases were run by another version of the sources (the first: case0)"
        in console.export_text()
    )
    rows = read_lines(tmp_path / "rows.jsonl")
    assert len({row["code"] for row in rows}) == 2
    told = json.loads(published_text({}, rows).splitlines()[0])["meta"]["code"]
    assert told == sorted({row["code"] for row in rows})
    (tmp_path / "rows.jsonl").write_text(
        "".join(line({k: v for k, v in row.items() if k != "code"}) for row in rows)
    )
    run_preset(toy_preset(), tmp_path, console=console)
    assert "3 of 3 finished cases were run by another version" in console.export_text()


def test_under_torchrun_a_case_that_fails_ends_the_call(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that went on to the next case would meet the others in another
    collective.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LowRankCommError, match=r"case1 failed(.|\n)*broken on purpose"):
        run_preset(toy_preset(broken=1), tmp_path)
    assert toy.ran == ["case0", "case1"]
    assert [row["key"] for row in read_lines(tmp_path / "rows.jsonl")] == ["case0"]
    with pytest.raises(ConfigError, match="--jobs 2 under torchrun"):
        run_preset(toy_preset(), tmp_path, jobs=2)


def test_a_note_that_was_cut_off_is_named(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    note = tmp_path / "run.json"
    note.write_text(note.read_text()[:40])
    with pytest.raises(ConfigError, match=r"run\.json is no JSON.*delete it"):
        run_preset(toy_preset(), tmp_path)
    note.unlink()
    assert run_preset(toy_preset(), tmp_path).finished == 3
    assert not list(tmp_path.glob("*.new"))


def test_bad_calls_are_refused(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="'nothing' fits no case; the keys are case0, case1, case2"
    ):
        run_preset(toy_preset(), tmp_path, only="nothing")
    with pytest.raises(ConfigError, match="--jobs 0 must be at least 1"):
        run_preset(toy_preset(), tmp_path, jobs=0)
    monkeypatch.setattr(toy, "cases", lambda self, settings: [Case("a"), Case("a")])
    with pytest.raises(ConfigError, match="two cases have the key 'a'"):
        run_preset(toy_preset(), tmp_path)
