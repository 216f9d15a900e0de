"""The sbatch files of examples/slurm run as they are on a real SLURM cluster of two
nodes, and survive interruptions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, slurm_lab
from tests.support.needs import require
from tests.support.slurm_lab import SlurmLab, free_ports

FOLDER = ROOT / "examples" / "slurm"
# What this machine is, not what the job is: two threads for all, no GPU, and nodes that
# are all on the loopback.
HERE = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "VENV": sys.prefix,
}
QUICK = ("--held_out_tokens", "4000", "--eval_on_start", "False")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmLab]:
    require(slurm_lab.missing())
    with SlurmLab(nodes=2) as lab:
        yield lab


@pytest.fixture
def submit(slurm: SlurmLab, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits a file with sbatch's flags and the script's; the job is cancelled at the
    end, should it still be there.
    """
    jobs = []

    def submit(file: str, *flags: str, sbatch: tuple[str, ...] = (), **environment: str) -> str:
        given = {
            **HERE,
            "OUTPUT_DIR": str(tmp_path / "run"),
            "MASTER_PORT": str(free_ports(1)[0]),
            **environment,
        }
        words = (*sbatch, "--output", str(tmp_path / "job.out"), str(FOLDER / file), *flags, *QUICK)
        jobs.append(slurm.submit(*words, env=given, cwd=ROOT))
        return jobs[-1]

    yield submit
    for job in jobs:
        slurm.call("scancel", "--full", job, check=False)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The steps in the log of a run."""
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_complete(slurm: SlurmLab, job: str, folder: Path, steps: int, restarts: int = 0) -> str:
    """The job ends well, each step is in the log once, and the table was printed; gives
    what the job wrote.
    """
    ended = slurm.wait(job, timeout=280)
    printed = (folder / "job.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(restarts)), printed[-6000:]
    assert [line["step"] for line in log_of(folder)] == list(range(1, steps + 1))
    assert "Training, and what it sent" in printed
    return printed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_as_many_processes_as_gpus_and_two_levels(
    slurm: SlurmLab, submit: Callable[..., str], tmp_path: Path
) -> None:
    """SLURM grants two GPUs a node (that nobody uses), and the model is sharded in the
    nodes: HSDP on 2 x 2 processes.
    """
    sharding = ("--fsdp_size", "2", "--dp_replicate_size", "2")
    job = submit("torchrun.sbatch", "--max_steps", "4", *sharding, sbatch=("--gpus-per-node", "2"))
    printed = assert_complete(slurm, job, tmp_path, steps=4)
    assert "2 nodes of 2 processes" in printed
    assert "over 2 nodes of 2 ranks" in printed
    assert "FSDP2, HSDP" in printed


def requeue(slurm: SlurmLab, job: str) -> None:
    """What an administrator does, or SLURM when a node has failed."""
    slurm.call("scontrol", "requeue", job)


def time_is_nearly_up(slurm: SlurmLab, job: str) -> None:
    """What SLURM does before the time limit (#SBATCH --signal=B:USR1)."""
    slurm.call("scancel", "--batch", "--signal=USR1", job)


def preempt(slurm: SlurmLab, job: str) -> None:
    """A more important job needs the nodes."""
    slurm.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "interrupt"),
    [
        ("deepspeed.sbatch", requeue),
        ("torchrun.sbatch", time_is_nearly_up),
        ("accelerate.sbatch", preempt),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_runs_on_two_nodes_and_goes_on_after_an_interruption(
    slurm: SlurmLab,
    submit: Callable[..., str],
    tmp_path: Path,
    file: str,
    interrupt: Callable[[SlurmLab, str], None],
) -> None:
    job = submit(file, "--max_steps", "40", SAVE_STEPS="5")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert slurm.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), (
            tmp_path / "job.out"
        ).read_text()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    interrupt(slurm, job)

    printed = assert_complete(slurm, job, tmp_path, steps=40, restarts=1)
    starts = printed.split(f"job {job}, start ")[1:]
    assert [start[:1] for start in starts] == ["1", "2"], printed[-6000:]
    for start in starts:
        assert "2 nodes of 1 processes" in start
        # Accelerate makes DDP of FSDP2 where there is no accelerator.
        assert f"over 2 workers, {'DeepSpeed' if file == 'deepspeed.sbatch' else 'DDP'}" in start
    assert "powersgd_plus rank 4" in starts[1] and "factors" in starts[1]
    found = re.search(r"start 2: .* going on from \S+/checkpoint-(\d+)\n", printed)
    assert found, printed[-6000:]
    assert 5 <= int(found[1]) < 40
    # The compressor's own state came back, too. Without it the compressor would count
    # its steps from 0 and restart all matrices in its first step, a second time in the
    # log's totals.
    assert "the error memory starts from zero" not in printed
    first, *_, last = log_of(tmp_path)
    assert first["restarts"] == last["restarts"] > 0
    if file == "deepspeed.sbatch":
        assert list(tmp_path.glob("run/checkpoint-40/**/lowrank_comm-*.safetensors"))


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.s*")), ids=lambda file: file.name)
def test_files_are_sound(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    named = re.findall(r"(?:examples|configs)/[\w/]+\.\w+", file.read_text())
    assert named or file.suffix == ".sh"
    for name in named:
        assert (ROOT / name).is_file(), name
    if file.suffix == ".sbatch":
        for flag in ("--requeue", "--open-mode=append", "--signal=B:USR1", "--ntasks-per-node=1"):
            assert re.search(rf"^#SBATCH {flag}", file.read_text(), re.M), flag


def test_wrong_places_are_told(tmp_path: Path) -> None:
    """Flags that would hide the checkpoint are refused before anything starts."""
    words = ["bash", str(FOLDER / "job.sh"), "--output_dir", "elsewhere"]
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_NAME": "a", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "OUTPUT_DIR=" in done.stdout


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    """A job may be killed while trainer_state.json is written; the checkpoint before it
    is whole.
    """
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho NodeName=n0 NodeAddr=127.0.0.1 x\n")
    scontrol.chmod(0o755)
    state = json.dumps({"global_step": 5, "log_history": [{"loss": 1.0}]})
    for name, text in (
        ("checkpoint-5", state),
        ("checkpoint-10", state[:-3]),
        ("checkpoint-15", None),
    ):
        (tmp_path / "run" / name).mkdir(parents=True)
        if text is not None:
            (tmp_path / "run" / name / "trainer_state.json").write_text(text)
    environment = {
        "PATH": f"{scontrol.parent}:/usr/bin:/bin",
        "VENV": sys.prefix,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    environment |= {"SLURM_JOB_NAME": "a", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n0"}
    words = ["bash", "-c", f'source "{FOLDER / "job.sh"}"; echo "$CHECKPOINT"']
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "checkpoint-5")
