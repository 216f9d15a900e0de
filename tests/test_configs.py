"""Every file in configs/ trains: the real launcher, the real Trainer, two workers, a few steps of the example."""

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

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("ds_*.json"))
STEPS = 3


def test_there_is_a_file_for_each_variant() -> None:
    names = {path.stem for path in CONFIGS}
    plus = {f"ds_powersgd_plus{suffix}" for suffix in ("", "_zero1", "_zero2", "_zero3")}
    assert plus | {"ds_powersgd", "ds_uncompressed"} <= names


def test_the_file_without_deepspeed_says_the_same() -> None:
    alone = json.loads((ROOT / "configs" / "powersgd_plus.json").read_text())
    assert alone == json.loads((ROOT / "configs" / "ds_powersgd_plus.json").read_text())[SECTION]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_section_is_valid(path: Path) -> None:
    settings = json.loads(path.read_text())
    if path.stem == "ds_uncompressed":
        assert SECTION not in settings
        return
    section = Section.parse(settings[SECTION])
    assert section.rank == 4
    assert section.compressor in path.stem
    if section.compressor == "powersgd_plus":
        assert section.restart_every == 200
    assert settings["gradient_clipping"] == 1.0


def launch(config: Path, output: Path, *flags: str) -> str:
    """`deepspeed --num_gpus 2 examples/train.py ...` as in the README; returns what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "examples/train.py"]
    command += ["--deepspeed", str(config), "--output_dir", str(output), "--max_steps", str(STEPS), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_trains(path: Path, tmp_path: Path) -> None:
    printed = launch(path, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert (tmp_path / "loss_vs_bytes.png").stat().st_size > 10_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    if path.stem == "ds_uncompressed":
        assert "nothing is compressed" in printed
        return
    assert "lowrank_comm: powersgd" in printed
    sent = {kind: size for kind, size in summary["bytes"].items() if kind != "consolidation"}
    ratio = summary["uncompressed_bytes"] / sum(sent.values())
    # Three steps: PowerSGD+ sends the whole of every matrix in the first one, PowerSGD never does.
    saves = 2 if path.stem.endswith("zero3") else 1  # of the last checkpoint: at ZeRO-3, Trainer saves the model by another
    assert summary["bytes"]["consolidation"] < saves * summary["uncompressed_bytes"] / STEPS
    assert ratio > (15 if path.stem == "ds_powersgd" else 2)
