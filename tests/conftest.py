"""Fixtures that all tests share, and the rules of the suite: one thread, no network, the checkout's own package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from gloo import GlooPool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: builds, installs or trains for more than a few seconds")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """Four processes for the whole session: `gloo.run(case, world, *arguments)` gives the values by rank."""
    pool = GlooPool(4)
    yield pool
    pool.close()
