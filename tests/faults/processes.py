"""The ranks of one start of a run: forked, watched, and ended if they do not end."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.worker import WORLD, Job

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Ended:
    """How a start of a run ended.

    codes: exit codes by rank (minus the signal). seconds: from the fault to each rank's
        end (0 without a fault). hung: ranks that had to be killed. said: the last line
        that each rank wrote.
    """

    codes: list[int]
    seconds: list[float]
    hung: list[int]
    said: list[str]


def _context() -> Any:
    """The fork server's; these are read when it imports torch and DeepSpeed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    return context


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _child(job: str, environment: dict[str, str], output: str, namespace: str | None) -> None:
    """Be a rank: output to a file, and in a host's network where there is one."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if namespace is not None:
        with open(f"/run/netns/{namespace}") as network:  # noqa: PTH123
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
    from tests.faults import worker

    try:
        worker.main(worker.Job.parse(job))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)


def start(
    job: Job, attempt: int, world: int | None = None, lab: Any = None, patience: float = 240.0
) -> Ended:
    """Start a job's ranks and wait for all of them to end.

    Args:
        job: what they do.
        attempt: how many starts of this run there were before; names the outputs.
        world: how many ranks; default: the engine's.
        lab: a `netlab.Lab`, whose hosts the ranks are.
        patience: seconds until the ranks of a run that no fault strikes are killed.
    """
    world = world or WORLD[job.engine]
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"output-{attempt}-{rank}.txt" for rank in range(world)]
    place = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": "1" if lab else str(world),
        "MASTER_ADDR": lab.address(0) if lab else "127.0.0.1",
        "MASTER_PORT": str(29500 if lab else free_port()),
        "GLOO_SOCKET_IFNAME": "eth0" if lab else "lo",
        "ACCELERATE_USE_CPU": "" if job.engine.startswith("zero") else "true",
    }
    words, context = json.dumps(asdict(job)), _context()
    processes = []
    for rank in range(world):
        mine = place | {"RANK": str(rank), "LOCAL_RANK": "0" if lab else str(rank)}
        namespace = f"{lab.name}{rank}" if lab else None
        one = context.Process(target=_child, args=(words, mine, str(outputs[rank]), namespace))
        one.start()
        processes.append(one)
    ends, hung = _wait(processes, job, patience)
    struck = struck_at(folder)
    return Ended(
        codes=[one.exitcode for one in processes],
        seconds=[0.0 if struck is None else max(0.0, end - struck) for end in ends],
        hung=hung,
        said=[_last_line(output) for output in outputs],
    )


def struck_at(folder: Path) -> float | None:
    """When the fault struck, if it has."""
    try:
        return float(json.loads((folder / "fault.json").read_text())["time"])
    except (OSError, ValueError, KeyError):
        return None


def limit(job: Job) -> float:
    """Seconds after a fault within which every rank must have ended, or the run gone
    on: the fault's own, the group's timeout, and some for a busy machine.
    """
    return (job.fault.seconds if job.fault else 0.0) + job.timeout + SLACK


SLACK = 20.0


def _wait(processes: list[Any], job: Job, patience: float) -> tuple[list[float], list[int]]:
    """Wait for all to end; when each did, and which had to be killed."""
    began, ends = time.time(), [0.0] * len(processes)
    hung: list[int] = []
    while not all(ends):
        now = time.time()
        for rank, one in enumerate(processes):
            if not ends[rank] and one.exitcode is not None:
                ends[rank] = now
        struck = struck_at(Path(job.folder)) if job.fault is not None else None
        late = now > began + patience if struck is None else now > max(struck, began) + limit(job)
        # A rank that goes on after the fault is not late: it has steps to do.
        if late and (struck is None or any(ends) or now > began + patience):
            hung = [rank for rank, end in enumerate(ends) if not end]
            for rank in hung:
                processes[rank].kill()
                processes[rank].join()
                ends[rank] = time.time()
        time.sleep(0.1)
    return ends, hung


def _last_line(output: Path) -> str:
    """The last line that says something: the error, where there is one."""
    try:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [""])[-1].strip()[:300]
