"""Workers agree before they exchange anything: settings, steps, weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowrank_comm import (
    CompressedOptimizer,
    ConfigMismatchError,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    __version__,
)
from lowrank_comm.communication import workers
from tests.support.gloo import GlooPool


def disagree(rank: int, settings: list[dict[str, Any]]) -> str:
    """The error's text; each rank has settings of its own."""
    mine = dict(settings[rank % len(settings)])
    shapes = mine.pop("shapes", {"w": (12, 9), "b": (4,)})
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    base = mine.pop("base", torch.optim.SGD)(parameters.items(), **{"lr": 0.1} | mine.pop("of", {}))
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
        [
            {"compressor": PowerSGDPlus(2, restart="svd")},
            {"compressor": PowerSGDPlus(2, restart="randomized")},
        ],
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
    "the learning rate": (
        [{"compressor": PowerSGD(2)}, {"compressor": PowerSGD(2), "of": {"lr": 0.2}}],
        ["param_groups[0].lr: 0.1 on rank 0, 0.2 on rank 1"],
    ),
    "betas": (
        [
            {"compressor": PowerSGD(2), "base": torch.optim.AdamW},
            {
                "compressor": PowerSGD(2),
                "base": torch.optim.AdamW,
                "of": {"betas": (0.9, 0.99), "weight_decay": 0.5, "lr": torch.tensor(0.5)},
            },
        ],
        ["param_groups[0].betas", "0.99", "param_groups[0].weight_decay", "param_groups[0].lr"],
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


def versions(rank: int) -> str:
    """Rank 1 has another version of the library."""
    workers.__version__ = f"0.1.{rank}"  # type: ignore[attr-defined]
    try:
        return disagree(rank, [{"compressor": PowerSGD(2)}])
    finally:
        workers.__version__ = __version__  # type: ignore[attr-defined]


def test_another_version_of_the_library_is_refused(gloo: GlooPool) -> None:
    for text in gloo.run(versions, 2):
        assert "version of lowrank_comm: '0.1.0' on rank 0, '0.1.1' on rank 1" in text


def differ(rank: int, how: str) -> str:
    """Rank 1 has the same numbers, in another order or with exchanged signs."""
    w = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    if rank == 1:
        w = {
            "rows": w.flip(0),
            "transposed": w.t().reshape(12, 9),
            "two numbers": w.flatten()[[1, 0, *range(2, 108)]].view(12, 9),
            "signs": torch.where(torch.arange(9) < 2, -w, w),
        }[how]
    parameter = torch.nn.Parameter(w.contiguous())
    made = CompressedOptimizer(torch.optim.SGD([("w", parameter)], lr=0.1), PowerSGD(2))
    parameter.grad = torch.ones_like(parameter)
    try:
        made.step()
    except ConfigMismatchError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("how", ["rows", "transposed", "two numbers", "signs"])
def test_values_in_other_places_are_different_values(gloo: GlooPool, how: str) -> None:
    for text in gloo.run(differ, 2, how):
        assert "values of the parameters" in text
