"""Tensors as one list of blocks, and back."""

from __future__ import annotations

import torch

from lowrank_comm.communication.blocks import Blocks


def test_every_matrix_has_blocks_of_its_own() -> None:
    """Also one that fills its blocks, one stored by columns, and none at all."""
    given = [
        torch.arange(1.0, 2 * 3 * 5 + 1).view(2, 3, 5),
        torch.arange(1.0, 8 * 2 + 1).view(1, 2, 8).mT,
        torch.ones(3),
        torch.ones(0),
    ]
    blocks = Blocks(given, block=8, multiple=3)
    # 15 numbers in each of two matrices, 16, 3, none; and 2 empty blocks
    assert blocks.lengths == [4, 2, 1, 0]
    assert (len(blocks), blocks.empty) == (9, 2)
    written = blocks.written(given)
    assert written.shape == (9, 8)
    assert torch.equal(written[1], torch.tensor([9.0, 10, 11, 12, 13, 14, 15, 0]))
    assert torch.equal(written[6], torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]))
    assert torch.count_nonzero(written[7:]) == 0
    assert torch.equal(blocks.counts(written), torch.tensor([8.0, 7, 8, 7, 8, 8, 3, 0, 0]))
    back = blocks.cut(written)
    assert all(torch.equal(one, other) for one, other in zip(back, given, strict=True))
    # views: what is written to them is in the blocks
    back[2].fill_(7)
    assert torch.equal(written[6, :4], torch.tensor([7.0, 7, 7, 0]))
