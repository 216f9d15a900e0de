"""Around a base optimizer: shared groups and state, schedulers, hooks, copies."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD
from lowrank_comm.optimizer.wrapper import OptimizerWrapper
from tests.support.networks import BASES, compressed, distance, every_base, loss_of, network


def test_nothing_stands_between_the_optimizer_and_its_wrapper() -> None:
    """Its parts are objects that it has, not base classes."""
    assert CompressedOptimizer.__mro__ == (
        CompressedOptimizer,
        OptimizerWrapper,
        torch.optim.Optimizer,
        object,
    )


@every_base
def test_it_is_an_optimizer_that_shares_what_the_base_owns(base: str) -> None:
    model = network()
    inner = BASES[base](model.named_parameters())
    outer = CompressedOptimizer(inner, compressor=PowerSGD(2))
    assert isinstance(outer, torch.optim.Optimizer)
    assert outer.param_groups is inner.param_groups
    assert outer.state is inner.state
    assert outer.defaults is inner.defaults
    assert type(inner).__name__ in repr(outer)
    assert "PowerSGD" in repr(outer)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.LinearLR(o)], [2]
        ),
    ],
    ids=["lambda", "cosine", "one cycle", "sequential"],
)
def test_schedulers_drive_the_base(scheduler: Callable[..., Any]) -> None:
    """Rates (and OneCycleLR's momentum) reach the base; no warning that step() was not
    called.
    """
    plain, squeezed = network(), network()
    pairs = [
        (plain, BASES["MSGD"](plain.named_parameters())),
        (squeezed, compressed(squeezed, compressor=PowerSGD(99))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [scheduler(optimizer) for _, optimizer in pairs]
        rates: list[list[float]] = [[], []]
        for t in range(6):
            for k, (model, optimizer) in enumerate(pairs):
                optimizer.zero_grad()
                loss_of(model, t).backward()
                optimizer.step()
                schedulers[k].step()
                rates[k].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert distance(plain, squeezed) < 1e-9


def test_zero_grad() -> None:
    model = network()
    optimizer = compressed(model)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_hooks_run_once_a_step() -> None:
    model = network()
    optimizer = compressed(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(
        lambda o, *_: calls.append("before") if o is optimizer else None
    )
    optimizer.register_step_post_hook(
        lambda o, *_: calls.append("after") if o is optimizer else None
    )
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base"))
    for t in range(2):
        loss_of(model, t).backward()
        optimizer.step()
    assert calls == ["before", "base", "after"] * 2


def test_copying_and_pickling_are_refused() -> None:
    """It belongs to a process group: a copy would share or lose it without a word."""
    optimizer = compressed(network())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
