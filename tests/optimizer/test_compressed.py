"""CompressedOptimizer: full rank is uncompressed training, one reduction a step,
clipping, closures, missing gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from tests.support.gloo import GlooPool
from tests.support.networks import BASES, compressed, distance, every_base, loss_of, network
from tests.support.reference import gradient


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


def test_a_loop_that_compresses_nothing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody has attached the model, which prints the plan."""
    for attached in (False, True):
        model = network()
        optimizer = CompressedOptimizer(BASES["SGD"](model.named_parameters()), PowerSGD(99))
        if attached:
            optimizer.attach(model)
        for t in range(2):
            loss_of(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()
    lines = [one.getMessage() for one in caplog.records if "nothing is" in one.getMessage()]
    assert len(lines) == 1
    assert "0.weight (rate" in lines[0]


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
