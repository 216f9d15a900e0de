"""A process group as the reducer sees it."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.communication.group import Group
from tests.support.gloo import GlooPool

CPU = torch.device("cpu")


def test_a_process_alone_is_one_worker() -> None:
    group = Group()
    buffer = torch.tensor([2.0])
    assert (group.initialised, group.size, group.rank) == (False, 1, 0)
    assert group.sum_([buffer]) == 0
    assert buffer.tolist() == [2.0]
    assert group.gather_bytes(b"text", CPU) == [b"text"]


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be None, a ProcessGroup or a 1-D DeviceMesh"):
        Group("gloo")


def together(rank: int) -> tuple[int, list[float], list[bytes]]:
    """A sum of two buffers, one of them empty; payloads of unequal lengths."""
    group = Group()
    buffers = [torch.tensor([float(rank)]), torch.empty(0)]
    return group.sum_(buffers), buffers[0].tolist(), group.gather_bytes(b"x" * rank, CPU)


def test_sums_and_payloads_over_gloo(gloo: GlooPool) -> None:
    for collectives, total, payloads in gloo.run(together, 3):
        # an empty buffer needs none
        assert collectives == 1
        assert total == [3.0]
        assert payloads == [b"", b"x", b"xx"]
