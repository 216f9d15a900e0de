"""Sharpness-aware minimisation, with a closure around a compressed optimizer and in two
calls inside of one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, Identity, PowerSGD
from tests.support.gloo import GlooPool
from tests.support.networks import distance, loss_of, network
from tests.support.sharpness_aware import InTwoCalls, SharpnessAware


def sharpness_aware(wrapped: bool, worker: int) -> torch.nn.Module:
    """Train by what the refusal says to write, or uncompressed on the mean loss."""
    model = network()

    def inner(groups: Any) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return CompressedOptimizer(sgd, Identity(), reduce_at="backward") if wrapped else sgd

    optimizer = SharpnessAware(model.named_parameters(), inner)
    for t in range(3):

        def closure(t: int = t) -> Any:
            workers = [worker] if wrapped else [0, 1]
            loss = sum(loss_of(model, t, one) for one in workers) / len(workers)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
    return model


def sharpness_aware_on_two(rank: int) -> float:
    return distance(sharpness_aware(True, rank), sharpness_aware(False, rank))


def test_sharpness_aware_around_a_compressed_optimizer(gloo: GlooPool) -> None:
    """The recipe of the refusal: gradients are the mean in both passes, in float64."""
    assert max(gloo.run(sharpness_aware_on_two, 2)) < 1e-12


def in_two_calls(rank: int, engine: str, compressor: Any, spikes: bool) -> list[Any]:
    """Parameters and errors after steps, of which one may have a gradient that is not
    finite, in the first or in the second call.
    """
    model = network()
    run = DistributedDataParallel(model) if engine == "ddp" else model
    optimizer: Any = InTwoCalls(model.named_parameters())
    if compressor is not None:
        optimizer = CompressedOptimizer(
            optimizer,
            compressor,
            min_compression_rate=0,
            reduce_at="backward" if engine == "backward" else None,
        )
        optimizer.attach(run)
    for t in range(4):
        if spikes and t in (1, 2):
            for name in ("first_step", "second_step"):
                bad = rank == 1 and (name == "second_step" or t == 2)
                (loss_of(run, t, rank) * (float("inf") if bad else 1.0)).backward()
                getattr(optimizer, name)(zero_grad=True)
            assert optimizer.step_was_skipped
        loss_of(run, t, rank).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(run, t, rank).backward()
        optimizer.second_step(zero_grad=True)
    found = [p.detach().clone() for p in model.parameters()]
    if compressor is not None:
        found += [e.clone() for _, e in sorted(optimizer.error_memory().items())]
    return found


@pytest.mark.parametrize("engine", ["step", "backward", "ddp"])
def test_sharpness_aware_in_two_calls(gloo: GlooPool, engine: str) -> None:
    """The uncompressed method under DDP, in float64; ranks stay equal under
    compression; a veto in either call leaves no trace.
    """
    expected = gloo.run(in_two_calls, 2, "ddp", None, False)[0]
    for found in gloo.run(in_two_calls, 2, engine, Identity(), False):
        for one, other in zip(found, expected, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    calm = gloo.run(in_two_calls, 2, engine, PowerSGD(2), False)
    wild = gloo.run(in_two_calls, 2, engine, PowerSGD(2), True)
    parameters = len(expected)
    assert all(map(torch.equal, calm[0][:parameters], calm[1][:parameters]))
    for one, other in zip(wild, calm, strict=True):
        assert all(map(torch.equal, one, other))
