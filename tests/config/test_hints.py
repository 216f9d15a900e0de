"""A key or a word that is nearly right is an error that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_comm import Acp, CompressedOptimizer, ConfigError, PowerSGD, PowerSGDPlus
from lowrank_comm.config import Section


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"compressor": "powersgd+"}, ["'powersgd+' is unknown; did you mean 'powersgd_plus'?"]),
        ({"compressor": "PowerSGD+"}, ["did you mean 'powersgd_plus'?"]),
        ({"compressor": "PowerSGDPlus"}, ["did you mean 'powersgd_plus'?"]),
        ({"compressor": "PowerSGD"}, ["'PowerSGD' is unknown; did you mean 'powersgd'?"]),
        ({"compressor": "ACP-SGD"}, ["did you mean 'acp'?"]),
        ({"compressor": "Marina-P"}, ["did you mean 'marina_p'?"]),
        ({"compressor": "none"}, ["did you mean 'identity'?"]),
        ({"tau": 100}, ["lowrank_comm.tau is not a known key; did you mean 'restart_every'?"]),
        ({"matrix_approximation_rank": 2}, ["did you mean 'rank'?"]),
        ({"error_feedback": "ef21"}, ["error_feedback='ef21'", '{"form": "ef21"}']),
        ({"error_feedback": False}, ['{"form": "none"}']),
        ({"error_feedback": {"form": "ef22"}}, ["error_feedback.form='ef22'", "did you mean"]),
        ({"quantization": "int8"}, ['{"dense": "int8"}']),
        ({"topology": "node"}, ['{"shard_size": "node"}']),
        ({"shard_size": 8}, ['write "topology": {"shard_size": 8}']),
        ({"offload": True}, ['write "error_feedback": {"offload": true}']),
        ({"rules": {"match": "a"}}, ["write a list of rules"]),
        ({"restart_every": 0}, ["restart_every=0", 'use the compressor "powersgd"']),
        ({"compressor": "acp", "restart_every": 0}, ["leave it out for no restarts"]),
        ({"restart": "svdd"}, ['one of "auto", "svd"', "did you mean 'svd'?"]),
        ({"enabled": "no"}, ["enabled='no'", "True or False"]),
        ({"rank": 0, "seed": "a", "rnk": 1}, ["rank=0", "seed='a'", "did you mean 'rank'?"]),
    ],
)
def test_a_section(section: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Section.parse(section)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PowerSGDPlus(4, restart_every=0), "for no restarts use .*PowerSGD"),
        (lambda: Acp(4, restart_every=0), "leave it out for no restarts"),
        (lambda: PowerSGDPlus(restart="svdd"), r"one of 'auto', 'svd', .*did you mean 'svd'\?"),
        (lambda: optimizer(error_feedback="ef21"), r'ErrorFeedback\(form="ef21"\)'),
        (lambda: optimizer(quantization="int8"), r'Quantization\(dense="int8"\)'),
        (lambda: optimizer("powersgd+"), r"did you mean PowerSGDPlus\(rank=4\)\?"),
        (lambda: optimizer("PowerSGD"), r"did you mean PowerSGD\(rank=4\)\?"),
        (lambda: optimizer(PowerSGD), r"did you mean PowerSGD\(rank=4\)\?"),
    ],
)
def test_in_python(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def optimizer(compressor: Any = None, **options: Any) -> object:
    base = torch.optim.SGD(torch.nn.Linear(6, 8).named_parameters(), lr=0.1)
    made = CompressedOptimizer(base, compressor or PowerSGD(2), **options)
    return made.plan


@pytest.mark.parametrize("compressor", ["powersgd_plus", "galore", "greedylore"])
def test_null_is_no_value_of_a_setting_that_needs_one(compressor: str) -> None:
    """Who means "never" by it must not get the default."""
    with pytest.raises(ConfigError, match=r"restart_every=None is not possible") as told:
        Section.parse({"compressor": compressor, "restart_every": None})
    assert compressor != "powersgd_plus" or '"powersgd"' in str(told.value)


def test_what_is_not_meant_for_settings_is_left_out() -> None:
    """`$schema`, `enabled`, and options that are null."""
    section = {"$schema": "lowrank_comm.schema.json", "enabled": True, "probes": None}
    assert Section.parse(section) == Section.parse({})
