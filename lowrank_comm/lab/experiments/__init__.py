"""The experiments by name. A module is imported when its experiment is asked for."""

from __future__ import annotations

import importlib

from lowrank_comm.errors import ConfigError, nearest
from lowrank_comm.lab.experiment import Experiment

EXPERIMENTS: dict[str, str] = {
    "counterexamples": "counterexamples:Counterexamples",
    "speedup": "speedup:Speedup",
    "language_model": "language_model:LanguageModel",
    "loss_per_byte": "loss_per_byte:LossPerByte",
    "loss_per_byte_long": "loss_per_byte:LongLossPerByte",
    "fine_tuning": "fine_tuning:FineTuning",
    "traffic": "traffic:Traffic",
    "scaling": "scaling:Scaling",
    "ablations": "ablations:Ablations",
}
"""Experiment name -> module:class in this package, in the order in which the lab lists
them.
"""


def experiment(name: str) -> Experiment:
    """Return the experiment of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(
            f"experiment {name!r} is unknown{nearest(name, EXPERIMENTS)} Known:"
            f" {', '.join(EXPERIMENTS)}."
        )
    module, kind = EXPERIMENTS[name].split(":")
    found = getattr(importlib.import_module(f".{module}", __name__), kind)()
    assert isinstance(found, Experiment)
    return found
