"""CompressedOptimizer is a real torch.optim.Optimizer, around any other one."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    LowRankCommError,
    PowerSGD,
    PowerSGDPlus,
    StateMismatchError,
    UnsupportedError,
)
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.numerics.randomness import gaussian
from lowrank_comm.reduction.policy import Rule
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

Builder = Callable[[Iterable[Any]], torch.optim.Optimizer]
BASES: dict[str, Builder] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "MSGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
every_base = pytest.mark.parametrize("base", BASES)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch(step: int, worker: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = gradient((8, 10), step, worker, 1), gradient((8, 6), step, worker, 2)
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)


def loss_of(model: nn.Module, step: int, worker: int = 0) -> Tensor:
    x, y = batch(step, worker, next(model.parameters()).dtype)
    return ((model(x) - y) ** 2).mean()


def compressed(
    model: nn.Module,
    base: Builder = BASES["MSGD"],
    compressor: Compressor | None = None,
    **options: Any,
) -> CompressedOptimizer:
    return CompressedOptimizer(
        base(model.named_parameters()),
        compressor=compressor or PowerSGD(2),
        **({"min_compression_rate": 0} | options),
    )


def distance(one: nn.Module, other: nn.Module) -> float:
    return max(
        float((p - q).detach().abs().max())
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )


# --- the base is the base --------------------------------------------------------------------------------------------


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


@every_base
def test_full_rank_equals_the_base_alone(base: str) -> None:
    plain, squeezed = network(), network()
    inner = BASES[base](plain.named_parameters())
    outer = compressed(squeezed, BASES[base], PowerSGDPlus(99, restart_every=4))
    for t in range(10):
        for model, optimizer in ((plain, inner), (squeezed, outer)):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
    assert distance(plain, squeezed) < 1e-8
    assert distance(plain, network()) > 1e-3


def full_rank_training(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Full-rank compression against an uncompressed all-reduce written here: losses and
    parameters of both.
    """
    dtype, micro_steps, max_norm = settings["dtype"], settings["micro_steps"], settings["max_norm"]
    base, world = BASES[settings["base"]], torch.distributed.get_world_size()
    plain, squeezed = network(dtype=dtype), network(dtype=dtype)
    inner = base(plain.named_parameters())
    outer = compressed(squeezed, base, PowerSGDPlus(99, restart_every=4), max_grad_norm=max_norm)
    losses: list[list[float]] = [[], []]
    clipped = False
    for t in range(12):
        for k, (model, optimizer) in enumerate(((plain, inner), (squeezed, outer))):
            optimizer.zero_grad()
            for micro in range(micro_steps):
                loss = loss_of(model, t * micro_steps + micro, rank) / micro_steps
                loss.backward()
                losses[k].append(float(loss.detach()))
            if optimizer is inner:
                for p in model.parameters():
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= world
                if max_norm:
                    clipped |= (
                        float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)) > max_norm
                    )
            optimizer.step()
    return {
        "loss": float(np.abs(np.subtract(*losses)).max()),
        "parameters": distance(plain, squeezed),
        "clipped": clipped,
        "passes": outer.ledger.steps,
        "moved": distance(plain, network(dtype=dtype)),
    }


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.2])
@pytest.mark.parametrize(
    ("base", "dtype"), [("AdamW", torch.float32), ("MSGD", torch.float32), ("AdamW", torch.float64)]
)
def test_full_rank_training_equals_uncompressed_training(
    gloo: GlooPool, base: str, dtype: torch.dtype, micro_steps: int, max_norm: float | None
) -> None:
    """Two ranks, gradient accumulation, clipping: losses to 1e-5, and parameters too
    where Adam does not turn round-off into steps.
    """
    settings = {"base": base, "dtype": dtype, "micro_steps": micro_steps, "max_norm": max_norm}
    for seen in gloo.run(full_rank_training, 2, settings):
        assert seen["loss"] < 1e-5
        # one communication a step, whatever the number of micro-steps
        assert seen["passes"] == 12
        assert seen["clipped"] == (max_norm is not None)
        assert seen["moved"] > 1e-3
        if base == "MSGD" or dtype == torch.float64:
            assert seen["parameters"] < 1e-5


# --- manners of an optimizer -----------------------------------------------------------------------------------------


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


def test_closure() -> None:
    """step(closure) computes loss and gradients anew with gradients enabled, reduces
    them, and gives the loss back.
    """
    plain, squeezed = network(), network()
    outer, twin = compressed(squeezed), compressed(plain)

    def closure() -> Tensor:
        outer.zero_grad()
        loss = loss_of(squeezed, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = outer.step(closure)
    loss_of(plain, 0).backward()
    assert twin.step() is None
    assert float(loss.detach()) == float(loss_of(network(), 0).detach())
    assert distance(plain, squeezed) == 0.0
    assert outer.ledger.steps == 1


def test_reduce_gradients_is_idempotent() -> None:
    """By hand or not, once or thrice: one communication a step. New gradients are
    reduced again.
    """
    one, other = network(), network()
    by_hand, by_step = compressed(one), compressed(other)
    for t in range(4):
        for model, optimizer in ((one, by_hand), (other, by_step)):
            optimizer.zero_grad()
            loss_of(model, t).backward()
        for _ in range(3):
            assert by_hand.reduce_gradients()
        reduced = [p.grad.clone() for p in one.parameters()]
        by_hand.step()
        by_step.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(reduced, one.parameters(), strict=True))
        assert distance(one, other) == 0.0
    assert by_hand.ledger.steps == by_step.ledger.steps == 4


def test_new_gradients_after_a_reduction_without_a_step_are_reduced_again() -> None:
    """The averaged gradients were dropped past the optimizer (model.zero_grad()), or
    added to: what the base sees is averaged in any case.
    """
    dropped, added, twin = network(), network(), network()
    optimizers = {
        name: compressed(m) for name, m in (("dropped", dropped), ("added", added), ("twin", twin))
    }
    loss_of(dropped, 0).backward()
    optimizers["dropped"].reduce_gradients()
    dropped.zero_grad()
    loss_of(dropped, 1).backward()
    optimizers["dropped"].reduce_gradients()
    optimizers["dropped"].step()
    assert optimizers["dropped"].ledger.steps == 2
    loss_of(twin, 0).backward()
    optimizers["twin"].reduce_gradients()
    optimizers["twin"].zero_grad()
    loss_of(twin, 1).backward()
    optimizers["twin"].step()
    assert distance(dropped, twin) == 0.0
    loss_of(added, 0).backward()
    optimizers["added"].reduce_gradients()
    loss_of(added, 1).backward()
    optimizers["added"].step()
    assert optimizers["added"].ledger.steps == 2


def test_gradients_that_the_caller_replaces_between_reduction_and_step_are_not_averaged_twice() -> (
    None
):
    """Clipping of one's own need not be in place."""
    one, other = network(), network()
    by_hand, twin = compressed(one), compressed(other)
    for model, optimizer in ((one, by_hand), (other, twin)):
        loss_of(model, 0).backward()
        optimizer.reduce_gradients()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        p.grad = 0.5 * p.grad
        q.grad.mul_(0.5)
    by_hand.step()
    twin.step()
    assert by_hand.ledger.steps == 1
    assert distance(one, other) == 0.0


def test_gradient_accumulation_without_zero_grad_between() -> None:
    """Three micro-steps accumulate in p.grad as with any optimizer; the sum is
    compressed once.
    """
    whole, parts = network(), network()
    one, other = compressed(whole), compressed(parts)
    for t in range(3):
        one.zero_grad()
        sum(loss_of(whole, 3 * t + k) for k in range(3)).backward()
        one.step()
        other.zero_grad()
        for k in range(3):
            loss_of(parts, 3 * t + k).backward()
        other.step()
    assert distance(whole, parts) < 1e-12
    assert other.ledger.steps == 3


def test_clipping_acts_on_the_averaged_gradient() -> None:
    """After step() p.grad is what the base saw: the reduced gradient, clipped by its
    own true norm.
    """
    clipped, plain = network(), network()
    with_limit, without = compressed(clipped, max_grad_norm=0.05), compressed(plain)
    for t in range(3):
        for model, optimizer in ((clipped, with_limit), (plain, without)):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.reduce_gradients()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        # not yet: the caller may still look at it
        assert nn.utils.get_total_norm([p.grad for p in clipped.parameters()]) > 0.05
        with_limit.step()
        without.step()
        assert float(
            nn.utils.get_total_norm([p.grad for p in clipped.parameters()])
        ) == pytest.approx(0.05, rel=1e-4)
        assert distance(clipped, plain) < 1e-14


def test_a_norm_below_the_limit_is_left_alone() -> None:
    clipped, plain = network(), network()
    with_limit, without = compressed(clipped, max_grad_norm=1e6), compressed(plain)
    for model, optimizer in ((clipped, with_limit), (plain, without)):
        loss_of(model, 0).backward()
        optimizer.step()
    assert distance(clipped, plain) == 0.0


def test_add_param_group_keeps_what_is_in_the_error_memory() -> None:
    """A layer that is unfrozen later takes part from the next step; the others' errors
    and bases are kept.
    """
    model, twin = network(), network()
    first, second = model[0], model[2]
    growing = CompressedOptimizer(
        torch.optim.SGD([(f"0.{n}", p) for n, p in first.named_parameters()], lr=0.05),
        PowerSGD(2),
        min_compression_rate=0,
    )
    whole = compressed(twin, lambda p: torch.optim.SGD(p, lr=0.05))
    with torch.no_grad():
        start = [p.clone() for p in second.parameters()]
    for t in range(6):
        if t == 3:
            assert set(growing.error_memory()) == {"0.weight"}
            before = growing.error_memory()["0.weight"].clone()
            growing.add_param_group(
                {"params": [(f"2.{n}", p) for n, p in second.named_parameters()]}
            )
            assert len(growing.param_groups) == 2
            assert torch.equal(growing.error_memory()["0.weight"], before)
            assert not growing.error_memory()["2.weight"].any()
        growing.zero_grad()
        whole.zero_grad()
        loss_of(model, t).backward()
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        growing.step()
        whole.step()
        assert float((first.weight - twin[0].weight).detach().abs().max()) < 1e-12
        assert all(torch.equal(p, s) for p, s in zip(second.parameters(), start, strict=True)) == (
            t < 3
        )
    assert set(growing.error_memory()) == {"0.weight", "2.weight"}


def test_several_groups_with_rates_of_their_own() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(
            [
                {"params": list(model[0].named_parameters(prefix="0")), "lr": 0.0},
                {"params": list(model[2].named_parameters(prefix="2")), "lr": 0.1},
            ]
        ),
        PowerSGD(2),
        min_compression_rate=0,
    )
    loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[2].weight, network()[2].weight)
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_frozen_parameters_have_no_part() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = compressed(model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert set(optimizer.error_memory()) == {"2.weight"}
    assert torch.equal(model[0].weight, network()[0].weight)


def test_error_memory_is_a_live_view_in_the_parameters_shape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)).double()
    optimizer = compressed(model)
    model(torch.ones(1, 3, 4, 4, dtype=torch.float64).cumsum(2)).pow(2).sum().backward()
    optimizer.step()
    view = optimizer.error_memory()["0.weight"]
    assert view.shape == model[0].weight.shape
    before = view.clone()
    model(
        torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(view, before)
    assert torch.equal(view, optimizer.error_memory()["0.weight"])


def test_copying_and_pickling_are_refused() -> None:
    """It belongs to a process group: a copy would share or lose it without a word."""
    optimizer = compressed(network())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)


# --- names -----------------------------------------------------------------------------------------------------------


def test_parameters_without_names() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(
            [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1
        ),
        PowerSGD(2),
        min_compression_rate=0,
    )
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match=r"named_parameters"):
        optimizer.step()
    assert set(optimizer.error_memory()) == {"0.0", "1.0"}


def test_names_given_beside_the_base() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        PowerSGD(2),
        min_compression_rate=0,
        named_parameters=model.named_parameters(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_names_from_attach_which_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    plan = optimizer.attach(model)
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert {row.name for row in plan.rows} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}
    loss_of(model, 0).backward()
    optimizer.step()
    # once
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:the names of all parameters start with")
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_wrappers_are_stripped_from_names(prefix: str) -> None:
    model = network()
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_a_compiled_models_names_are_the_models_own() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(torch.compile(model, backend="eager").named_parameters(), lr=0.1),
        PowerSGD(2),
        min_compression_rate=0,
    )
    assert set(optimizer.error_memory()) == {"0.weight", "2.weight"}


def test_attach_refuses_what_it_cannot_serve() -> None:
    model = network()
    optimizer = compressed(model)
    with pytest.raises(ConfigError, match="parameters"):
        optimizer.attach(network(1))
    with pytest.raises(ConfigError, match="CompressedOptimizer"):
        CompressedOptimizer(optimizer, PowerSGD(2))

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(UnsupportedError, match="DeepSpeed JSON"):
        optimizer.attach(DeepSpeedEngine(model))


def test_attach_after_a_step_with_other_names_says_what_to_do() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match="no names"):
        optimizer.step()
    with pytest.raises(StateMismatchError, match=r"attach\(model\)"):
        optimizer.attach(model)


def test_parameters_that_are_added_later_rename_no_others() -> None:
    model = nn.ModuleDict({"module": nn.Linear(6, 5), "head": nn.Linear(5, 4)}).double()
    first = [(f"module.{name}", p) for name, p in model["module"].named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(first, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    model["module"](torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.warns(UserWarning, match="DistributedDataParallel"):
        optimizer.step()
    kept = optimizer.error_memory()["weight"].clone()
    optimizer.add_param_group(
        {"params": [(f"head.{name}", p) for name, p in model["head"].named_parameters()]}
    )
    assert set(optimizer.error_memory()) == {"weight", "head.weight"}
    assert torch.equal(optimizer.error_memory()["weight"], kept)


@pytest.mark.filterwarnings("ignore:the names of all parameters start with")
def test_a_part_of_the_model_that_is_called_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(6, 5, bias=False)
            self.weight = nn.Parameter(torch.ones(5, 6))

    model = Outer()
    assert set(compressed(model).error_memory()) == {"weight", "module.weight"}
    named = [(f"module.{name}", p) for name, p in model.named_parameters()]
    wrapped = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    assert set(wrapped.error_memory()) == {"weight", "module.weight"}


def test_names_that_look_wrapped_are_told() -> None:
    """Without attach(), a model wrapped by DDP would be averaged twice without a word."""
    named = [(f"module.{name}", p) for name, p in network().named_parameters()]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(named, lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    with pytest.warns(UserWarning, match="DistributedDataParallel") as caught:
        optimizer.error_memory()
    # whose line it is
    assert caught[0].filename == __file__


def test_the_plan_tells_what_may_surprise() -> None:
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 4))
    rules = [Rule("lm_head.*", treatment="dense"), Rule("1.*", treatment="dense")]
    plan = compressed(model, compressor=PowerSGDPlus(4), rules=rules).plan
    assert plan.idle_rules == ("lm_head.*",)
    assert "rule 'lm_head.*' matches no parameter" in str(plan)
    assert "one worker: gradients are compressed all the same" in str(plan)
    assert "1 matrix," in str(plan)
    delta = 4 * 60 * 50
    assert plan.error_bytes == delta
    assert plan.workspace_bytes == delta + 4 * (4 * (60 + 50) + 50 + 204)
    assert plan.restart_workspace_bytes == delta + 4 * (60 * 50 + 50 * 4 + 50 + 204)
    nothing = compressed(model, compressor=PowerSGD(1000), min_compression_rate=2).plan
    assert "nothing is compressed; the largest: 0.weight (rate" in str(nothing)


# --- what torch is set to ---------------------------------------------------------------------------------------------


def run_three_steps(inside: Callable[[], Any]) -> tuple[nn.Module, CompressedOptimizer]:
    model = network(dtype=torch.float32)
    optimizer = compressed(model, compressor=PowerSGDPlus(2, restart_every=2))
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with inside():
            optimizer.step()
    return model, optimizer


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def new_style_precision() -> Iterator[None]:
    """torch's newer settings, which do not go together with
    `torch.get_float32_matmul_precision`.
    """
    backends = {torch.backends.mkldnn.matmul: "bf16", torch.backends.cuda.matmul: "tf32"}
    before = {backend: backend.fp32_precision for backend in backends}
    for backend, precision in backends.items():
        backend.fp32_precision = precision
    try:
        yield
        assert {backend: backend.fp32_precision for backend in backends} == backends
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision


@pytest.mark.parametrize(
    "inside",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: matmul_precision("medium"),
        new_style_precision,
    ],
    ids=["autocast", "medium", "new style"],
)
def test_a_step_computes_in_full_precision_whatever_torch_is_set_to(
    inside: Callable[[], Any],
) -> None:
    one, _ = run_three_steps(contextlib.nullcontext)
    other, optimizer = run_three_steps(inside)
    assert distance(one, other) == 0.0
    assert any(e.any() for e in optimizer.error_memory().values())


def test_draws_do_not_depend_on_torchs_default_dtype_or_device() -> None:
    expected = gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu"))
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(
            gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu")),
            expected,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(
            gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu")),
            expected,
        )


# --- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_of_a_step() -> None:
    model = network()
    optimizer = compressed(model, compressor=PowerSGDPlus(2, restart_every=2))
    assert optimizer.last_report is None
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        before = {name: e.clone() for name, e in optimizer.error_memory().items()}
        given = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.reduce_gradients()
        # reading early must not spoil the report after the step
        in_between = optimizer.last_report
        optimizer.step()
        report = optimizer.last_report
        assert (report.step, report.applied, in_between.step) == (t, True, t)
        assert report.restarts == (2 if t % 2 == 0 else 0)
        delta = sum(float((given[name] + e).norm()) ** 2 for name, e in before.items())
        kept = sum(float(e.norm()) ** 2 for e in optimizer.error_memory().values())
        assert report.error_norm == pytest.approx(kept**0.5, rel=1e-10)
        assert report.captured_energy == pytest.approx(1 - kept / delta, rel=1e-8)
        assert set(report.seconds) == {"compress", "communicate", "decompress", "commit"}
        assert report.as_dict()["bytes"] == report.bytes


def truth(sent_of: list[tuple[Tensor, Tensor]]) -> float:
    """||Delta - residual||^2 / ||Delta||^2 from (Delta, residual) pairs."""
    return sum(float((d - r).norm()) ** 2 for d, r in sent_of) / sum(
        float(d.norm()) ** 2 for d, _ in sent_of
    )


def captured(rank: int, compressor: Compressor) -> list[tuple[float | None, float]]:
    """The report's captured energy and the true one. At step 2 one of two twin matrices
    has no gradient anywhere.
    """
    parameters = {
        name: nn.Parameter(torch.zeros(9, 6, dtype=torch.float64)) for name in ("one", "twin")
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=0.1), compressor, min_compression_rate=0
    )
    found = []
    for t in range(5):
        optimizer.zero_grad()
        for k, (name, p) in enumerate(parameters.items()):
            p.grad = (
                None
                if (t == 2 and name == "twin")
                else torch.from_numpy(gradient((9, 6), t, rank, k))
            )
        deltas = {
            n: e + p.grad
            for (n, e), p in zip(optimizer.error_memory().items(), parameters.values(), strict=True)
            if p.grad is not None
        }
        optimizer.step()
        pairs = []
        for name, delta in deltas.items():
            applied = parameters[name].grad
            u = torch.linalg.svd(applied)[0][:, : torch.linalg.matrix_rank(applied)]
            # sent is the projection on the range of what is applied
            pairs.append((delta, delta - u @ (u.T @ delta)))
        before = optimizer.last_report.captured_energy if t % 2 else None
        # changes the memory, not what was captured
        optimizer.consolidate_error_memory()
        found.append((optimizer.last_report.captured_energy, truth(pairs)))
        assert before in (None, found[-1][0])
    return found


@pytest.mark.parametrize(
    "compressor",
    [
        PowerSGD(2),
        PowerSGDPlus(2, restart_every=2),
        PowerSGDPlus(2, restart_every=2, consensus_restart=True),
    ],
    ids=repr,
)
def test_captured_energy_is_the_share_of_delta_that_was_sent(
    gloo: GlooPool, compressor: Compressor
) -> None:
    for found in gloo.run(captured, 2, compressor):
        for said, true in found:
            assert said == pytest.approx(true, rel=1e-9)


def test_a_report_outlives_added_parameters() -> None:
    model = network()
    optimizer = CompressedOptimizer(
        torch.optim.SGD([(f"0.{n}", p) for n, p in model[0].named_parameters()], lr=0.05),
        PowerSGD(2),
        min_compression_rate=0,
    )
    loss_of(model, 0).backward()
    optimizer.step()
    report = optimizer.last_report
    optimizer.add_param_group({"params": [(f"2.{n}", p) for n, p in model[2].named_parameters()]})
    optimizer.error_memory()
    assert optimizer.last_report == report


# --- missing gradients -----------------------------------------------------------------------------------------------


def missing(rank: int) -> dict[str, Any]:
    """Step 1: rank 0 has no gradient for `some`, nobody has one for `nobody` and
    `no_bias`. Steps 0 and 2 are complete.
    """
    shapes = {"all": (9, 6), "some": (9, 6), "nobody": (9, 6), "some_bias": (4,), "no_bias": (3,)}
    parameters = {
        name: nn.Parameter(torch.ones(shape, dtype=torch.float64)) for name, shape in shapes.items()
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=0.1, momentum=0.9),
        PowerSGD(2),
        min_compression_rate=0,
    )
    report: dict[str, Any] = {}
    for t in range(3):
        optimizer.zero_grad()
        for k, (name, p) in enumerate(parameters.items()):
            absent = t == 1 and (
                name in ("nobody", "no_bias") or (name.startswith("some") and rank == 0)
            )
            p.grad = None if absent else torch.from_numpy(gradient(shapes[name], t, rank, k))
        if t == 1:
            before = {name: p.detach().clone() for name, p in parameters.items()}
            errors = {name: e.clone() for name, e in optimizer.error_memory().items()}
            bases = {
                name: parts["Q"].clone() for name, parts in optimizer.reducer.state.bases().items()
            }
        optimizer.step()
        if t == 1:
            report["none"] = sorted(name for name, p in parameters.items() if p.grad is None)
            report["unmoved"] = sorted(
                name for name, p in parameters.items() if torch.equal(p, before[name])
            )
            report["grads"] = {
                name: p.grad.numpy().copy() for name, p in parameters.items() if p.grad is not None
            }
            report["errors_before"] = {name: e.numpy() for name, e in errors.items()}
            report["errors"] = {
                name: e.numpy().copy() for name, e in optimizer.error_memory().items()
            }
            report["same_basis"] = sorted(
                n
                for n, parts in optimizer.reducer.state.bases().items()
                if torch.equal(parts["Q"], bases[n])
            )
    report["parameters"] = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    return report


def test_gradients_that_are_missing_on_some_ranks_or_on_all(gloo: GlooPool) -> None:
    """On some: they count as zero, and what the others had is applied everywhere, also
    where there was none. On all: the gradient stays None, the base leaves the parameter
    alone, error and basis stay bit-equal. Nothing hangs.
    """
    reports = gloo.run(missing, 3)
    shapes = {"all": (9, 6), "some": (9, 6), "some_bias": (4,)}
    for report in reports:
        assert report["none"] == report["unmoved"] == ["no_bias", "nobody"]
        assert report["same_basis"] == ["nobody"]
        assert np.array_equal(report["errors"]["nobody"], report["errors_before"]["nobody"])
        for name in report["parameters"]:
            assert np.array_equal(report["parameters"][name], reports[0]["parameters"][name])
        bias = sum(gradient(shapes["some_bias"], 1, rank, 3) for rank in (1, 2)) / 3
        np.testing.assert_allclose(report["grads"]["some_bias"], bias, rtol=1e-14)
    for k, name in enumerate(("all", "some")):
        ranks = range(3) if name == "all" else (1, 2)
        given = (
            sum(gradient(shapes[name], 1, rank, k) for rank in ranks) / 3
            + sum(r["errors_before"][name] for r in reports) / 3
        )
        np.testing.assert_allclose(
            reports[0]["grads"][name] + sum(r["errors"][name] for r in reports) / 3,
            given,
            atol=1e-12,
        )


def test_a_step_without_any_gradient() -> None:
    model = network()
    optimizer = compressed(model)
    optimizer.step()
    assert distance(model, network()) == 0.0
    assert all(p.grad is None for p in model.parameters())


# --- the other moment of reduction -----------------------------------------------------------------------------------


def at_backward(rank: int, poisoned: int | None) -> dict[str, Any]:
    """reduce_at="backward" against reduce_at="step"; `poisoned`: the rank whose
    gradient overflows at step 2.
    """
    one, other = network(), network()
    early, late = compressed(one, reduce_at="backward"), compressed(other)
    report: dict[str, Any] = {"inside_step": 0}
    for t in range(5):
        factor = torch.inf if t == 2 and rank == poisoned else 1.0
        for model, optimizer in ((one, early), (other, late)):
            optimizer.zero_grad()
            (loss_of(model, t, rank) * factor).backward()
        if t == 2:
            report["nan"] = [bool(p.grad.isnan().all()) for p in one.parameters()]
        count = early.ledger.collectives
        early.step()
        report["inside_step"] += early.ledger.collectives - count
        late.step()
    report["distance"] = distance(one, other)
    report["moved"] = distance(one, network())
    return report


def test_reduction_at_backward_refuses_a_second_pass_onto_averaged_gradients() -> None:
    model = network()
    optimizer = compressed(model, reduce_at="backward")
    loss_of(model, 0).backward()
    with pytest.raises(LowRankCommError, match=r'reduce_at="step"'):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    # and goes on
    loss_of(model, 1).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 2


def test_reduction_at_backward_after_a_pass_that_failed() -> None:
    """A backward pass that ends by an exception has no end; the next one must not be
    taken for it.
    """

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError("in the middle of backward")

    one, other = network(), network()
    early, late = compressed(one, reduce_at="backward"), compressed(other)
    x, y = batch(0, 0)
    with pytest.raises(ArithmeticError):
        ((one[2](Fails.apply(one[1](one[0](x)))) - y) ** 2).mean().backward()
    # it got that far
    assert one[2].weight.grad is not None
    assert early.ledger.steps == 0
    for model, optimizer in ((one, early), (other, late)):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert early.ledger.steps == 1
    assert distance(one, other) == 0.0


class Checkpointed(nn.Module):
    """Three layers whose activations are computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def test_reduction_at_backward_and_activation_checkpointing() -> None:
    """Reentrant checkpointing has backward passes within the pass, and their ends must
    not be taken for its end.
    """
    x = torch.ones(2, 6, requires_grad=True)
    plain = Checkpointed(reentrant=False)
    optimizer = compressed(plain, reduce_at="backward")
    plain(x).sum().backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
    reentrant = Checkpointed(reentrant=True)
    refusing = compressed(reentrant, reduce_at="backward")
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        reentrant(x).sum().backward()
    assert refusing.ledger.steps == 0
    refusing.detach()
    refusing.zero_grad()
    reentrant(x).sum().backward()
    # at the end of backward no more, but here
    refusing.step()
    assert refusing.ledger.steps == 1


def test_two_optimizers_that_reduce_at_backward_cannot_hold_the_same_parameters() -> None:
    """The first one stays on them as long as somebody holds its base, since a reduction
    that is lost would be worse.
    """
    model = network()
    first = compressed(model, reduce_at="backward")
    ledger, base = first.ledger, first.base
    del first
    gc.collect()
    loss_of(model, 0).backward()
    # whoever holds the base alone, as an engine does, steps on averaged gradients
    base.step()
    assert ledger.steps == 1
    with pytest.raises(ConfigError, match=r"detach\(\)"):
        compressed(model, reduce_at="backward")
    base.zero_grad()
    del base
    gc.collect()
    second = compressed(model, reduce_at="backward")
    loss_of(model, 1).backward()
    second.step()
    assert ledger.steps == second.ledger.steps == 1


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
def test_an_optimizer_that_nobody_holds_is_gone_and_so_are_its_parameters(reduce_at: str) -> None:
    """Autograd holds hooks where the garbage collector does not look: what a hook held
    would never go.
    """
    model = network()
    optimizer = compressed(model, reduce_at=reduce_at)
    loss_of(model, 0).backward()
    optimizer.step()
    held = [weakref.ref(optimizer), weakref.ref(optimizer.base), weakref.ref(optimizer.reducer)]
    parameters = [weakref.ref(p) for p in model.parameters()]
    hooks = next(model.parameters())._post_accumulate_grad_hooks
    assert len(hooks) == 1
    del optimizer
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert len(hooks) == 0
    del model, hooks
    gc.collect()
    assert {ref() for ref in parameters} == {None}


@pytest.mark.parametrize("poisoned", [None, 1])
def test_reduction_at_the_end_of_backward(gloo: GlooPool, poisoned: int | None) -> None:
    """step() is left without collectives; a veto leaves NaN in p.grad on every rank, so
    that whoever looks at it skips.
    """
    for report in gloo.run(at_backward, 2, poisoned):
        assert report["inside_step"] == 0
        assert report["distance"] < 1e-12
        assert report["moved"] > 1e-3
        assert set(report["nan"]) == {poisoned is not None}
