"""The lab from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowrank_comm.lab.__main__ import main
from tests.support import ROOT


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lowrank_comm.lab", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def by_key(text: str) -> dict[str, Any]:
    """The rows of a file, which are in the order in which they ended."""
    return {row["key"]: row for row in map(json.loads, text.splitlines())}


TINY = """
experiment: speedup
description: Tiny.
settings:
  workers: [1, 2]
  steps: 3
  seeds: [0]
  methods:
    - {name: SGD, section: {compressor: identity}}
    - {name: PowerSGD+, section: {compressor: powersgd_plus, rank: 1, restart_every: 2}}
"""


@pytest.mark.slow
def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes side by side, then nothing left to do, then published; errors are
    one line and exit code 2.
    """
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = command("run", "tiny.yaml", "--output-dir", "out", "--jobs", "2", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 cases are finished" in done.stdout
    assert (tmp_path / "out" / "speedup.md").is_file()
    assert Image.open(tmp_path / "out" / "speedup" / "speedup.png").format == "PNG"
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, "publish", "out", "results") == 0
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    assert "tiny.yaml" in (tmp_path / "results" / "README.md").read_text()
    # a later session goes on from what is published
    assert (
        here(monkeypatch, "run", "tiny.yaml", "--output-dir", "on", "--published", "results") == 0
    )
    taken = by_key((tmp_path / "on" / "rows.jsonl").read_text())
    made = by_key(rows)
    assert taken.keys() == made.keys()
    for name, row in taken.items():
        for key in ("seconds", "made_for", "code", "versions"):
            assert row[key] == made[name][key]
    capsys.readouterr()
    assert here(monkeypatch, "run", "speedap") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: experiment 'speedap' is unknown; did you mean 'speedup'")
