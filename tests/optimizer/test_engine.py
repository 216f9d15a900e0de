"""attach() on a plain model, and models that it cannot serve."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    PowerSGD,
    StateMismatchError,
    UnsupportedError,
)
from tests.support.networks import compressed, loss_of, network


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
