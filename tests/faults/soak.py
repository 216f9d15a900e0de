"""A long run with faults that it survives, which must not grow.

    python -m tests.faults.campaign soak --folder runs/faults

Each step draws a fault or none, on one rank or all: a gradient that is not finite, a
batch that is given up before the optimizer's step, an exception in the loss, a state
dict taken and loaded again, a save that fails, and a save and its load. What the
process holds is counted all along.
"""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.faults import recipes
from tests.faults.worker import Job, Run, examples, mean_square

FAULTS = ("not finite", "given up", "exception", "state dict", "failing save", "save and load")
SHARE = 0.15
"""Of the steps that have a fault."""


def held() -> dict[str, int]:
    """What this process holds: resident kB, living tensors, open files, threads."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        "RSS (kB)": next(int(line.split()[1]) for line in status if line.startswith("VmRSS")),
        "live tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        "file descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
    }


class Soaking(Run):
    """A run that draws a fault a step, the same on every rank."""

    def __init__(self, job: Job, seed: int) -> None:
        super().__init__(job)
        self.draw = random.Random(seed)
        self.counted: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.useful = self.all = 0

    def soak(self, step: int) -> None:
        """One step, useful or not."""
        fault = self.draw.choice(FAULTS) if self.draw.random() < SHARE else ""
        victim = self.draw.randrange(self.world)
        if fault:
            self.counted[fault] += 1
        self.all += 1
        x, y = examples(step % 1000, self.rank, self.world)
        if fault == "not finite" and self.rank == victim:
            x = x * float("inf")
        loss = mean_square(self.model(x), y)
        try:
            if fault == "exception":
                # on all ranks: the loop skips this batch
                raise ArithmeticError("injected")
            loss.backward()
            if fault == "given up":
                return
            self.optimizer.step()
            self.useful += not self.optimizer.step_was_skipped
        except ArithmeticError:
            pass
        finally:
            self.optimizer.zero_grad()
        if fault == "state dict":
            self.optimizer.consolidate_error_memory()
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        elif fault == "failing save":
            self.failing_save()
        elif fault == "save and load":
            recipes.save(self.job.checkpoints, step, self.net, self.optimizer)
            recipes.load(self.job.checkpoints, self.net, self.optimizer)

    def failing_save(self) -> None:
        """Save where a file lies in the place of the folder: an error on all ranks."""
        from lowrank_comm import StateMismatchError, checkpoint

        taken = Path(self.job.folder) / "taken"
        if self.rank == 0:
            taken.parent.mkdir(parents=True, exist_ok=True)
            taken.touch()
        dist.barrier()
        try:
            checkpoint.save(self.optimizer.reducer, taken)
        except StateMismatchError:
            return
        raise AssertionError("a save into a file went well")


def soak(job: Job, seed: int = 0, checks: int = 10) -> dict[str, Any]:
    """Run `job.steps` steps on this rank; what it held on the way, and the goodput."""
    run = Soaking(job, seed)
    seen: list[dict[str, int]] = []
    for step in range(1, job.steps + 1):
        run.soak(step)
        if step % (job.steps // checks) == 0:
            seen.append(held())
    parameters: list[nn.Parameter] = list(run.net.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    return {
        "engine": job.engine,
        "rank": run.rank,
        "steps": job.steps,
        "faults": run.counted,
        "goodput": run.useful / run.all,
        "held": seen,
    }


def growth(seen: list[dict[str, int]]) -> dict[str, int]:
    """From the first fifth, when caches have been filled, to the end."""
    early, late = seen[max(1, len(seen) // 5)], seen[-1]
    return {name: late[name] - early[name] for name in late}


def main(job: Job) -> None:
    """Soak as a rank of a campaign; writes `<folder>/soak-<rank>.json`."""
    found = soak(job)
    Path(job.folder, f"soak-{found['rank']}.json").write_text(json.dumps(found))
