"""GradScaler: an overflow on one rank skips the step on all, and the error memory is
free of the scale.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import LowRankCommError, PowerSGD, PowerSGDPlus
from tests.support.gloo import GlooPool
from tests.support.reference import gradient
from tests.support.vetoes import BAD_STEP, STEPS, Run


def scaled(
    rank: int, unscale_first: bool, bad_rank: int, attached: bool, reduce_at: str
) -> dict[str, Any]:
    """Training through torch.amp.GradScaler; at one step the loss overflows on one rank
    only. The twin has neither scaler nor bad step.
    """
    run = Run(PowerSGDPlus(2, restart_every=3), reduce_at=reduce_at)
    twin = Run(PowerSGDPlus(2, restart_every=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    if attached:
        run.optimizer.attach(run.model, scaler=scaler)

    def loss(one: Run, t: int) -> Tensor:
        return sum(
            (p * torch.as_tensor(gradient(tuple(p.shape), t, rank, k), dtype=p.dtype)).sum()
            for k, p in enumerate(one.parameters.values())
        )

    def train(t: int, factor: float = 1.0) -> None:
        run.optimizer.zero_grad()
        scaler.scale(loss(run, t) * factor).backward()
        if unscale_first:
            scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()

    report: dict[str, Any] = {"distance": [], "scales": []}
    for t in range(STEPS):
        if t == BAD_STEP:
            before = run.state()
            train(100, torch.inf if rank == bad_rank else 1.0)
            report["untouched"] = run.state() == before
        train(t)
        twin.optimizer.zero_grad()
        loss(twin, t).backward()
        twin.optimizer.step()
        report["scales"].append(scaler.get_scale())
        report["distance"].append(
            max(
                float((p - q).detach().abs().max())
                for p, q in zip(run.parameters.values(), twin.parameters.values(), strict=True)
            )
        )
        report["error_distance"] = max(
            float((e - twin.optimizer.error_memory()[name]).abs().max())
            for name, e in run.optimizer.error_memory().items()
        )
    report["moved"] = all(bool(p.data.any()) for p in run.parameters.values())
    return report


@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale_ then step"])
@pytest.mark.parametrize("attached", [True, False], ids=["attach(scaler=)", "scaler unknown"])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_grad_scaler_with_an_overflow_on_one_rank(
    gloo: GlooPool, unscale_first: bool, attached: bool, bad_rank: int
) -> None:
    """All ranks skip, nothing hangs, and the error memory is free of the scale. With
    the scaler made known to attach(), all scales stay equal; otherwise only the bad
    rank lowers its own, which changes nothing else, since each rank unscales by its
    own.
    """
    reports = gloo.run(scaled, 2, unscale_first, bad_rank, attached, "step")
    for rank, report in enumerate(reports):
        assert report["untouched"]
        lowered = 2.0**11 if attached or rank == bad_rank else 2.0**12
        assert report["scales"] == [2.0**12] * BAD_STEP + [lowered] * (STEPS - BAD_STEP)
        assert max(report["distance"]) < 1e-5
        assert report["error_distance"] < 1e-5
        assert report["moved"]


@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale_ then step"])
def test_grad_scaler_when_the_reduction_is_at_the_end_of_backward(
    gloo: GlooPool, unscale_first: bool
) -> None:
    """The gradients carry the scale when they are reduced; a veto leaves NaN
    everywhere, which every rank's scaler finds.
    """
    for report in gloo.run(scaled, 2, unscale_first, 1, True, "backward"):
        assert report["untouched"]
        assert report["scales"] == [2.0**12] * BAD_STEP + [2.0**11] * (STEPS - BAD_STEP)
        assert max(report["distance"]) < 1e-5
        assert report["error_distance"] < 1e-5


def test_a_reduction_with_a_scale_that_nobody_knew_of_is_told() -> None:
    """reduce_gradients() before step(), with a scaler that attach() was not told of:
    the scale is in the error memory.
    """
    run = Run(PowerSGD(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(sum((p * (k + 1)).sum() for k, p in enumerate(run.parameters.values()))).backward()
    run.optimizer.reduce_gradients()
    with pytest.raises(LowRankCommError, match=r"attach\(model, scaler=scaler\)"):
        scaler.step(run.optimizer)


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
def test_a_scale_that_is_taken_out_after_the_reduction_is_told_too(reduce_at: str) -> None:
    """As Trainer and Accelerate do: unscale_, clip, step. The scale would be in the
    error memory without a word.
    """
    run = Run(PowerSGD(2), reduce_at=reduce_at)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(sum((p * (k + 1)).sum() for k, p in enumerate(run.parameters.values()))).backward()
    run.optimizer.reduce_gradients()
    scaler.unscale_(run.optimizer)
    with pytest.raises(LowRankCommError, match=r"attach\(model, scaler=scaler\)"):
        scaler.step(run.optimizer)


def test_a_scaler_that_is_switched_off_is_none() -> None:
    run = Run(PowerSGD(2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.optimizer.attach(run.model, scaler=scaler)
    for factor in (1.0, torch.nan, 1.0):
        run.give(0, 0, factor)
        run.optimizer.reduce_gradients()
        scaler.step(run.optimizer)
        scaler.update()
    assert (run.optimizer.ledger.vetoed, run.optimizer.reducer.step) == (1, 2)


def no_gradients_on_rank_1(rank: int) -> tuple[float, bool]:
    run = Run(PowerSGD(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run.optimizer.attach(run.model, scaler=scaler)
    loss = scaler.scale(sum((p * (k + 1)).sum() for k, p in enumerate(run.parameters.values())))
    if rank == 0:
        loss.backward()
    scaler.step(run.optimizer)
    scaler.update()
    return scaler.get_scale(), all(bool(p.data.any()) for p in run.parameters.values())


def test_a_scaler_on_a_rank_without_any_gradient(gloo: GlooPool) -> None:
    """torch's scaler insists on having looked at some gradient; what the others sent is
    applied here too.
    """
    assert gloo.run(no_gradients_on_rank_1, 2) == [(2.0**12, True)] * 2
