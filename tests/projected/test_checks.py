"""Settings and states that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_comm import ConfigError, ProjectedAdamW, StateMismatchError
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
