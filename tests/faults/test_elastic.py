"""torchrun with --max-restarts: a worker dies and all start again by themselves; or the
job comes back with fewer ranks. Either way the run ends as one that nothing has struck.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.campaign import TOLERANCE, log_of
from tests.support import ROOT

STEPS = 12
HERE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
DYING = {"kind": "SIGKILL", "rank": 1, "point": "between", "step": 8}


def torchrun(
    folder: Path, ranks: int, restarts: int = 0, fault: dict[str, Any] | None = None
) -> int:
    """Train under DDP on so many ranks; the exit code, after so many restarts."""
    job = {"engine": "ddp", "folder": str(folder), "steps": STEPS, "every": 3, "fault": fault}
    flags = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    flags += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    flags += ["--local-addr", "127.0.0.1"]
    words = ["-m", "torch.distributed.run", *flags, "-m", "tests.faults.worker", json.dumps(job)]
    one = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=os.environ | HERE, start_new_session=True
    )
    try:
        return one.wait(150)
    finally:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)


def starts(folder: Path) -> list[tuple[int, int]]:
    """World size and first step of every start."""
    lines = log_of(folder, 0)
    return [(line["world"], line["first"]) for line in lines if line["event"] == "start"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the uninterrupted run of two ranks ends with."""
    folder = tmp_path_factory.mktemp("whole")
    assert torchrun(folder, 2) == 0
    return torch.load(folder / "final.pt")


def assert_equal(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    """The parameters are the uninterrupted run's: float64, and the same gradients."""
    found = torch.load(folder / "final.pt")
    for name, one in whole.items():
        apart = float((found[name] - one).abs().max() / one.abs().max())
        assert apart <= TOLERANCE, (name, apart)


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(
    tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    assert torchrun(tmp_path, 2, restarts=2, fault=DYING) == 0
    assert starts(tmp_path) == [(2, 1), (2, 7)]
    assert_equal(tmp_path, whole)


@pytest.mark.slow
def test_a_job_comes_back_with_fewer_ranks(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """The error memory of two ranks was averaged by the save; one rank has it all."""
    assert torchrun(tmp_path, 2, fault=DYING) != 0
    assert torchrun(tmp_path, 1) == 0
    assert starts(tmp_path) == [(2, 1), (1, 7)]
    assert_equal(tmp_path, whole)
