"""The reducer is built when it is needed: parameters that are added or frozen."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.reduction.policy import Rule
from tests.support.networks import compressed, loss_of, network


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


def test_frozen_parameters_have_no_part() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = compressed(model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert set(optimizer.error_memory()) == {"2.weight"}
    assert torch.equal(model[0].weight, network()[0].weight)


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
    assert f"error memory {delta / 1e3:.2f} kB; beside it " in str(plan)
    nothing = compressed(model, compressor=PowerSGD(1000), min_compression_rate=2).plan
    assert "nothing is compressed; the largest: 0.weight (rate" in str(nothing)


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
