"""Bad input is a clear error before training starts: in Python, in the JSON section,
and between ranks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    Identity,
    LowRankCommError,
    PowerSGD,
    PowerSGDPlus,
)
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import Section
from lowrank_comm.reduction.policy import Rule
from tests.support.gloo import GlooPool

FULL = {
    "compressor": "powersgd_plus",
    "rank": 4,
    "restart_every": 200,
    "restart": "svd",
    "exact_restart": False,
    "consensus_restart": True,
    "stagger": True,
    "error_feedback": {"dtype": None, "rounding": "nearest", "offload": False},
    "wire_dtype": None,
    "min_compression_rate": 2,
    "rules": [{"match": "lm_head.*", "treatment": "dense"}, {"match": "*.embed.weight", "rank": 2}],
    "seed": 7,
    "topology": {"shard_size": 1},
}


def test_the_documented_section() -> None:
    section = Section.parse(json.loads(json.dumps(FULL)))
    assert section.make_compressor() == PowerSGDPlus(
        4, restart_every=200, restart="svd", consensus_restart=True, stagger=True
    )
    options = section.reducer_options()
    assert options["seed"] == 7
    assert options["min_compression_rate"] == 2.0
    assert [rule.match for rule in options["rules"]] == ["lm_head.*", "*.embed.weight"]


@pytest.mark.parametrize(
    ("section", "compressor"),
    [
        ({}, PowerSGDPlus(16, restart_every=200, restart="randomized")),
        ({"compressor": "powersgd_plus"}, PowerSGDPlus(4, restart_every=200)),
        ({"compressor": "powersgd"}, PowerSGD(4)),
        ({"compressor": "powersgd", "rank": 2}, PowerSGD(2)),
        (
            {"compressor": "powersgd_plus", "rank": 2, "restart": "randomized"},
            PowerSGDPlus(2, restart="randomized"),
        ),
        ({"compressor": "identity"}, Identity()),
    ],
)
def test_defaults(section: dict[str, Any], compressor: Compressor) -> None:
    assert Section.parse(section).make_compressor() == compressor


BAD = {
    "the object around it": (
        {"lowrank_comm": {"rank": 4}},
        ["lowrank_comm.lowrank_comm is not a known key", "give what stands under"],
    ),
    "unknown key": ({"restart_evry": 100}, ["restart_evry", "restart_every"]),
    "unknown key, no rank": ({"rnak": 4}, ["rnak", "'rank'"]),
    "unknown key in error_feedback": (
        {"error_feedback": {"dtyp": None}},
        ["error_feedback.dtyp", "'dtype'"],
    ),
    "unknown key in a rule": (
        {"rules": [{"match": "a", "treatmnt": "dense"}]},
        ["treatmnt", "'treatment'"],
    ),
    "rule without a pattern": ({"rules": [{"treatment": "dense"}]}, ["match"]),
    "rank 0": ({"rank": 0}, ["rank", "0"]),
    "rank negative": ({"rank": -3}, ["rank", "-3"]),
    "rank not an integer": ({"rank": 2.5}, ["rank", "2.5"]),
    "rank a float that is whole": ({"rank": 4.0}, ["rank", "4.0"]),
    "rank a bool": ({"rank": True}, ["rank", "True"]),
    "rank a string": ({"rank": "4"}, ["rank", "'4'"]),
    "rank null": ({"rank": None}, ["rank", "None"]),
    "rank auto": ({"rank": "auto"}, ["rank", "auto"]),
    "tau not an integer": ({"restart_every": 10.5}, ["restart_every", "10.5"]),
    "tau a bool": ({"restart_every": True}, ["restart_every", "True"]),
    "tau 0": ({"restart_every": 0}, ["restart_every", "0"]),
    "tau negative": ({"restart_every": -1}, ["restart_every", "-1"]),
    "tau auto": ({"restart_every": "auto"}, ["restart_every", "auto"]),
    "unknown compressor": ({"compressor": "powersgd_pluss"}, ["powersgd_pluss", "powersgd_plus"]),
    "unknown compressor, far off": ({"compressor": "zip"}, ["zip", "powersgd", "identity"]),
    "compressor auto": ({"compressor": "auto"}, ["compressor", "auto"]),
    "unknown restart": ({"restart": "svdd"}, ["svdd", "svd", "randomized"]),
    "a key of another compressor": (
        {"compressor": "powersgd", "restart_every": 5},
        ["restart_every", "powersgd_plus"],
    ),
    "options that contradict": (
        {"restart": "randomized", "exact_restart": True},
        ["exact_restart", "svd"],
    ),
    "negative rate": ({"min_compression_rate": -0.5}, ["min_compression_rate", "-0.5"]),
    "rate nan": ({"min_compression_rate": float("nan")}, ["min_compression_rate", "nan"]),
    "rate auto": ({"min_compression_rate": "auto"}, ["min_compression_rate", "auto"]),
    "rate a bool": ({"min_compression_rate": True}, ["min_compression_rate", "True"]),
    "unknown wire dtype": ({"wire_dtype": "float8"}, ["wire_dtype", "float8"]),
    "wire dtype auto": ({"wire_dtype": "auto"}, ["wire_dtype", "auto"]),
    "error memory in float16": (
        {"error_feedback": {"dtype": "float16"}},
        ["error_feedback.dtype", "float16"],
    ),
    "error dtype auto": ({"error_feedback": {"dtype": "auto"}}, ["error_feedback.dtype", "auto"]),
    "rounding unknown": ({"error_feedback": {"rounding": "up"}}, ["rounding", "up"]),
    "treatment unknown": (
        {"rules": [{"match": "a", "treatment": "dence"}]},
        ["treatment", "dence"],
    ),
    "seed a float": ({"seed": 1.5}, ["seed", "1.5"]),
    "shard size": ({"topology": {"shard_size": 0}}, ["shard_size", "0"]),
    "shard size a word": ({"topology": {"shard_size": "host"}}, ["shard_size", "host", "node"]),
    "shard scope": ({"topology": {"shard_scope": "rows"}}, ["shard_scope", "rows", "matrix"]),
    "bool for a number": ({"stagger": 1}, ["stagger", "1"]),
}


@pytest.mark.parametrize(("section", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_section_is_named(section: dict[str, Any], words: list[str]) -> None:
    """The error names the key and the value, is a ValueError too, and comes from
    parse() alone: nothing has been started by then.
    """
    with pytest.raises(ConfigError) as caught:
        Section.parse(section)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LowRankCommError)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("section", [None, [], "powersgd", 4])
def test_a_section_that_is_no_object(section: Any) -> None:
    with pytest.raises(ConfigError, match="lowrank_comm"):
        Section.parse(section)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PowerSGD(rank=0), ["rank", "0"]),
        (lambda: PowerSGD(rank=-1), ["rank", "-1"]),
        (lambda: PowerSGD(rank=1.5), ["rank", "1.5"]),
        (lambda: PowerSGD(rank=True), ["rank", "True"]),
        (lambda: PowerSGD(rank=None), ["rank", "None"]),
        (lambda: PowerSGDPlus(rank="auto"), ["rank", "auto"]),
        (lambda: PowerSGDPlus(4, restart_every=0), ["restart_every", "0"]),
        (lambda: PowerSGDPlus(4, restart_every=2.0), ["restart_every", "2.0"]),
        (lambda: PowerSGDPlus(4, restart_every=True), ["restart_every", "True"]),
        (lambda: PowerSGDPlus(4, restart_every=None), ["restart_every", "None"]),
        (lambda: PowerSGDPlus(4, restart="svdd"), ["restart", "svdd", "randomized"]),
        (lambda: PowerSGDPlus(4, stagger="yes"), ["stagger", "yes"]),
        (
            lambda: PowerSGDPlus(4, restart="randomized", consensus_restart=True),
            ["consensus_restart", "svd"],
        ),
        (
            lambda: PowerSGDPlus(4, exact_restart=True, consensus_restart=True),
            ["exact_restart", "consensus_restart"],
        ),
        (lambda: optimizer(min_compression_rate=-1), ["min_compression_rate", "-1"]),
        (lambda: optimizer(min_compression_rate="auto"), ["min_compression_rate", "auto"]),
        (lambda: optimizer(seed=0.5), ["seed", "0.5"]),
        (lambda: optimizer(wire_dtype="float8"), ["wire_dtype", "float8"]),
        (lambda: optimizer(max_grad_norm=-1.0), ["max_grad_norm", "-1.0"]),
        (lambda: optimizer(max_grad_norm=0), ["max_grad_norm", "0"]),
        (lambda: optimizer(reduce_at="sometimes"), ["reduce_at", "sometimes", "step"]),
        (lambda: optimizer(max_grad_norm=True), ["max_grad_norm", "True"]),
        (lambda: optimizer(seed=2**64), ["seed", str(2**64), "64 bits"]),
        (lambda: optimizer(rules=[{"match": "a"}]), ["rules", "Rule", "'match'"]),
        (lambda: optimizer(rules=[Rule(3)]), ["match=3", "pattern"]),
        (
            lambda: optimizer(error_feedback={"dtype": "bfloat16"}),
            ["error_feedback", "ErrorFeedback", "bfloat16"],
        ),
        (lambda: optimizer(process_group="workers"), ["process_group", "workers", "DeviceMesh"]),
        (
            lambda: (
                CompressedOptimizer(
                    torch.optim.SGD(
                        [("z", torch.nn.Parameter(torch.ones(6, 8, dtype=torch.complex64)))]
                    ),
                    PowerSGD(2),
                ).plan
            ),
            ["z", "complex64"],
        ),
        (
            lambda: optimizer(initial_basis={"weigth": torch.ones(3, 2)}).plan,
            ["initial_basis", "weigth"],
        ),
        (
            lambda: optimizer(initial_basis={"weight": torch.ones(8, 2)}).plan,
            ["initial_basis", "weight", "6"],
        ),
        (lambda: CompressedOptimizer(torch.nn.Linear(6, 8), compressor=PowerSGD(2)), ["Linear"]),
        (
            lambda: CompressedOptimizer(
                torch.optim.LBFGS([torch.nn.Parameter(torch.ones(6, 8))]), PowerSGD(2)
            ),
            ["optimizer=LBFGS", "use SGD"],
        ),
        (
            lambda: CompressedOptimizer(
                torch.optim.SGD([torch.nn.Parameter(torch.ones(6, 8))]), compressor="powersgd"
            ),
            ["powersgd"],
        ),
    ],
)
def test_bad_arguments_are_named(build: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def optimizer(**options: Any) -> CompressedOptimizer:
    model = torch.nn.Linear(6, 8)
    return CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1),
        **({"compressor": PowerSGD(2), "min_compression_rate": 0} | options),
    )


def test_a_section_makes_an_optimizer() -> None:
    model = torch.nn.Linear(60, 50)
    made = CompressedOptimizer.from_config(
        torch.optim.SGD(model.named_parameters(), lr=0.1),
        {"compressor": "powersgd", "rank": 2, "seed": 5},
        max_grad_norm=1.0,
    )
    model(torch.ones(3, 60)).sum().backward()
    made.step()
    assert set(made.error_memory()) == {"weight"}
    assert made.last_report.bytes["factors"] == 4 * 2 * (60 + 50)
    with pytest.raises(ConfigError, match="'rank'"):
        CompressedOptimizer.from_config(
            torch.optim.SGD(model.named_parameters(), lr=0.1), {"rnk": 2}
        )


def outside_of_the_group(rank: int) -> str:
    group = torch.distributed.new_group([0])
    try:
        optimizer(process_group=group)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_rank_that_is_not_in_the_group_is_told(gloo: GlooPool) -> None:
    inside, outside = gloo.run(outside_of_the_group, 2)
    assert inside == "no error"
    assert "this rank is not a member of the group" in outside


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"compressor": ["powersgd"]}, r"compressor=\['powersgd'\] is unknown"),
        ({"compressor": {}}, r"compressor=\{\} is unknown"),
        ({5: 1}, "the key 5 is no word"),
    ],
)
def test_a_name_that_is_no_text_is_an_error_of_ours(section: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Section.parse(section)
    with pytest.raises(ConfigError, match=words):
        CompressedOptimizer.from_config(
            torch.optim.SGD(torch.nn.Linear(4, 4).parameters()), section
        )
