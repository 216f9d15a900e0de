"""Schedules and devices of a training, and the random state after it."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.lab.data.models import random_state
from lowrank_comm.lab.training.training_loop import Recipe
from lowrank_comm.lab.training.workers import join_processes


def factors(recipe: Recipe) -> list[float]:
    """The learning rate of each step, where the highest is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = recipe.scheduler(optimizer)
    found = []
    for _ in range(recipe.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules() -> None:
    cosine = factors(Recipe(steps=10, warmup_steps=2, schedule="cosine"))
    assert [cosine[t] for t in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    linear = factors(Recipe(steps=10, warmup_steps=2, schedule="linear"))
    assert [linear[t] for t in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="device='tpu' is unknown"):
        join_processes("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            join_processes("cuda")


def test_the_random_state_comes_back() -> None:
    before = torch.get_rng_state()
    with random_state(3):
        first = torch.rand(2)
    with random_state(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)
