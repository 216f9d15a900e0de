"""Scripts as a launcher starts them, in processes that need not import anything first.

A process that imports torch, this library and transformers takes ten seconds for it,
and the launcher some more; the documentation has a dozen of such commands. `Launcher`
reads a command by the launcher's own parser, and runs its script with the launcher's
environment in processes that are forked from one which has imported all of it, each
with a working folder, words and output of its own. The launchers themselves are at work
in tests/docs/test_readme.py (torchrun) and tests/configs/test_configs.py (deepspeed).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORE = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "lowrank_comm")
GRACE = 10.0
"""Seconds that the other ranks get to end by themselves once one of them has failed."""


class Launcher:
    """The process that others are forked from.

    Args:
        libraries: modules that it imports beside the core's.
    """

    def __init__(self, *libraries: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *CORE, *libraries],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        """End it, and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()

    def run(
        self, command: list[str], folder: Path, environment: dict[str, str], timeout: float = 200
    ) -> str:
        """Run a command of torchrun or deepspeed in a folder; what it printed.

        Raises:
            AssertionError: a rank failed, or did not end in time; with its output.
        """
        script, words, ranks, of_launcher = _read(command)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": port, **of_launcher}
        output = folder / f".printed-{time.time_ns()}"
        job = {
            "script": str(folder / script),
            "words": words,
            "local_rank": command[0] == "deepspeed",
            "ranks": ranks,
            "environment": environment | {name: str(value) for name, value in place.items()},
            "folder": str(folder),
            "output": str(output),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], timeout)
        codes = json.loads(self._server.stdout.readline()) if ready else "did not end in time"
        printed = output.read_text(errors="replace")
        said = output.with_suffix(".err").read_text(errors="replace")
        assert codes == [0] * ranks, f"{command}: {codes}\n{(printed + said)[-5000:]}"
        return printed


def _read(command: list[str]) -> tuple[str, list[str], int, dict[str, Any]]:
    """Script, its words, number of ranks, and variables of this launcher alone."""
    if command[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(command[1:])
        return given.training_script, given.training_script_args, int(given.nproc_per_node), {}
    assert command[0] == "deepspeed", command
    from deepspeed.launcher.runner import parse_args

    given = parse_args(command[1:])
    return given.user_script, given.user_args, given.num_gpus, {"LOCAL_SIZE": given.num_gpus}


def _rank(job: dict[str, Any], rank: int) -> None:
    """Be a rank: as `python script words` with a launcher's variables."""
    output = Path(job["output"])
    for stream, file in ((1, output), (2, output.with_suffix(".err"))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(job["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(job["folder"])
    sys.path[0] = str(Path(job["script"]).parent)
    own = [f"--local_rank={rank}"] if job["local_rank"] else []
    sys.argv = [job["script"], *own, *job["words"]]
    runpy.run_path(job["script"], run_name="__main__")


def _fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _rank(job, rank)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _codes(pids: list[int]) -> list[int]:
    """Wait for all; once one has failed, end those that go on."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def main() -> None:
    """Serve: a job a line."""
    answers = os.fdopen(os.dup(1), "w")
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        codes = _codes([_fork(job, rank) for rank in range(job["ranks"])])
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
