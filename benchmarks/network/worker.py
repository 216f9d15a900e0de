"""What a host does: it builds all methods once, and times them in turns, round after
round.

    python -m benchmarks.network.worker JOB

with RANK, WORLD_SIZE, ... set, as `netlab` sets them. The job is a JSON file that
`benchmarks.bench_network` writes (`rows.Job`). Rank 0 appends what was measured to the
file of rows, a line when a round is complete, so that an interrupted run loses a round
at most.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.network.methods import METHODS, SEQUENCE, Loop, Setting
from benchmarks.network.rows import Job, append
from benchmarks.network.traffic import Counts, counted, interface_bytes, ring
from lowrank_comm.communication import leave

BARRIERS = 20
# of a repetition
MOST_STEPS = 10
# of batches, the same for all methods
BATCHES = 4
SEED = 0
_COLUMNS = ("seconds", "sent", "received", "ledger")


def say(text: str) -> None:
    """Print a line of progress on host 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def highest(value: float) -> float:
    """Return the highest of all hosts' values; a collective."""
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


class Cell:
    """A method in this host's process, built and warm.

    Attributes:
        loop: the training loop.
        steps: of a repetition.
        about: what the file of rows holds of it.
    """

    def __init__(self, key: str, loop: Loop) -> None:
        self.key, self.loop, self.steps = key, loop, 1
        self.about: dict[str, Any] = {}
        self._done = 0

    def step(self, batches: list[torch.Tensor]) -> None:
        """Take the next step."""
        self.loop.step(batches[self._done % len(batches)])
        self._done += 1

    def handed_over(self) -> float:
        """Return the bytes that the library's ledger has counted so far, with the
        surplus of what is no all-reduce; NaN for a peer.
        """
        if self.loop.ledger is None:
            return float("nan")
        ledger = self.loop.ledger()
        return ledger.total_bytes + ledger.surplus

    def warm_up(self, batches: list[torch.Tensor], seconds: float) -> None:
        """Take the first steps, count the collectives of a cycle of steps, and choose
        how many make up `seconds`.
        """
        method, taken, counts = METHODS[self.key], [], Counts()
        for k in range(method.warm_up + method.cycle):
            dist.barrier()
            began = time.perf_counter()
            with counted(counts) if k >= method.warm_up else nullcontext():
                self.step(batches)
            taken.append(highest(time.perf_counter() - began))
        cycles = round(seconds / taken[-1] / method.cycle)
        self.steps = method.cycle * max(1, min(MOST_STEPS // method.cycle, cycles))
        hosts = self.loop.hosts or dist.get_world_size()
        self.about = {
            "steps": self.steps,
            "warm_up_seconds": taken,
            # what the ledger answers for is looked up there, step by step
            "ring": ring(1.0, hosts),
            "payload_beside_the_ledger": counts.others.payload / method.cycle,
            "messages": (counts.ours.messages + counts.others.messages) / method.cycle,
            "counted_payload": (counts.ours.payload + counts.others.payload) / method.cycle,
        }

    def repetition(self, batches: list[torch.Tensor]) -> list[float]:
        """Return this host's `_COLUMNS`, of one step on average."""
        dist.barrier()
        handed, before = self.handed_over(), interface_bytes()
        began = time.perf_counter()
        for _ in range(self.steps):
            self.step(batches)
        seconds = time.perf_counter() - began
        # when all are here, all have received what was sent to them
        dist.barrier()
        after = interface_bytes()
        whole = [seconds, after[0] - before[0], after[1] - before[1], self.handed_over() - handed]
        return [one / self.steps for one in whole]


def barrier_bytes() -> float:
    """Return what a barrier puts on this host's link."""
    dist.barrier()
    before, _ = interface_bytes()
    for _ in range(BARRIERS):
        dist.barrier()
    return (interface_bytes()[0] - before) / BARRIERS


def measure(job: Job, model: str, barrier: float) -> None:
    """Build and warm up all methods on a model, then do its rounds."""
    setting = Setting(model, job.epfml)
    cells = {key: Cell(key, METHODS[key].build(setting)) for key in job.methods}
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    shape = (1, SEQUENCE)
    batches = [
        torch.randint(setting.vocabulary, shape, generator=generator) for _ in range(BATCHES)
    ]
    for cell in cells.values():
        cell.warm_up(batches, job.seconds)
        say(f"    {METHODS[cell.key].label}: {cell.about['warm_up_seconds'][-1]:.3f} s")
    about = {key: cell.about for key, cell in cells.items()}
    write(job, {"kind": "setup", "model": model, "barrier": barrier, "methods": about})
    for number in job.rounds[model]:
        began = time.perf_counter()
        order = list(cells)
        random.Random(f"{SEED} {model} {number}").shuffle(order)
        taken = torch.tensor([cells[key].repetition(batches) for key in order], dtype=torch.float64)
        everyone = [torch.empty_like(taken) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, taken)
        by_method = torch.stack(everyone, 2)
        found = {
            key: dict(zip(_COLUMNS, by_method[k].tolist(), strict=True))
            for k, key in enumerate(order)
        }
        write(job, {"kind": "round", "model": model, "round": number, "methods": found})
        say(f"    round {number + 1}: {time.perf_counter() - began:.1f} s")
    for cell in cells.values():
        cell.loop.close()


def write(job: Job, row: dict[str, Any]) -> None:
    """Append a row, on host 0."""
    if dist.get_rank() == 0:
        append(Path(job.rows), {"network": job.network, "sources": job.sources, **row})


def main(path: str) -> None:
    """Do a job."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    barrier = barrier_bytes()
    for model, rounds in job.rounds.items():
        if rounds:
            say(f"  {model}")
            measure(job, model, barrier)
            gc.collect()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
