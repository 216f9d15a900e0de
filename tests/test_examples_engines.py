"""The example that trains under every engine runs as its docstring says, and the engines agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*flags: str, ranks: int = 4) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*launcher, "examples/train_engines.py", "--steps", "3", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def last_loss(printed: str) -> float:
    return float(re.findall(r"loss of rank 0 after 3 steps ([\d.]+)", printed)[0])


@pytest.mark.slow
def test_all_engines_end_at_the_same_loss() -> None:
    plain = run("--engine", "plain")
    assert "times fewer" in plain
    for engine in ("ddp", "fsdp2", "zero1", "zero3"):
        printed = run("--engine", engine)
        assert last_loss(printed) == pytest.approx(last_loss(plain), abs=2e-3), engine
        assert "times fewer" in printed


@pytest.mark.slow
def test_two_levels_of_whole_matrices_agree_too() -> None:
    flags = ("--shard-scope", "matrix", "--accumulate", "2")
    hsdp = run("--engine", "hsdp", *flags)
    assert "MB inside the node" in hsdp
    for engine in ("plain", "ddp", "zero2"):
        printed = run("--engine", engine, "--two-levels", *flags)
        assert last_loss(printed) == pytest.approx(last_loss(hsdp), abs=2e-3), engine
        assert "2 nodes of 2 ranks" in printed


@pytest.mark.slow
def test_uncompressed_and_wrong_flags() -> None:
    assert "times fewer" not in run("--engine", "ddp", "--no-compression", ranks=2)
    with pytest.raises(AssertionError, match="no averaging of its own"):
        run("--engine", "plain", "--no-compression", ranks=1)
    with pytest.raises(AssertionError, match="cannot be cut"):
        run("--engine", "hsdp", "--nodes", "3", ranks=4)
