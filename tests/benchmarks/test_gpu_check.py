"""benchmarks/gpu_check.py, on the CPU: all checks are made on the path that an
accelerator takes, and processes that break or stay end as rows of the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.evidence import read
from benchmarks.gpu import launch
from benchmarks.gpu.launch import Row, made
from benchmarks.gpu.parts import COSTS, EACH, ONE, SEVERAL, TIMES, Part, checks_of, parts
from lowrank_comm.lab.runner.sources import sources_hash
from tests.support import ROOT

# what no program of ours needs on a machine with a GPU
EXTRAS = (
    *("numpy", "scipy", "sklearn", "matplotlib", "PIL", "rich", "typer", "yaml", "pytest"),
    *("transformers", "deepspeed", "accelerate", "lightning", "peft"),
)
MODULE = "tests.support.gpu_checks"


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process; its modules are looked for in `path` first."""
    environment = os.environ | {"PYTHONPATH": str(path or ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=960
    )


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_checks_on_a_cpu(tmp_path: Path) -> None:
    """A minute, or many on a busy machine, and none is skipped for want of time."""
    target = tmp_path / "gpu.json"
    done = run("--device", "cpu", "--minutes", "15", "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    evidence = read(target)
    # what is measured on a CPU is not published
    assert evidence["quick"]
    assert evidence["sources"] == sources_hash(
        ROOT / "benchmarks" / "gpu_check.py", *(ROOT / one for one in gpu_check.PROCESSES)
    )
    rows = [Row(**row) for row in evidence["results"]["checks"]]
    assert [(row.part, row.check) for row in rows] == [
        (part.name, check.name) for part in parts("cpu", 0) for check in checks_of(part.name)
    ]
    for row in rows:
        if row.part == ONE and ("HSDP" in row.check or "two levels" in row.check):
            assert (row.status, row.text[:13]) == ("skipped", "needs 4 ranks")
        else:
            assert row.status == "passed", row
            assert row.figures, row
    found = {row.check: row.figures for row in rows if row.part in (COSTS, TIMES)}
    assert found["waits of the host in a step"]["waits"] == 2
    assert found["waits of the host in a step with svd restarts"]["restarts"] == 29
    assert found["profile of a step"]["torch_operations"] > found["launches of a step"]["launches"]
    step = found["time of a step, 1.3B, rank 32"]
    assert set(step["milliseconds"]) == {"ours", "hook", "copy"}
    assert step["ratios"]["over_copy"]["low"] > 1
    used = evidence["results"]["parts"]
    assert [part["name"] for part in used] == [ONE, SEVERAL, COSTS, TIMES]
    assert sum(part["seconds"] for part in used) < 15 * 60


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_it_needs_no_package_beside_the_librarys_own(tmp_path: Path) -> None:
    """In no process can another one be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    )
    target = tmp_path / "gpu.json"
    only = ("--only", "launches of a step with", "--json", str(target))
    done = run("--device", "cpu", *only, path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in read(target)["results"]["checks"]] == ["passed"] * 2


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        assert gpu_check.main(["--device", "cpu"]) == 2
    assert "has no safetensors: python -m pip install safetensors" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu", "--only", "no such check"]) == 2
    assert "no check has 'no such check' in its name" in capsys.readouterr().err


def test_several_ranks_of_one_gpu_use_gloo_and_more_gpus_have_a_part_of_their_own() -> None:
    def of(gpus: int) -> list[tuple[str, str, int]]:
        return [(part.name, part.backend, part.ranks) for part in parts("cuda", gpus)]

    one = [(ONE, "nccl", 1), (SEVERAL, "gloo", 4), (COSTS, "nccl", 1), (TIMES, "nccl", 1)]
    assert of(1) == one
    assert of(8) == [*one[:2], (EACH, "nccl", 8), *one[2:]]


@pytest.mark.slow
def test_checks_that_break_are_rows_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE", 2.0)
    names = ["fine", "wrong", "left_out", "raising", "dying", "last"]
    rows = list(made(Part("any", "gloo", 3, 1), "cpu", names, 200.0, tmp_path, MODULE))
    assert [row.check for row in rows] == names
    ended = {row.check: (row.status, row.text) for row in rows}
    assert ended["fine"] == ended["last"] == ("passed", "1")
    assert ended["wrong"] == ("failed", "rank 2: difference 1.0")
    assert ended["left_out"] == ("skipped", "needs what is not there")
    # not the words of those that waited for it
    assert ended["raising"] == ("failed", "rank 1: ZeroDivisionError: by zero")
    assert ended["dying"][0] == "failed"
    assert "rank 0" in ended["dying"][1]
    assert rows[0].figures == {"ranks": 3.0}
    assert rows[1].figures == {"difference": 1.0}
    # of these rows a file can be made
    assert json.dumps([vars(row) for row in rows])
    table = gpu_check.table(rows)
    assert "2 passed, 3 failed, 1 skipped" in table
    assert "FAILED  any, dying" in table


@pytest.mark.slow
def test_a_check_beyond_the_time_is_ended_and_what_comes_after_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE", 1.0)
    part, names = Part("any", "gloo", 1, 1), ["endless", "last"]
    endless, last = made(part, "cpu", names, 15.0, tmp_path, MODULE)
    assert (endless.check, endless.status) == ("endless", "skipped")
    # unless the machine is so busy that it did not even begin
    assert endless.text in ("its part's time was up before its end", last.text)
    assert (last.status, last.text) == ("skipped", "no time: this part has 15 s")


def test_processes_that_do_not_begin_are_not_started_again(tmp_path: Path) -> None:
    rows = list(
        made(Part("no start", "gloo", 1, 1), "cpu", ["a", "b", "c"], 60.0, tmp_path, MODULE)
    )
    assert [row.status for row in rows] == ["failed", "skipped", "skipped"]
    assert "these processes do not begin" in rows[0].text
    assert rows[1].text == "its processes do not start"
