"""How a step grows with the workers: as gloo processes on this machine, and simulated
in one process.

Processes share the machine's cores, so a step of more of them than cores takes longer
for that reason alone; beside it stands the all-reduce of the uncompressed gradients by
the same processes, alternating with it. The simulation computes every worker's part in
turn, which is what it costs to study many workers, and not what a step of theirs takes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.evidence import summary
from benchmarks.sides import SEED, Shapes, Step, drawn, told
from lowrank_comm import PowerSGD
from lowrank_comm.communication import Group, leave
from lowrank_comm.simulation import Simulation
from tests.support.launches import count

WARM_UP = 2


def as_processes(
    shapes: Shapes, rank: int, workers: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Return a point for each number of workers."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", shapes, rank, sorted(workers), rounds, results)
        multiprocessing.spawn(_process, arguments, nprocs=max(workers))
    points: list[dict[str, Any]] = results.get()
    return points


def _process(
    number: int,
    store: str,
    shapes: Shapes,
    rank: int,
    workers: Sequence[int],
    rounds: int,
    results: Any,
) -> None:
    """Be one of the processes, in every group that it belongs to."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    everyone = max(workers)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=everyone)
    points = []
    for size in workers:
        group = dist.new_group(range(size))
        if number < size:
            points.append(_point(shapes, rank, group, size, number, rounds))
        # the others wait here and take no core
        dist.barrier()
    if number == 0:
        results.put(points)
    leave()


def _point(
    shapes: Shapes, rank: int, group: Any, size: int, number: int, rounds: int
) -> dict[str, Any]:
    """Time a step and an uncompressed all-reduce of `size` processes in turn."""
    given = drawn(shapes, torch.Generator().manual_seed(SEED + number))
    step = Step(shapes, rank, Group(group))
    flat = torch.cat([grad.flatten() for grad in given])

    def all_reduce() -> None:
        dist.all_reduce(flat, group=group)
        flat.div_(size)

    calls: dict[str, Callable[[], None]] = {"ours": step, "all_reduce": all_reduce}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(WARM_UP + rounds):
        for name, call in calls.items():
            for grad, fresh in zip(step.grads, given, strict=True):
                grad.copy_(fresh)
            dist.barrier(group)
            start = time.perf_counter()
            call()
            if k >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    counted = count(step)
    return {
        "x": size,
        **{f"{name}_ms": summary(spent) for name, spent in times.items()},
        "launches": {"a_worker": told(counted, shapes)},
    }


def simulated(shapes: Shapes, rank: int, workers: int, rounds: int) -> dict[str, Any]:
    """Return the point of a number of workers in this process."""
    named = {f"p{k}": shape for k, shape in enumerate(shapes)}
    simulation = Simulation(named, PowerSGD(rank), workers)
    # equal gradients, since 256 sets of them would take gigabytes
    given = drawn(shapes, torch.Generator().manual_seed(SEED))
    gradients = [dict(zip(named, given, strict=True))] * workers
    times = []
    for k in range(1 + rounds):
        start = time.perf_counter()
        simulation.reduce(gradients)
        if k:
            times.append((time.perf_counter() - start) * 1e3)
    counted = told(count(lambda: simulation.reduce(gradients)), shapes)
    return {
        "x": workers,
        "ours_ms": summary(times),
        "a_worker_ms": summary([spent / workers for spent in times]),
        "launches": {"a_worker": {key: value / workers for key, value in counted.items()}},
    }
