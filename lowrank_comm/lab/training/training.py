"""Training one model by N workers under one compressor: what the experiments that train
share.

A `Method` is a line of a table: a `lowrank_comm` section with a label. A `Recipe` is
the optimizer: AdamW, its schedule, clipping. `train` runs the steps and says what came
out; whether it diverged is part of the result and no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from lowrank_comm.config import Section
from lowrank_comm.lab.experiment import LabSettings, Progress
from lowrank_comm.lab.training.workers import Workers, averaged, make_workers

SKIPPED_IN_A_ROW = 20
"""Steps skipped one after the other, since gradients were not finite, after which a run
has diverged.
"""
CURVE_POINTS = 24


class Method(LabSettings):
    """A line of a table.

    Attributes:
        label: in tables and figures.
        section: a `lowrank_comm` section, see `config`; the rank and the seed are set
            by the experiment.
        has_rank: false for what has none (no compression).
    """

    label: str
    section: dict[str, Any]
    has_rank: bool = True

    def checked(self, rank: int | None, seed: int) -> Section:
        """The section of a run.

        Raises:
            ConfigError: it cannot work, or its compressor is unknown.
        """
        return Section.parse(
            self.section | ({} if rank is None else {"rank": rank}) | {"seed": seed}
        )


class Recipe(LabSettings):
    """AdamW with a linear warm-up from zero and a fall to zero.

    Attributes:
        steps: optimizer steps.
        warmup_steps: of linear warm-up.
        schedule: of the fall.
        betas, weight_decay: of AdamW.
        clip: largest norm of the averaged gradient; null for any.
    """

    steps: int = Field(ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def factor(self, step: int) -> float:
        """Share of the highest learning rate in a step, from 0; never 0 in a step that
        is made.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Trained:
    """A run that has ended.

    Attributes:
        steps: made, skipped ones included.
        diverged: it was given up since gradients stayed not finite.
        curve: (step, mean training loss of worker 0 over the steps since the last
            point), null where not finite.
        sent: see `workers.averaged`.
    """

    steps: int
    diverged: bool
    curve: list[tuple[int, float | None]]
    sent: dict[str, Any]


def train(
    model: nn.Module,
    section: Section,
    recipe: Recipe,
    learning_rate: float,
    workers: int,
    backward: Callable[[int], float],
    progress: Progress,
) -> tuple[Trained, Workers]:
    """Train the model in place.

    Args:
        model: on its device.
        section: the compressor.
        recipe: the optimizer.
        learning_rate: the highest.
        workers: N.
        backward: computes the next batch of a worker, by its number, backward into the
            parameters' `.grad`, and returns its loss. Called once a step for each
            worker that lives in this process.
        progress: told the share of the steps that are done.

    Returns:
        What came out, and the workers, by whom an evaluation may be shared.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    team = make_workers(model, optimizer, section, workers, recipe.clip)
    every = max(1, recipe.steps // CURVE_POINTS)
    curve: list[tuple[int, float | None]] = []
    recent: list[float] = []
    skipped = step = 0
    model.train()
    while step < recipe.steps and skipped < SKIPPED_IN_A_ROW:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * recipe.factor(step)
        for worker in team.here:
            loss = backward(worker)
            if worker == team.here[0]:
                recent.append(loss)
            team.collect()
        skipped = 0 if team.step() else skipped + 1
        step += 1
        if step % every == 0 or step == recipe.steps:
            mean = sum(recent) / len(recent)
            curve.append((step, mean if math.isfinite(mean) else None))
            recent = []
            progress(step / recipe.steps, f"step {step} of {recipe.steps}, loss {mean:.3f}")
    return Trained(step, skipped >= SKIPPED_IN_A_ROW, curve, averaged(team.sent(), step)), team
