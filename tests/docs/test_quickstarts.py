"""Every script and every command of docs/quickstarts.md runs, as it stands on the page.

A script's name stands in a comment above its block; the blocks without a language are
commands. Commands of a section run in their order in one folder that has all of the
page's files. On this machine they get what the page says for one without GPUs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "quickstarts.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
BLOCK = re.compile(r"(?:^<!-- ([\w.]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""Name of the file (or nothing), language (or nothing: commands), text."""
FILES = {name: text for name, _, text in BLOCK.findall(PAGE) if name}
COMMANDS = {
    title: [
        line
        for _, language, block in BLOCK.findall(text)
        if not language
        for line in block.splitlines()
    ]
    for title, text in SECTIONS.items()
}
ELSEWHERE = {"SLURM": "tests/examples/test_slurm.py runs the same files on a real cluster"}
RUN = [title for title, commands in COMMANDS.items() if commands and title not in ELSEWHERE]


def environment(folder: Path, title: str) -> dict[str, str]:
    """What the page says for a machine without GPUs; and the launchers of this Python
    first, as with an activated venv.
    """
    # torch's gloo aborts a process that ends within milliseconds of its last
    # collective; see test_readme.run.
    (folder / "sitecustomize.py").write_text(
        "import atexit, threading\natexit.register(threading.Event().wait, 0.5)\n"
    )
    of_engine = (
        {"DS_ACCELERATOR": "cpu"} if "DeepSpeed" in title else {"ACCELERATE_USE_CPU": "true"}
    )
    own = of_engine | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "ACCELERATE_USE_CPU")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | own | {"PATH": path, "PYTHONPATH": f"{folder}:{ROOT}"}


def run_section(title: str, folder: Path) -> list[str]:
    """What each command of a section printed."""
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    printed = []
    for k, command in enumerate(COMMANDS[title]):
        words = shlex.split(command)
        # the launchers' own default may be taken by another test
        port = str(29650 + 7 * list(COMMANDS).index(title) + k)
        where = ["--master_port", port] if words[0] in ("torchrun", "deepspeed") else []
        done = subprocess.run(
            words[:1] + where + words[1:], cwd=folder, env=environment(folder, title),
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-5000:]}"
        printed.append(done.stdout)
    return printed


def ratio_and_loss(printed: str) -> tuple[float, float]:
    """From a script's last line."""
    found = re.search(r"loss (\d+\.\d+), (\d+\.\d+) times fewer bytes", printed)
    assert found, printed
    return float(found.group(2)), float(found.group(1))


def losses(folder: Path) -> list[dict[str, float]]:
    """Trainer's own log of the last checkpoint."""
    state = max(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    return [log for log in json.loads(state.read_text())["log_history"] if "loss" in log]


def went_on_from_step_10(first: str, resumed: str) -> None:
    """Of the logs after steps 5, 10, 15 and 20, the resumed run prints the last two,
    and the same that the first printed.
    """
    whole, rest = (re.findall(r"'loss': '([\d.]+)'", printed) for printed in (first, resumed))
    assert (len(whole), len(rest)) == (4, 2)
    assert [float(loss) for loss in rest] == pytest.approx(
        [float(loss) for loss in whole[2:]], rel=1e-3
    )


def test_the_page_has_a_section_for_every_way_in() -> None:
    assert {
        "A plain loop",
        "DDP",
        "FSDP2 and HSDP",
        "DeepSpeed without Trainer",
        "DeepSpeed with Trainer",
    } <= set(RUN)
    assert {"Trainer under torchrun", "Accelerate", "PEFT", "Lightning"} <= set(RUN)
    commands = " ".join(line for lines in COMMANDS.values() for line in lines)
    assert all(name in commands for name in FILES), "a file of the page is never run"
    for name in re.findall(r"examples/slurm/\w+\.sbatch", SECTIONS["SLURM"]):
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_a_plain_loop(tmp_path: Path) -> None:
    (printed,) = run_section("A plain loop", tmp_path)
    assert "over 2 workers, plain model" in printed
    ratio, loss = ratio_and_loss(printed)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["compression/ratio"] > 10
    assert ratio > 2
    assert loss < lines[0]["loss"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the section on DDP once it has run, and what it printed."""
    folder = tmp_path_factory.mktemp("ddp")
    (printed,) = run_section("DDP", folder)
    return folder, printed


@pytest.mark.slow
def test_ddp(ddp: tuple[Path, str]) -> None:
    folder, printed = ddp
    assert "over 2 workers, DDP" in printed
    ratio, loss = ratio_and_loss(printed)
    assert ratio > 2
    assert loss < 2.2
    saves = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saves == ["save-00000001", "save-00000002"]
    assert (folder / "checkpoints" / saves[1] / "state.pt").stat().st_size > 100_000


@pytest.mark.slow
def test_fsdp2_and_hsdp(ddp: tuple[Path, str], tmp_path: Path) -> None:
    """They go on from what train_ddp.py has saved in the same folder."""
    shutil.copytree(ddp[0] / "checkpoints", tmp_path / "checkpoints")
    hsdp, flat = run_section("FSDP2 and HSDP", tmp_path)
    assert "over 2 nodes of 2 ranks, FSDP2, HSDP" in hsdp
    assert "over 2 workers, FSDP2, flat" in flat
    for printed in (hsdp, flat):
        ratio, loss = ratio_and_loss(printed)
        assert ratio > 2
        assert loss < 2.2
    # each went on from the one before
    assert ratio_and_loss(hsdp)[1] < ratio_and_loss(ddp[1])[1]
    assert ratio_and_loss(flat)[1] < ratio_and_loss(hsdp)[1]


@pytest.mark.slow
def test_deepspeed_without_trainer(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (printed,) = run_section("DeepSpeed without Trainer", tmp_path)
    assert "over 2 workers, DeepSpeed" in printed
    assert "ZeRO stage 2" in printed
    ratio, loss = ratio_and_loss(printed)
    assert ratio > 2
    assert loss < 2.2
    assert list((tmp_path / "checkpoints").glob("*/lowrank_comm-*.safetensors"))


@pytest.mark.slow
def test_deepspeed_with_trainer(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    first, resumed = run_section("DeepSpeed with Trainer", tmp_path)
    for printed in (first, resumed):
        assert "over 2 workers, DeepSpeed" in printed
        assert "compression/ratio" in printed
    went_on_from_step_10(first, resumed)
    of_run = losses(tmp_path / "out_ds")
    assert of_run[-1]["loss"] < of_run[0]["loss"]


@pytest.mark.slow
def test_trainer_under_torchrun(tmp_path: Path) -> None:
    first, resumed, own = run_section("Trainer under torchrun", tmp_path)
    for printed in (first, resumed, own):
        assert "over 2 workers, DDP" in printed
        assert "compression/captured_energy" in printed
    went_on_from_step_10(first, resumed)
    of_run = losses(tmp_path / "out")
    assert [log["step"] for log in of_run] == [5, 10, 15, 20]
    assert of_run[-1]["loss"] < of_run[0]["loss"]
    assert all(log["compression/ratio"] > 1 for log in of_run)
    assert losses(tmp_path / "out_own")[-1]["loss"] < losses(tmp_path / "out_own")[0]["loss"]


@pytest.mark.slow
def test_accelerate(tmp_path: Path) -> None:
    (printed,) = run_section("Accelerate", tmp_path)
    assert "over 2 workers, DDP" in printed
    ratio, loss = ratio_and_loss(printed)
    assert ratio > 2
    assert loss < 2.2
    assert (tmp_path / "state" / "optimizer.bin").is_file()


@pytest.mark.slow
def test_peft(tmp_path: Path) -> None:
    (printed,) = run_section("PEFT", tmp_path)
    assert "over 2 workers, DDP" in printed
    low_rank = re.search(r"low-rank: (\d+) matrices", printed)
    assert low_rank, printed
    assert int(low_rank.group(1)) == 12
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert losses(tmp_path / "out_peft")[-1]["loss"] < losses(tmp_path / "out_peft")[0]["loss"]


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    (printed,) = run_section("Lightning", tmp_path)
    assert "over 2 workers, DDP" in printed
    found = re.search(r"(\d+\.\d+) times fewer bytes", printed)
    assert found, printed
    assert float(found.group(1)) > 2
    assert "compression/ratio" in next((tmp_path / "logs").glob("**/metrics.csv")).read_text()


def test_the_table_of_adapters() -> None:
    rows = re.findall(r"^\| (8|64) \| (.+) \|$", SECTIONS["PEFT"], re.MULTILINE)
    assert len(rows) == 2
    for rank, cells in rows:
        for r, cell in zip((1, 2, 4, 8), cells.split(" | "), strict=True):
            saved = int(rank) * 4096 / (r * (int(rank) + 4096))
            assert f"{saved:.0f}x" in cell or f"{saved:.1f}x" in cell, (rank, r, saved, cell)
            assert ("dense" in cell) == (saved <= 2)
