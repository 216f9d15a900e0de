"""A run with faults in every seventh step holds what it held at its beginning.

The campaign soaks 5 000 steps; here 400 are enough to see a leak of one object a step.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import FAULTS, growth, soak
from tests.faults.worker import Job
from tests.support.gloo import GlooPool

STEPS = 400


def case(rank: int, engine: str, folder: str) -> dict:
    """For the pool."""
    return soak(Job(engine, folder, steps=STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_nothing_grows(gloo: GlooPool, tmp_path: Path, engine: str) -> None:
    for found in gloo.run(case, 2, engine, str(tmp_path)):
        grown = growth(found["held"])
        assert grown["live tensors"] <= 5, found
        assert grown["file descriptors"] <= 2, found
        assert grown["threads"] <= 1, found
        # 100 bytes a step; a lost gradient a step would be 5 MB
        assert grown["RSS (kB)"] <= 2_000, found
        assert min(found["faults"][fault] for fault in FAULTS) >= 3
        print(f"{engine}: goodput {found['goodput']:.1%}, grown {grown}")
        # every fault but those of state dicts and saves costs its step
        assert 0.85 < found["goodput"] < 0.98
