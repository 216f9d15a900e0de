"""Fixtures that all tests share, and the rules of the suite: one thread, no network,
the checkout's own package.

`make test` runs the files in two processes side by side (pytest-xdist, --dist
loadfile): a file's tests stay together and in their order, each process has gloo
processes of its own, and ports, folders and clusters are each test's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from gloo import GlooPool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: builds, installs or trains for more than a few seconds"
    )
    torch.set_num_threads(1)


LONGEST = (
    "test_deepspeed", "test_slurm", "test_trainer", "test_quickstarts", "test_deepspeed_levels", "test_engines",
    "test_engine_runs", "test_configs", "test_examples_engines", "test_demo_cluster", "test_lightning",
)  # fmt: skip
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, the longest files come first, so that none is left for the end;
    else they stay in their order.
    """
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: (
                LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
            )
        )


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """Four processes for the whole session: `gloo.run(case, world, *arguments)` gives
    the values by rank.
    """
    pool = GlooPool(4)
    yield pool
    pool.close()
