"""Real gloo processes for the tests: started once a session, a fresh default process
group for every case.

A *case* is a module-level function `case(rank, *arguments)`. `GlooPool.run(case, world,
*arguments)` calls it on `world` processes at once, each of them a member of a new
default group of that size, and returns the values by rank. An exception on any rank
comes back as `CaseFailed` with every rank's traceback. Nothing hangs: a case that is
not done in time, or that left a rank waiting for a dead one, costs the processes their
life; the next case starts new ones.

Processes are forked from one that has imported what takes seconds (torch, and of the
engines' libraries those that the tests have imported, too) and has done nothing else:
no thread runs in it, and no group was ever made.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lowrank_comm.numerics.device import accelerator_path, on_accelerator

COLLECTIVE_TIMEOUT = timedelta(seconds=30)
"""How long one collective may wait for a rank that never comes."""
GRACE = 5.0
"""Seconds the other ranks get to end by themselves once one of them has raised."""
CORE = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "numpy",
    "pydantic",
    "safetensors.torch",
)
LIBRARIES = {
    "transformers": (
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "accelerate",
        "peft",
    ),
    "deepspeed": ("deepspeed",),
}
"""What is imported before processes are forked: always, and once the tests have
imported the library.
"""


class CaseFailed(AssertionError):
    """A case raised on some rank, or did not end in time; carries the tracebacks."""


def _serve(rank: int, connection: Connection, environment: dict[str, str]) -> None:
    """The life of one process: receive a case, join the group, run it, answer, leave
    the group.
    """
    os.environ.clear()
    # of now; that of the process which was forked is older
    os.environ.update(environment)
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from tests.support.rehearsals import remember_rehearsals

    remember_rehearsals()
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            store, world, case, arguments, accelerator = pickle.loads(message)
            path = accelerator_path() if accelerator else contextlib.nullcontext()
            torch.manual_seed(0)
            shared = dist.FileStore(store, world)
            dist.init_process_group(
                "gloo", store=shared, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
            )
            # all are connected before one may end
            dist.barrier()
            with path:
                answer = pickle.dumps((True, case(rank, *arguments)))
            _wait_for_all(shared, world)
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # Two meshes of the same ranks count as equal there, and the next case would
            # be given this one's, whose group is gone.
            _clear_sharding_prop_cache()
        connection.send_bytes(answer)


def _wait_for_all(store: Any, world: int) -> None:
    """Until all ranks have done the case, or for GRACE if some never do.

    A rank that leaves closes its connections, also those of a subgroup to which a
    slower rank is still connecting; that one would fail with "connectFullMesh failed
    ... Connection closed by peer".
    """
    deadline = time.monotonic() + GRACE
    done = store.add("done", 1)
    while done < world and time.monotonic() < deadline:
        time.sleep(0.002)
        done = store.add("done", 0)


class GlooPool:
    """`size` processes that run cases; `close()` ends them."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gloo_")
        self._cases = 0

    def run(
        self, case: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60.0
    ) -> list[Any]:
        """`case(rank, *arguments)` on ranks 0 .. world-1; their values by rank.
        (Pickled here, so tensors travel by value.) Inside `accelerator_path` the cases
        take that path, too.
        """
        if not self._workers:
            self._start()
        self._cases += 1
        store = str(Path(self._folder.name) / f"store_{self._cases}")
        accelerator = on_accelerator(torch.device("cpu"))
        message = pickle.dumps((store, world, case, arguments, accelerator))
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world])}
        for connection in pending:
            connection.send_bytes(message)
        values: list[Any] = [None] * world
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(pending.values(), "did not end in time")
                break
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    fine, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    fine, value = False, "the process died"
                if fine:
                    values[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self._stop()
            raise CaseFailed(
                "\n".join(
                    f"--- rank {rank} of {world}\n{text}" for rank, text in sorted(failures.items())
                )
            )
        return values

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        if sys.platform == "linux":
            # a machine's own name need not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("forkserver")
        wanted = [
            *CORE,
            *(
                name
                for library, names in LIBRARIES.items()
                if library in sys.modules
                for name in names
            ),
        ]
        # of effect before the first start only
        context.set_forkserver_preload(wanted)
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, there, dict(os.environ)), daemon=True
            )
            process.start()
            there.close()
            self._workers.append((process, here))

    def _stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
