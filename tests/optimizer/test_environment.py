"""What the optimizer asks of the program around it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    PowerSGD,
    ProjectedAdamW,
    UnsupportedError,
)
from lowrank_comm.bidirectional import BidirectionalOptimizer, InkheartSGD

Make = Callable[[Any, Any], torch.optim.Optimizer]
OURS: dict[str, tuple[Make, type[Exception]]] = {
    "compressed": (lambda base, _: CompressedOptimizer(base, PowerSGD(rank=1)), ConfigError),
    "bidirectional": (
        lambda base, _: BidirectionalOptimizer(base, InkheartSGD(uplink_fraction=0.5)),
        UnsupportedError,
    ),
    "projected": (lambda _, named: ProjectedAdamW(named, rank=1, restart_every=1), ConfigError),
}


def optimizer_of(kind: str) -> torch.optim.Optimizer:
    named = list(torch.nn.Linear(4, 4).named_parameters())
    return OURS[kind][0](torch.optim.SGD(named, lr=0.1), named)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Stand for transformers' Trainer and for accelerate, of which the first calls a
    function of its module to start DeepSpeed, and the second a method.
    """

    class Accelerator:
        def _prepare_deepspeed(self, *objects: Any) -> str:
            return "started"

    trainer = SimpleNamespace(deepspeed_init=lambda trainer, num_training_steps: "started")
    accelerate = SimpleNamespace(Accelerator=Accelerator)
    monkeypatch.setitem(sys.modules, "transformers.trainer", trainer)
    monkeypatch.setitem(sys.modules, "accelerate", accelerate)
    return trainer, accelerate


@pytest.mark.parametrize("kind", OURS)
def test_deepspeed_is_refused_where_it_starts_with_the_optimizer(
    libraries: tuple[Any, Any], kind: str
) -> None:
    module, accelerate = libraries
    optimizer = optimizer_of(kind)
    with pytest.raises(OURS[kind][1], match=r"(?i)deepspeed"):
        module.deepspeed_init(SimpleNamespace(optimizer=optimizer), num_training_steps=1)
    prepare = accelerate.Accelerator()._prepare_deepspeed
    with pytest.raises(OURS[kind][1], match=r"(?i)deepspeed"):
        prepare(torch.nn.Linear(4, 4), optimizer)
    with pytest.raises(OURS[kind][1], match=r"(?i)deepspeed"):
        prepare(SimpleNamespace(optimizer=optimizer))


def test_deepspeed_of_another_run_is_left_alone(libraries: tuple[Any, Any]) -> None:
    module, accelerate = libraries
    ours = [optimizer_of(kind) for kind in [*OURS, *OURS]]
    plain = torch.optim.SGD(torch.nn.Linear(4, 4).parameters(), lr=0.1)
    for other in (None, plain, "not an optimizer"):
        run = SimpleNamespace(optimizer=other)
        assert module.deepspeed_init(run, num_training_steps=1) == "started"
        assert accelerate.Accelerator()._prepare_deepspeed(other) == "started"
    # and nothing keeps ours
    gone = [weakref.ref(one) for one in ours]
    del ours
    gc.collect()
    assert all(there() is None for there in gone)


# --- started wrongly ---


def stepped(kind: str, device: str = "cpu") -> None:
    """A step of an optimizer of a plain model."""
    with torch.device(device):
        model = torch.nn.Linear(8, 8)
        x = torch.ones(2, 8)
    named = list(model.named_parameters())
    optimizer = OURS[kind][0](torch.optim.SGD(named, lr=0.1), named)
    model(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OURS)
def test_several_processes_without_a_group_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train a model of its own, without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2.*init_process_group"):
        stepped(kind)
    for alone in ("1", "", "auto"):
        monkeypatch.setenv("WORLD_SIZE", alone)
        stepped(kind)


@pytest.mark.parametrize("kind", OURS)
def test_parameters_without_values_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"'weight' is on the meta device.*to_empty"):
        stepped(kind, "meta")


@pytest.mark.parametrize("kind", OURS)
def test_parameters_that_are_computed_are_refused(kind: str) -> None:
    computed = [("w", torch.ones(4, 4, requires_grad=True) * 2)]
    # torch takes them where it can differentiate through a step
    base = torch.optim.SGD(computed, lr=0.1, differentiable=True)
    with pytest.raises(ConfigError, match=r"computed from other tensors"):
        OURS[kind][0](base, computed)
