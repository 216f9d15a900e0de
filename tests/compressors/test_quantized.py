"""Quantization around a compressor: combinations that are refused."""

from __future__ import annotations

import pytest

from lowrank_comm import Acp, Atomo, Compressor, GoLore, Identity, PowerSGD, RandomProjection
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.simulation import Simulation


@pytest.mark.parametrize(
    ("compressor", "quantization", "words"),
    [
        (Atomo(2), Quantization(factors="int8"), "quantization.factors='int8'.*atomo.*gathered"),
        (Atomo(2), Quantization(restart="int4"), "quantization.restart='int4'.*atomo.*gathered"),
        (
            RandomProjection(2, form="unbiased"),
            Quantization(factors="int8"),
            "nearest.*random_projection.*stochastic",
        ),
        (
            PowerSGD(2),
            Quantization(restart="int8"),
            "quantization.restart='int8'.*powersgd.*leave it out",
        ),
        (Acp(2), Quantization(restart="int8"), "quantization.restart='int8'.*acp.*leave it out"),
        (
            GoLore(2),
            Quantization(restart="int4"),
            "quantization.restart='int4'.*golore.*leave it out",
        ),
        (
            Identity(),
            Quantization(factors="int8"),
            "quantization.factors='int8'.*identity.*quantization.dense='int8'",
        ),
    ],
    ids=[
        "gathered factors",
        "gathered restarts",
        "a bias that nothing takes back",
        "no restarts",
        "no restarts asked for",
        "restarts that send nothing",
        "nothing low-rank",
    ],
)
def test_codes_that_do_not_suit_the_compressor_are_refused(
    compressor: Compressor, quantization: Quantization, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Simulation({"w": (8, 6)}, compressor, 2, quantization=quantization)
    Simulation({"w": (8, 6)}, compressor, 2, quantization=Quantization(dense="int8"))
