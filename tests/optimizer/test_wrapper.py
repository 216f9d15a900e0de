"""Around a base optimizer: shared groups and state, schedulers, hooks, copies."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lowrank_comm import CompressedOptimizer, ConfigError, Identity, PowerSGD
from lowrank_comm.bidirectional import BidirectionalOptimizer, InkheartSGD
from lowrank_comm.optimizer.wrapper import OptimizerWrapper
from tests.support.gloo import GlooPool
from tests.support.networks import BASES, compressed, distance, every_base, loss_of, network
from tests.support.sharpness_aware import InTwoCalls, SharpnessAware


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


class WithModes(torch.optim.SGD):
    """Has modes, as schedule-free optimizers have, and an option of its own."""

    mode, rho = "", 0.05

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def around(base: torch.optim.Optimizer, kind: str) -> Any:
    if kind == "compressed":
        return CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
    return BidirectionalOptimizer(base, InkheartSGD(uplink_fraction=0.5))


every_wrapper = pytest.mark.parametrize("kind", ["compressed", "bidirectional"])


@every_wrapper
def test_what_only_the_base_has_is_read_and_set_there(kind: str) -> None:
    base = WithModes(network().named_parameters(), lr=0.1)
    outer = around(base, kind)
    outer.train()
    assert base.mode == outer.mode == "train"
    outer.eval()
    assert base.mode == outer.mode == "eval"
    outer.rho = 0.5
    assert base.rho == outer.rho == 0.5
    # what neither has is the wrapper's
    outer.remark = "mine"
    assert not hasattr(base, "remark")


@every_wrapper
def test_hasattr_answers_for_the_base(kind: str) -> None:
    outer = around(torch.optim.SGD(network().named_parameters(), lr=0.1), kind)
    assert not hasattr(outer, "train")
    assert not hasattr(outer, "eval")
    with pytest.raises(AttributeError, match=rf"{type(outer).__name__}.*'train'.*SGD"):
        outer.train()


def test_a_base_with_attributes_of_our_names_keeps_them() -> None:
    class Busy(torch.optim.SGD):
        compressor, max_grad_norm = "theirs", 7.0

    base = Busy(network().named_parameters(), lr=0.1)
    outer = CompressedOptimizer(base, PowerSGD(2), max_grad_norm=1.0)
    assert (base.compressor, base.max_grad_norm) == ("theirs", 7.0)
    assert (outer.compressor.rank, outer.max_grad_norm) == (2, 1.0)


@every_wrapper
def test_global_hooks_run_once_a_step_in_torchs_order(kind: str) -> None:
    """Also where the base has an optimizer inside that steps."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            self.inner = torch.optim.SGD(self.param_groups, lr=0.1)

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    model, calls = network(), []
    optimizer = around(Outer(model.named_parameters()), kind)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def enter(name: str) -> Callable[..., None]:
        return lambda o, *_: calls.append((name, type(o).__name__))

    handles = [
        register_optimizer_step_pre_hook(enter("all before")),
        register_optimizer_step_post_hook(enter("all after")),
    ]
    try:
        for t in range(2):
            loss_of(model, t).backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    name = type(optimizer).__name__
    assert calls == [("all before", name), "before", "after", ("all after", name)] * 2
    # they are off now, and stay so
    loss_of(model, 2).backward()
    optimizer.step()
    assert len(calls) == 10


def test_transformers_schedule_of_adafactor() -> None:
    optimization = pytest.importorskip("transformers.optimization")
    rates = []
    for wrapped in (False, True):
        model = network()
        optimizer = optimization.Adafactor(
            model.named_parameters(), relative_step=True, warmup_init=True, lr=None
        )
        if wrapped:
            optimizer = CompressedOptimizer(optimizer, Identity())
        schedule = optimization.AdafactorSchedule(optimizer)
        for t in range(3):
            loss_of(model, t).backward()
            optimizer.step()
            schedule.step()
            rates.append(float(schedule.get_lr()[0]))
    assert rates[:3] == rates[3:]
    assert rates[0] < rates[2]


def test_a_base_whose_step_needs_a_closure_is_refused_with_what_to_write() -> None:
    """When it is made if the signature says so, else when it steps."""

    class Asks(torch.optim.SGD):
        def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
            return closure()

    for kind in ("compressed", "bidirectional"):
        with pytest.raises(ConfigError, match=r"Asks.*closure.*reduce_at"):
            around(Asks(network().named_parameters(), lr=0.1), kind)
        model = network()
        optimizer = around(
            SharpnessAware(model.named_parameters(), lambda p: torch.optim.SGD(p, lr=0.1)), kind
        )

        def closure(model: Any = model) -> Any:
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        with pytest.raises(ConfigError, match=r"SharpnessAware.*closure.*reduce_at"):
            optimizer.step(closure)


def test_sharpness_aware_in_two_calls_is_not_for_a_server() -> None:
    outer = around(InTwoCalls(network().named_parameters()), "bidirectional")
    assert not hasattr(outer, "first_step")
    with pytest.raises(AttributeError, match="the base steps on the server"):
        outer.first_step()


def test_a_schedule_free_base(gloo: GlooPool) -> None:
    """Its modes change the weights: what is evaluated is what it is without
    compression, and training goes on.
    """
    pytest.importorskip("schedulefree")
    for found in gloo.run(schedule_free, 2):
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def schedule_free(rank: int) -> list[list[Any]]:
    import schedulefree

    ends = []
    for wrapped in (False, True):
        model, seen = network(), []
        optimizer = schedulefree.AdamWScheduleFree(model.named_parameters(), lr=0.01)
        if wrapped:
            optimizer = CompressedOptimizer(optimizer, Identity())
        for t in range(4):
            optimizer.train()
            for worker in [rank] if wrapped else [0, 1]:
                (loss_of(model, t, worker) / (1 if wrapped else 2)).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
            seen += [p.detach().clone() for p in model.parameters()]
        ends.append(seen)
    return ends


def test_a_schedule_free_base_on_a_server(gloo: GlooPool) -> None:
    """x is what it evaluates; elsewhere the parameters stay each worker's own."""
    pytest.importorskip("schedulefree")
    for x, other, moved, stayed in gloo.run(schedule_free_server, 2):
        assert all(map(torch.equal, x, other))
        assert moved > 0
        assert stayed


def schedule_free_server(rank: int) -> tuple[Any, ...]:
    import schedulefree

    model = network()
    base = schedulefree.SGDScheduleFree(model.named_parameters(), lr=0.05)
    optimizer = around(base, "bidirectional")
    optimizer.train()
    for t in range(3):
        loss_of(model, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    own, at_y = [p.detach().clone() for p in model.parameters()], optimizer.server_parameters()
    optimizer.eval()
    stayed = all(map(torch.equal, own, model.parameters()))
    at_x = optimizer.server_parameters()
    with optimizer.at_server_parameters():
        seen = [p.detach().clone() for p in model.parameters()]
    moved = max(float((at_x[name] - at_y[name]).abs().max()) for name in at_x)
    return [at_x[name] for name, _ in model.named_parameters()], seen, moved, stayed


def test_a_base_with_eight_bit_state_goes_on_from_its_state_dict() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64)
        base = bitsandbytes.optim.AdamW8bit(model.named_parameters(), min_8bit_size=1024)
        return model, CompressedOptimizer(base, PowerSGD(4))

    def train(model: Any, optimizer: Any, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    train(model, optimizer, 0, 3)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 5)
    again, resumed = made()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(again, resumed, 3, 5)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    kinds = {v.dtype for one in resumed.state.values() for v in one.values() if torch.is_tensor(v)}
    assert torch.uint8 in kinds
