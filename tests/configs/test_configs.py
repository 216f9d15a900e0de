"""Every file in configs/ trains: the real launcher, the real Trainer, two workers, a
few steps of the example.

The configuration of `make train` has a start of its own, by the README's command; the
others follow each other in one start.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_comm.config import SECTION, Section
from tests.support import ROOT
from tests.support.in_turn import BETWEEN

CONFIGS = sorted((ROOT / "configs").glob("ds_*.json"))
STEPS = 3
STARTED_ALONE = "ds_powersgd_plus"
UNCOMPRESSED = {"ds_uncompressed": 1, "ds_fp16_wire": 2}
"""How many times fewer bytes than in float32 a file without a section sends."""


def test_there_is_a_file_for_each_variant() -> None:
    names = {path.stem for path in CONFIGS}
    plus = {f"ds_powersgd_plus{suffix}" for suffix in ("", "_zero1", "_zero2", "_zero3")}
    assert plus | {"ds_powersgd", "ds_balanced", *UNCOMPRESSED} <= names


def test_the_file_without_deepspeed_says_the_same() -> None:
    alone = json.loads((ROOT / "configs" / "powersgd_plus.json").read_text())
    assert alone == json.loads((ROOT / "configs" / "ds_powersgd_plus.json").read_text())[SECTION]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_section_is_valid(path: Path) -> None:
    settings = json.loads(path.read_text())
    if path.stem in UNCOMPRESSED:
        assert SECTION not in settings
        return
    section = Section.parse(settings[SECTION])
    assert settings["gradient_clipping"] == 1.0
    if path.stem == "ds_balanced":
        return
    assert section.rank == 4
    assert section.compressor in path.stem
    if section.compressor == "powersgd_plus":
        # the paper's setting, which the default is for small matrices only
        assert (section.restart_every, section.restart) == (200, "svd")


def launch(script: str, *words: str) -> str:
    """`deepspeed --num_gpus 2 <script> ...` as in the README; returns what it
    printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment["PYTHONPATH"] = str(ROOT)
    command = [
        str(folder / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(port),
        script,
        *words,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def flags(config: Path, output: Path) -> list[str]:
    more = ["--max_steps", str(STEPS), "--held_out_tokens", "4000"]
    return ["--deepspeed", str(config), "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each file's run has a folder of its name."""
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def in_turn(folder: Path) -> dict[str, str]:
    """What the runs printed that have no start of their own, by the file's name."""
    files = [path for path in CONFIGS if path.stem != STARTED_ALONE]
    runs = [" ".join(flags(path, folder / path.stem)) for path in files]
    _, *printed = launch("tests/support/in_turn.py", "train", *runs).split(BETWEEN)
    return {path.stem: part for path, part in zip(files, printed, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains(path: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    if path.stem == STARTED_ALONE:
        printed = launch("examples/train.py", *flags(path, folder / path.stem))
    else:
        printed = request.getfixturevalue("in_turn")[path.stem]
    assert_trained(path, folder / path.stem, printed)


def assert_trained(path: Path, output: Path, printed: str) -> None:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert (output / "loss_vs_bytes.png").stat().st_size > 10_000
    summary = json.loads((output / "summary.json").read_text())
    if path.stem in UNCOMPRESSED:
        assert "nothing is compressed" in printed
        ratio = summary["uncompressed_bytes"] / summary["bytes"]["all-reduce"]
        assert ratio == UNCOMPRESSED[path.stem]
        return
    assert "lowrank_comm: powersgd" in printed
    sent = {kind: size for kind, size in summary["bytes"].items() if kind != "consolidation"}
    ratio = summary["uncompressed_bytes"] / sum(sent.values())
    # Three steps: PowerSGD+ sends the whole of every matrix in the first one, the
    # warm-up in all of them, in int8, and PowerSGD never does. Of the last checkpoint:
    # at ZeRO-3, Trainer saves the model by another
    saves = 2 if path.stem.endswith("zero3") else 1
    assert summary["bytes"]["consolidation"] < saves * summary["uncompressed_bytes"] / STEPS
    assert ratio > {"ds_powersgd": 15, "ds_balanced": 3.5}.get(path.stem, 2)


@pytest.mark.slow
def test_the_example_alone_without_a_launcher(tmp_path: Path) -> None:
    """One process and no process group: as an IDE or a debugger starts it."""
    launchers = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    environment = {k: v for k, v in os.environ.items() if k not in launchers} | {
        "PYTHONPATH": str(ROOT)
    }
    words = [
        "--compression",
        "configs/powersgd_plus.json",
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        str(STEPS),
    ]
    command = [
        sys.executable,
        "examples/train.py",
        *words,
        "--held_out_tokens",
        "4000",
        "--eval_on_start",
        "False",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "over 1 worker" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
