"""Shapes of parameters and of their blocks."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.reduction.params import ParamInfo

CPU = torch.device("cpu")


def test_a_whole_parameter() -> None:
    info = ParamInfo("w", (6, 4), torch.float32, CPU)
    assert info.numel == 24
    assert info.block(IntraNodeGroup(), 0) == (6, 4)


def test_blocks_are_cut_along_their_dimension() -> None:
    node = IntraNodeGroup()
    node.size = 2
    info = ParamInfo("w", (4, 3), torch.float32, CPU, whole=(4, 5), dim=1)
    assert [info.block(node, rank) for rank in range(2)] == [(4, 3), (4, 2)]


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_computations_are_in_float32_at_least(dtype: torch.dtype, wider: torch.dtype) -> None:
    assert ParamInfo("w", (2,), dtype, CPU).compute_dtype == wider
