"""The toy experiment, registered for a test."""

from __future__ import annotations

import sys
import types

import pytest

from lowrank_comm.lab.experiments import EXPERIMENTS
from tests.support.toy_experiment import Toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    module = types.ModuleType("lowrank_comm.lab.experiments.toy")
    module.Toy = Toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(EXPERIMENTS, "toy", "toy:Toy")
    Toy.ran = []
    return Toy
