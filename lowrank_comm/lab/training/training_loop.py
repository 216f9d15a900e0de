"""Trains one model by N workers under one compressor; shared by the experiments that
train language models and encoders.

A `Method` is a line of a table: a `lowrank_comm` section with a label. A `Recipe` says
how many steps there are, the schedule of the learning rate, and clipping. `train` runs
the steps and returns what came out; a run that diverged is a result, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lowrank_comm.config import Section
from lowrank_comm.lab.experiment import LabSettings, Progress
from lowrank_comm.lab.training.workers import Workers, averaged

SKIPPED_IN_A_ROW = 20
"""A run has diverged after so many skipped steps in a row (gradients not finite)."""
CURVE_POINTS = 24
FALLS: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
}


class Method(LabSettings):
    """A line of a table.

    Attributes:
        label: in tables and figures.
        section: a `lowrank_comm` section, see `config`; the experiment sets the rank
            and the seed.
        has_rank: false without compression.
    """

    label: str
    section: dict[str, Any]
    has_rank: bool = True

    def checked(self, rank: int | None, seed: int) -> Section:
        """Return the section of a run, checked.

        Raises:
            ConfigError: the section cannot work, or its compressor is unknown.
        """
        return Section.parse(
            self.section | ({} if rank is None else {"rank": rank}) | {"seed": seed}
        )


class Recipe(LabSettings):
    """Steps whose learning rate rises linearly and then falls to zero.

    Attributes:
        steps: optimizer steps.
        warmup_steps: of linear warm-up.
        schedule: of the fall.
        weight_decay: of the base optimizer.
        clip: largest norm of the averaged gradient; null for any.
    """

    steps: int = Field(ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Return the schedule of the optimizer's learning rate.

        The fall is that of `transformers`. Its warm-up would begin with a step at rate
        0; this one begins at 1 / warmup_steps of the highest rate.
        """
        warm = self.warmup_steps
        fall: LRScheduler = FALLS[self.schedule](optimizer, 0, self.steps - warm)
        if warm == 0:
            return fall
        rise = LinearLR(optimizer, start_factor=1 / warm, total_iters=max(1, warm - 1))
        return SequentialLR(optimizer, [rise, fall], milestones=[warm])


@dataclass(frozen=True)
class Trained:
    """A run that has ended.

    Attributes:
        steps: made, skipped ones included.
        diverged: the run was given up because gradients stayed not finite.
        curve: (step, mean training loss of worker 0 since the last point), null where
            not finite.
        sent: see `workers.averaged`.
    """

    steps: int
    diverged: bool
    curve: list[tuple[int, float | None]]
    sent: dict[str, Any]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    team: Workers,
    recipe: Recipe,
    backward: Callable[[int], float],
    progress: Progress,
) -> Trained:
    """Train the model in place.

    Args:
        model: on its device.
        optimizer: the base, whose learning rate follows the schedule.
        team: the workers, who average and step.
        recipe: steps and schedule.
        backward: takes a worker's number, runs its next batch forward and backward
            into the parameters' `.grad`, and returns the loss. Called once a step for
            each worker of this process.
        progress: called with the share of the steps that are done.
    """
    schedule = recipe.scheduler(optimizer)
    every = max(1, recipe.steps // CURVE_POINTS)
    curve: list[tuple[int, float | None]] = []
    recent: list[float] = []
    skipped = step = 0
    model.train()
    while step < recipe.steps and skipped < SKIPPED_IN_A_ROW:
        for worker in team.local_workers:
            loss = backward(worker)
            if worker == team.local_workers[0]:
                recent.append(loss)
            team.collect()
        skipped = 0 if team.step() else skipped + 1
        schedule.step()
        step += 1
        if step % every == 0 or step == recipe.steps:
            mean = sum(recent) / len(recent)
            curve.append((step, mean if math.isfinite(mean) else None))
            recent = []
            progress(step / recipe.steps, f"step {step} of {recipe.steps}, loss {mean:.3f}")
    return Trained(step, skipped >= SKIPPED_IN_A_ROW, curve, averaged(team.sent(), step))
