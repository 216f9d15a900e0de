"""Who is a worker: a rank, or a node of several ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lowrank_comm import ConfigError
from lowrank_comm.communication.topology import (
    covered_ranks,
    grid,
    levels,
    ranks_in_a_node,
    timeout_of,
)
from tests.support.gloo import COLLECTIVE_TIMEOUT, GlooPool


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_launcher_tells_the_ranks_in_a_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(each, raising=False)
    assert ranks_in_a_node() is None
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        grid("node")
    monkeypatch.setenv(name, "4")
    assert ranks_in_a_node() == 4


def test_nodes_of_one_rank_need_no_grid() -> None:
    assert grid(1) is None
    for bad in (0, -2, 1.5, True):
        with pytest.raises(ConfigError, match="shard_size"):
            grid(bad)
    with pytest.raises(ConfigError, match="init_process_group"):
        grid(2)


def in_a_grid(rank: int) -> tuple[int, int, int, int, list[int], str]:
    """This rank's places between and inside nodes of two; the refusal of
    nodes of three.
    """
    mesh = grid(2)
    between, inside = levels(mesh, "matrix")
    try:
        grid(3)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    return between.size, between.rank, inside.size, inside.rank, covered_ranks(mesh), refusal


def timeouts(rank: int) -> tuple[Any, Any]:
    short = dist.new_group([0, 1], timedelta(seconds=7))
    return timeout_of(None), timeout_of(short)


def test_groups_that_are_made_beside_another_wait_as_long(gloo: GlooPool) -> None:
    assert gloo.run(timeouts, 2) == [(COLLECTIVE_TIMEOUT, timedelta(seconds=7))] * 2


def test_four_ranks_are_two_nodes_of_two(gloo: GlooPool) -> None:
    for rank, found in enumerate(gloo.run(in_a_grid, 4)):
        assert found[:4] == (2, rank // 2, 2, rank % 2)
        assert found[4] == [0, 1, 2, 3]
        assert "cannot be cut into nodes of 3" in found[5]
