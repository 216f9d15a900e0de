"""`python -m lowrank_comm.config`: the schema in git is what it writes."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT

FILE = ROOT / "configs" / "lowrank_comm.schema.json"


def test_the_file_is_what_the_command_writes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_comm.config", "schema"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == FILE.read_text(encoding="utf-8"), "run make schema"
