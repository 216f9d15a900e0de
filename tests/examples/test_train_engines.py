"""The example that trains under every engine runs as its docstring says, and the
engines agree.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from tests.support import ROOT
from tests.support.gloo import GlooPool
from tests.support.in_turn import BETWEEN

pytest.importorskip("transformers")
import train_engines


def run(script: str, *words: str, ranks: int = 4) -> str:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    done = subprocess.run(
        [*launcher, script, *words],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What the example printed in each run of four processes, by its flags."""
    runs = [
        *(f"--engine {engine}" for engine in ONE_LEVEL),
        *(f"--engine {engine}" for engine in TWO_LEVELS),
    ]
    _, *parts = run(
        "tests/support/in_turn.py", "train_engines", *(f"{flags} --steps 3" for flags in runs)
    ).split(BETWEEN)
    return dict(zip(runs, parts, strict=True))


def last_loss(printed: str) -> float:
    return float(re.findall(r"loss of rank 0 after 3 steps ([\d.]+)", printed)[0])


ONE_LEVEL = ("plain", "ddp", "fsdp2", "zero1", "zero3")
WHOLE = "--shard-scope matrix --accumulate 2"
TWO_LEVELS = (
    f"hsdp {WHOLE}",
    *(f"{engine} --two-levels {WHOLE}" for engine in ("plain", "ddp", "zero2")),
)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONE_LEVEL)
def test_all_engines_end_at_the_same_loss(printed: dict[str, str], engine: str) -> None:
    of_engine = printed[f"--engine {engine}"]
    assert last_loss(of_engine) == pytest.approx(last_loss(printed["--engine plain"]), abs=2e-3)
    assert "times fewer" in of_engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", TWO_LEVELS)
def test_two_levels_of_whole_matrices_agree_too(printed: dict[str, str], engine: str) -> None:
    of_engine = printed[f"--engine {engine}"]
    assert last_loss(of_engine) == pytest.approx(
        last_loss(printed[f"--engine {TWO_LEVELS[0]}"]), abs=2e-3
    )
    assert "MB inside the node" in of_engine
    assert "2 nodes of 2 ranks" in of_engine


@pytest.mark.slow
def test_the_scripts_own_start_and_no_compression() -> None:
    printed = run(
        "examples/train_engines.py", "--engine", "ddp", "--no-compression", "--steps", "3", ranks=2
    )
    assert "times fewer" not in printed
    assert last_loss(printed) > 0


def test_a_plain_model_has_no_averaging_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_engines.py", "--engine", "plain", "--no-compression"])
    with pytest.raises(SystemExit) as ended:
        train_engines.main()
    assert ended.value.code == 2
    assert "no averaging of its own" in capsys.readouterr().err


def cut_into_three(rank: int) -> object:
    """What the script ends with."""
    with pytest.raises(SystemExit) as ended:
        train_engines.wrap(
            Namespace(engine="hsdp", nodes=3), torch.nn.Linear(2, 2), torch.device("cpu")
        )
    return ended.value.code


def test_ranks_that_make_no_whole_nodes(gloo: GlooPool) -> None:
    assert (
        gloo.run(cut_into_three, 4) == ["--nodes 3: 4 ranks cannot be cut into that many nodes"] * 4
    )
