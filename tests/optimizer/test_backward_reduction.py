"""Reduction at the end of the backward pass."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import ConfigError, LowRankCommError, UnsupportedError
from tests.support.gloo import GlooPool
from tests.support.networks import batch, compressed, distance, loss_of, network


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
