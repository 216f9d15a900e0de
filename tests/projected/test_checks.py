"""Settings and states that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowrank_comm import ConfigError, ProjectedAdamW, StateMismatchError
from tests.support.gloo import GlooPool
from tests.support.projected_model import give, parameters, run

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rank": ({"rank": 0}, ["rank", "0"]),
    "lr": ({"lr": -1.0}, ["lr", "-1.0"]),
    "scale": ({"scale": 0.0}, ["scale", "above 0"]),
    "betas": ({"betas": (0.9, 1.0)}, ["betas", "below 1"]),
    "one beta": ({"betas": 0.9}, ["betas", "two numbers"]),
    "eps": ({"eps": "small"}, ["eps", "'small'"]),
    "tau": ({"restart_every": 0}, ["restart_every", "0"]),
    "projection": ({"projection": "svd"}, ["projection", "'svd'", "'galore'", "'golore'"]),
    "until": ({"galore_until": 10}, ["galore_until=10", '"golore"']),
    "side": ({"side": "left"}, ["side", "'left'"]),
    "first moment": ({"first_moment": "reset"}, ["first_moment", "'reset'", "'keep'"]),
    "second moment": ({"second_moment": "drop"}, ["second_moment", "'drop'", "'rotate'"]),
    "norm": ({"max_grad_norm": 0.0}, ["max_grad_norm", "above 0"]),
    "wire": ({"wire_dtype": "int8"}, ["wire_dtype", "'int8'"]),
    "seed": ({"seed": "a"}, ["seed", "'a'"]),
    "free": ({"free_gradients": 1}, ["free_gradients", "1"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_settings_are_refused_by_name(case: str) -> None:
    options, words = BAD[case]
    with pytest.raises(ConfigError) as error:
        ProjectedAdamW(parameters().items(), **options)
    assert all(word in str(error.value) for word in words)


def test_states_that_do_not_fit_are_refused_before_anything_is_changed() -> None:
    held = parameters()
    optimizer = ProjectedAdamW(held.items(), rank=3)
    run(optimizer, held, 2)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in held.items()}
    other = parameters()
    plain = torch.optim.AdamW(other.values())
    give(other, 0)
    plain.step()
    with pytest.raises(StateMismatchError, match="not one of ProjectedAdamW"):
        optimizer.load_state_dict(plain.state_dict())
    long = ProjectedAdamW(other.items(), rank=3, side="long")
    run(long, other, 1)
    with pytest.raises(StateMismatchError, match="side='short'"):
        optimizer.load_state_dict(long.state_dict())
    assert all(
        torch.equal(optimizer.state[held[name]]["exp_avg"], value) for name, value in before.items()
    )
    assert optimizer.t == 2


# --- states that are damaged, and other names ---

DAMAGE: dict[str, Any] = {
    "nan": lambda state: state["state"][0]["exp_avg"].view(-1)[1].fill_(float("nan")),
    "infinite projector": lambda state: state["state"][0]["projector"].fill_(float("inf")),
    "no tensor": lambda state: state["state"][0].update(exp_avg="x"),
    "another shape": lambda state: state["state"][0].update(exp_avg=torch.ones(3, 3)),
    "steps": lambda state: state["param_groups"][0].update(t=float("nan")),
    "negative steps": lambda state: state["param_groups"][0].update(t=-1),
    "words for steps": lambda state: state["param_groups"][0].update(t="two"),
}


def contents(optimizer: ProjectedAdamW) -> list[Any]:
    return [
        value.clone() for state in optimizer.state.values() for _, value in sorted(state.items())
    ]


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_with_nothing_touched(what: str) -> None:
    held = parameters()
    optimizer = ProjectedAdamW(held.items(), rank=3)
    run(optimizer, held, 2)
    state = copy.deepcopy(optimizer.state_dict())
    DAMAGE[what](state)
    run(optimizer, held, 1)
    before = contents(optimizer)
    with pytest.raises(StateMismatchError):
        optimizer.load_state_dict(state)
    assert all(map(torch.equal, contents(optimizer), before))
    assert optimizer.t == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("prefix", ["module.", "net.", None])
def test_other_names_load_by_order_and_are_kept(prefix: str | None) -> None:
    held, other = parameters(), parameters()
    first = ProjectedAdamW(held.items(), rank=3)
    run(first, held, 2)
    named = other.values() if prefix is None else [(prefix + n, p) for n, p in other.items()]
    second = ProjectedAdamW(named, rank=3)
    names = second.param_groups[0].get("param_names")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0].get("param_names") == names
    assert all(map(torch.equal, contents(second), contents(first)))
    run(second, other, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")], ids=str)
def test_state_that_is_not_finite_is_not_given_out(bad: float) -> None:
    held = parameters()
    optimizer = ProjectedAdamW(held.items(), rank=3)
    run(optimizer, held, 2)
    name, parameter = next(iter(held.items()))
    optimizer.state[parameter]["exp_avg"].view(-1)[1] = bad
    with pytest.raises(StateMismatchError, match=f"exp_avg of {name} holds {abs(bad)}"):
        optimizer.state_dict()


def refused_on_one(rank: int) -> tuple[str, bool]:
    held = parameters()
    optimizer = ProjectedAdamW(held.items(), rank=3)
    run(optimizer, held, 2)
    state = copy.deepcopy(optimizer.state_dict())
    if rank == 1:
        DAMAGE["nan"](state)
    before = contents(optimizer)
    try:
        optimizer.load_state_dict(state)
    except StateMismatchError as error:
        return str(error), all(map(torch.equal, contents(optimizer), before))
    return "loaded", False


def test_a_refusal_on_one_rank_is_told_to_all(gloo: GlooPool) -> None:
    for said, unchanged in gloo.run(refused_on_one, 2):
        assert said.startswith("rank 1: the saved exp_avg of a parameter of shape")
        assert "is not finite" in said
        assert unchanged
