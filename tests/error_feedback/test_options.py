"""Forms of error feedback that have no meaning or no effect are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_comm import Atomo, GaLore, PowerSGDPlus, RandomProjection
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError
from lowrank_comm.simulation import Simulation
from tests.support.feedback_runs import optimizer_of


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("form", {"form": "ef22"}),
        ("dtype", {"form": "ef21", "dtype": "bfloat16"}),
        ("rounding", {"form": "ef21", "rounding": "stochastic"}),
        ("offload", {"form": "none", "offload": True}),
        ("momentum", {"form": "ef21", "momentum": 0.5}),
        ("momentum", {"momentum": 0.5}),
        ("momentum", {"form": "ef21_sgdm", "momentum": 0.0}),
        ("momentum", {"form": "ef21_sgdm", "momentum": True}),
        ("rounds", {"rounds": 0}),
        ("rounds", {"rounds": 2.0}),
    ],
)
def test_what_has_no_meaning_is_refused(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"error_feedback\.{key}\b"):
        ErrorFeedback(**options)


@pytest.mark.parametrize(
    ("compressor", "options", "words"),
    [
        (PowerSGDPlus(2, consensus_restart=True), {"form": "ef21"}, "consensus_restart=True.*ef21"),
        (PowerSGDPlus(2, consensus_restart=True), {"form": "none"}, "consensus_restart=True.*none"),
        (PowerSGDPlus(2, exact_restart=True), {"rounds": 2}, "exact_restart=True.*rounds=2"),
        (GaLore(2, apply_full=True), {"rounds": 3}, "apply_full=True.*rounds=3"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(
    compressor: Compressor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Simulation({"w": (8, 6)}, compressor, 2, error_feedback=ErrorFeedback(**options))
    Simulation({"w": (8, 6)}, compressor, 2)


@pytest.mark.parametrize(
    "options", [{"form": "ef14"}, {"form": "ef21"}, {"form": "ef21_sgdm"}, {"rounds": 2}], ids=str
)
@pytest.mark.parametrize(
    "compressor",
    [Atomo(rank=2), RandomProjection(rank=2, form="unbiased")],
    ids=lambda c: c.json_name,
)
def test_an_unbiased_compressor_has_no_feedback_and_no_rounds(
    options: dict[str, Any], compressor: Compressor
) -> None:
    with pytest.raises(ConfigError, match="contractive"):
        optimizer_of(compressor, error_feedback=ErrorFeedback(**options)).plan  # noqa: B018
    assert ErrorFeedback().for_compressor(compressor).form == "none"
