"""What each engine's ranks hold is what the plan says, within five percent: measured
from allocations in ordinary steps, in one that restarts all matrices, in a save and in
a load, on the accelerator's path. (Both paths, and more settings:
`tests/reduction/test_rehearsal.py`.)
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest

from lowrank_comm.numerics.device import accelerator_path
from tests.support.gloo import GlooPool
from tests.support.memory_cases import CLOSE, Figures, of_deepspeed, of_torch

WORLD = 4
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, two levels, shard": {},
    "plain, two levels, matrix": {},
    "DDP": {},
    "FSDP2, flat": {},
    "FSDP2, flat, bfloat16 memory": {"error_feedback": {"dtype": "bfloat16"}},
    "FSDP2, flat, offload": {"error_feedback": {"offload": True}},
    "HSDP, shard": {},
    "HSDP, matrix": {},
    "ZeRO-1": {},
    "ZeRO-1, two levels": {},
    "ZeRO-3": {},
    "ZeRO-3, bfloat16 memory": {"error_feedback": {"dtype": "bfloat16"}},
    "ZeRO-3, offload": {"error_feedback": {"offload": True}},
}


def case(rank: int, engines: list[str], folder: Path) -> dict[str, Figures]:
    found = {}
    with warnings.catch_warnings(), accelerator_path():
        warnings.simplefilter("ignore")
        for engine in engines:
            measure = of_deepspeed if "ZeRO" in engine else of_torch
            found[engine] = measure(engine, str(folder / engine), ENGINES[engine])
    return found


@pytest.fixture(scope="module")
def found(gloo: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    """By rank. DeepSpeed remembers the process group of its first engine, and gets
    processes of its own.
    """
    folder = tmp_path_factory.mktemp("saves")
    zero = [engine for engine in ENGINES if "ZeRO" in engine]
    others = [engine for engine in ENGINES if engine not in zero]
    by_rank: list[dict[str, Figures]] = gloo.run(case, WORLD, others, folder, timeout=180)
    if importlib.util.find_spec("deepspeed"):
        own = GlooPool(WORLD)
        try:
            of_zero = own.run(case, WORLD, zero, folder, timeout=180)
        finally:
            own.close()
        for one, more in zip(by_rank, of_zero, strict=True):
            one |= more
    return by_rank


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_holds_what_the_plan_says(found: list[dict[str, Figures]], engine: str) -> None:
    if engine not in found[0]:
        pytest.skip("DeepSpeed is not installed")
    for rank, figures in enumerate(one[engine] for one in found):
        assert figures.keys() == {"step", "restart", "save", "load"}
        for phase, (measured, planned) in figures.items():
            assert planned == pytest.approx(measured, rel=CLOSE), (rank, phase)
