"""Blocks of rows inside a node, and its collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lowrank_comm import ConfigError
from lowrank_comm.communication.intra_node import IntraNodeGroup, block_of
from tests.support.gloo import GlooPool


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_are_those_of_torch_chunk(m: int, size: int) -> None:
    rows = torch.arange(m)
    chunks = rows.chunk(size)
    for rank in range(size):
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert rows[block_of(m, size, rank)].tolist() == expected


def test_a_rank_alone_is_its_own_node() -> None:
    alone = IntraNodeGroup()
    block = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(alone.whole_rows(block, 3, "factors"), block)
    assert torch.equal(alone.own(block[0], 0), block[0])
    assert not alone.whole_matrices
    assert not alone.bytes


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard_scope"):
        IntraNodeGroup(scope="row")


def blocks_together(rank: int) -> tuple[list[list[float]], list[float], float]:
    """Rows 0..4 in blocks of two, two and one; a sum in rank order; the bytes
    counted.
    """
    node = IntraNodeGroup(dist.group.WORLD, "matrix")
    whole = torch.arange(10.0).view(5, 2)
    rows = node.whole_rows(node.own(whole, 0)[None], 5, "factors")[0]
    counted = node.bytes["factors"]
    (total,) = node.sum_in_order([torch.tensor([1.0, float(rank)])], "control")
    return rows.tolist(), total.tolist(), counted


def test_three_ranks_hold_a_matrix_together(gloo: GlooPool) -> None:
    for rows, total, counted in gloo.run(blocks_together, 3):
        assert rows == torch.arange(10.0).view(5, 2).tolist()
        assert total == [3.0, 3.0]
        # the longest block: two rows of two float32
        assert counted == 16
