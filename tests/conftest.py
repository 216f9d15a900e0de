"""Fixtures that all tests share, and the rules of the suite: one thread, no network,
the checkout's own package.

`make test` runs the files in two processes side by side (pytest-xdist, --dist
loadfile): a file's tests stay together and in their order, each process has gloo
processes of its own, and ports, folders and clusters are each test's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from lowrank_comm.numerics.device import accelerator_path
from tests.support import ROOT
from tests.support.gloo import GlooPool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: builds, installs or trains for more than a few seconds"
    )
    torch.set_num_threads(1)


LONGEST = [
    "integrations/test_engines.py",
    "integrations/test_engine_runs.py",
    "integrations/test_deepspeed.py",
    "compressors/test_conformance.py",
    "examples/test_slurm.py",
    "integrations/test_transformers.py",
    "docs/test_quickstarts.py",
    "faults/test_sample.py",
    "integrations/test_deepspeed_levels.py",
    "integrations/test_engine_memory.py",
    "reduction/test_rehearsal.py",
    "reduction/test_restarts.py",
    "configs/test_configs.py",
    "examples/test_train_engines.py",
    "benchmarks/test_demo_cluster.py",
    "integrations/test_lightning.py",
]
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, the longest files come first, so that none is left for the end;
    else they stay in their order.
    """
    if hasattr(config, "workerinput"):
        place = {ROOT / "tests" / name: k for k, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """Four processes for the whole session: `gloo.run(case, world, *arguments)` gives
    the values by rank.
    """
    pool = GlooPool(4)
    yield pool
    pool.close()


@pytest.fixture(params=["cpu", "accelerator"])
def both_paths(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test on the CPU's path, and on the accelerator's with CPU tensors, in this
    process and in those of `gloo`. A module asks for it by `pytestmark`.
    """
    with accelerator_path() if request.param == "accelerator" else nullcontext():
        yield
