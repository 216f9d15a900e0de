"""Workers agree before they exchange anything: settings, steps, weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowrank_comm import CompressedOptimizer, ConfigMismatchError, Identity, PowerSGD, PowerSGDPlus
from tests.support.gloo import GlooPool


def disagree(rank: int, settings: list[dict[str, Any]]) -> str:
    """The error's text; each rank has settings of its own."""
    mine = dict(settings[rank % len(settings)])
    shapes = mine.pop("shapes", {"w": (12, 9), "b": (4,)})
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    base = mine.pop("base", torch.optim.SGD)(parameters.items(), lr=0.1)
    made = CompressedOptimizer(base, min_compression_rate=mine.pop("rate", 0), **mine)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    try:
        made.step()
    except ConfigMismatchError as error:
        assert not any(bool(p.any()) for p in parameters.values())
        return str(error)
    return "no error"


DIFFERENT = {
    "rank": ([{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(3)}], ["rank", "2", "3"]),
    "compressor": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGDPlus(2)}],
        ["compressor", "powersgd", "powersgd_plus"],
    ),
    "identity": (
        [{"compressor": PowerSGD(2)}, {"compressor": Identity()}],
        ["compressor", "powersgd", "identity"],
    ),
    "tau": (
        [{"compressor": PowerSGDPlus(2, 100)}, {"compressor": PowerSGDPlus(2, 200)}],
        ["restart_every", "100", "200"],
    ),
    "restart": (
        [{"compressor": PowerSGDPlus(2)}, {"compressor": PowerSGDPlus(2, restart="randomized")}],
        ["restart", "svd", "randomized"],
    ),
    "seed": (
        [{"compressor": PowerSGD(2), "seed": 1}, {"compressor": PowerSGD(2), "seed": 11}],
        ["seed", "1", "11"],
    ),
    "rate": (
        [{"compressor": PowerSGD(2), "rate": 0}, {"compressor": PowerSGD(2), "rate": 3}],
        ["min_compression_rate", "0", "3"],
    ),
    "wire": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(2), "wire_dtype": "bfloat16"}],
        ["wire_dtype", "None", "bfloat16"],
    ),
    "a shape": (
        [
            {"compressor": PowerSGD(2)},
            {"compressor": PowerSGD(2), "shapes": {"w": (12, 10), "b": (4,)}},
        ],
        ["parameters", "w", "(12, 9)", "(12, 10)"],
    ),
    "a parameter": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(2), "shapes": {"w": (12, 9)}}],
        ["parameters", "b", "absent"],
    ),
    "the base optimizer": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(2), "base": torch.optim.Adam}],
        ["optimizer", "SGD", "Adam"],
    ),
    "clipping": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(2), "max_grad_norm": 1.0}],
        ["max_grad_norm", "None", "1.0"],
    ),
    "the moment": (
        [{"compressor": PowerSGD(2), "reduce_at": "backward"}, {"compressor": PowerSGD(2)}],
        ["reduce_at", "backward", "step"],
    ),
    "a basis": (
        [
            {"compressor": PowerSGD(1), "initial_basis": {"w": torch.ones(9, 1)}},
            {"compressor": PowerSGD(1)},
        ],
        ["initial_basis"],
    ),
}


@pytest.mark.parametrize(("settings", "words"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_different_settings_on_two_ranks(
    gloo: GlooPool, settings: list[dict[str, Any]], words: list[str]
) -> None:
    """A ConfigMismatchError on every rank, within seconds, that names the field and
    both values; never a hang.
    """
    texts = gloo.run(disagree, 2, settings, timeout=20.0)
    assert texts[0] == texts[1]
    for word in words:
        assert word in texts[0], texts[0]


def loads_an_earlier_state(rank: int, of_rank: list[int]) -> str:
    """Three steps on, both ranks go back to an earlier one; with tau = 2, a restart is
    due on one of them only.
    """
    model = torch.nn.Linear(9, 12)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    made = CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1),
        PowerSGDPlus(2, 2),
        min_compression_rate=0,
    )

    def step() -> None:
        made.zero_grad()
        model(torch.ones(2, 9)).sum().backward()
        made.step()

    states = []
    for _ in range(3):
        step()
        made.consolidate_error_memory()
        states.append(copy.deepcopy(made.state_dict()))
    made.load_state_dict(states[of_rank[rank]])
    before = copy.deepcopy(model.state_dict())
    try:
        step()
    except ConfigMismatchError as error:
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        return str(error)
    return "no error"


def test_ranks_that_loaded_different_steps(gloo: GlooPool) -> None:
    texts = gloo.run(loads_an_earlier_state, 2, [1, 0], timeout=20.0)
    assert texts[0] == texts[1]
    assert "step: 2 on rank 0, 1 on rank 1" in texts[0]
    assert gloo.run(loads_an_earlier_state, 2, [1, 1], timeout=20.0) == ["no error"] * 2


def different_weights(rank: int, alike: bool) -> str:
    torch.manual_seed(0 if alike else rank)
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Linear(12, 3)).to(torch.bfloat16)
    made = CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    model(torch.ones(2, 9, dtype=torch.bfloat16)).sum().backward()
    try:
        made.step()
    except ConfigMismatchError as error:
        return str(error)
    return "no error"


def test_models_that_start_from_different_weights(gloo: GlooPool) -> None:
    """DDP broadcasts them; here nothing would, and every worker would train a model of
    its own without a word.
    """
    for text in gloo.run(different_weights, 3, False):
        assert (
            "values of the parameters (seed all workers alike, or broadcast the parameters from"
            " rank 0)" in text
        )
    assert gloo.run(different_weights, 3, True) == ["no error"] * 3


def test_one_rank_of_four_that_differs(gloo: GlooPool) -> None:
    """All four raise, also those that agree with one another."""
    same = {"compressor": PowerSGD(2)}
    for text in gloo.run(
        disagree, 4, [same, same, {"compressor": PowerSGD(4)}, same], timeout=20.0
    ):
        assert "rank" in text
        # who
        assert "rank 2" in text


def test_equal_settings_raise_nothing(gloo: GlooPool) -> None:
    assert gloo.run(disagree, 2, [{"compressor": PowerSGD(2)}]) == ["no error", "no error"]
