"""A run that does not get on: whose number it is, and how it ends on all workers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer, ConfigError, LowRankCommError, PowerSGDPlus
from tests.support.gloo import GlooPool
from tests.support.networks import compressed, loss_of, network


def number_of(optimizer: CompressedOptimizer, what: str) -> Tensor:
    state = optimizer.reducer.state
    return state.error_memory()["0.weight"] if what == "error" else state.bases_of("0.weight")["Q"]


def stuck(rank: int, what: str, value: float, reduce_at: str) -> tuple[int, str, int]:
    """Steps until the run ends, how it ends, and steps after a reset."""
    model = network()
    optimizer = compressed(
        model,
        compressor=PowerSGDPlus(2, restart_every=50),
        max_vetoes=4,
        wire_dtype="float32",
        reduce_at=reduce_at,
    )
    ended = ""
    for t in range(40):
        optimizer.zero_grad()
        if t == 3 and rank == 1 and what != "gradient":
            with torch.no_grad():
                number_of(optimizer, what).view(-1)[2] = value
        factor = value if what == "gradient" and t >= 3 and rank == 1 else 1.0
        try:
            (loss_of(model, t, rank) * factor).backward()
            optimizer.step()
        except LowRankCommError as error:
            ended = str(error)
            break
    optimizer.reducer.reset()
    for k in range(3):
        optimizer.zero_grad()
        loss_of(model, k, rank).backward()
        optimizer.step()
    return t, ended, optimizer.reducer.step


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
@pytest.mark.parametrize("what", ["error", "Q", "gradient"])
@pytest.mark.parametrize("value", [1e300, float("nan")])
def test_a_run_that_cannot_step_ends_on_all_ranks_and_says_whose_number_it_is(
    gloo: GlooPool, what: str, value: float, reduce_at: str
) -> None:
    called = {
        "error": "the error memory of 0.weight",
        "Q": "the state Q of 0.weight",
        "gradient": "the gradient of 0.weight",
    }
    for t, ended, after in gloo.run(stuck, 2, what, value, reduce_at):
        assert t == 6
        number = "" if what == "gradient" else f"{value:.3g}"
        assert f"on rank 1 {called[what]} holds {number}" in ended
        assert "on rank 0" not in ended
        assert ("reducer.reset()" in ended) == (what != "gradient")
        assert after == 3


def test_a_veto_names_the_number_and_a_step_ends_the_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    optimizer = compressed(model, max_vetoes=3)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        for t in range(12):
            optimizer.zero_grad()
            factor = 1.0 if t % 3 == 2 else torch.inf
            (loss_of(model, t) * factor).backward()
            optimizer.step()
    assert optimizer.reducer.step == 4
    assert "(2 in a row): on rank 0 the gradient of 0.weight holds" in caplog.text
    endless = compressed(network(), max_vetoes=None)
    for _ in range(30):
        endless.zero_grad()
        (loss_of(network(), 0) * torch.inf).backward()
        for p in endless.base.param_groups[0]["params"]:
            p.grad = torch.full_like(p, torch.nan)
        endless.step()
    assert endless.reducer.step == 0


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_scale_is_given_the_time_to_come_down(known: bool, reduce_at: str) -> None:
    """2^6 is lowered six times, each by some engines at the second veto only."""
    if reduce_at == "backward" and not known:
        pytest.skip("a scaler that is not known cannot go with averaging before step()")
    model = network(dtype=torch.float32)
    optimizer = compressed(model, max_vetoes=3, reduce_at=reduce_at)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    optimizer.attach(model, scaler=scaler if known else None)

    def step() -> None:
        optimizer.zero_grad()
        (scaler.scale(loss_of(model, 0)) * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(14):
        step()
    with pytest.raises(LowRankCommError, match="skipped 15 times in a row"):
        step()


def test_a_state_that_is_loaded_starts_the_count_anew() -> None:
    model = network()
    optimizer = compressed(model, max_vetoes=3)
    saved = optimizer.state_dict()

    def skip() -> None:
        (loss_of(model, 0) * torch.inf).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped

    for _ in range(4):
        skip()
        skip()
        optimizer.load_state_dict(saved)
        assert not optimizer.step_was_skipped
    skip()
    skip()
    with pytest.raises(LowRankCommError, match="skipped 3 times in a row"):
        skip()


def test_max_vetoes_is_a_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="max_vetoes=0 is not possible"):
        compressed(network(), max_vetoes=0)
    base = torch.optim.SGD(network().named_parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"lowrank_comm\.max_vetoes=0"):
        CompressedOptimizer.from_config(base, {"max_vetoes": 0})
