"""Whole parameters' state where the ranks of a node hold blocks: who keeps it, how
long, and in which dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lowrank_comm import CompressedOptimizer, ErrorFeedback, PowerSGD, checkpoint
from tests.support.gloo import GlooPool

ROWS = 5


def trained(model: nn.Module, **options: Any) -> CompressedOptimizer:
    """A step by one node of all ranks; the last of four holds no row of the first
    matrix.
    """
    mesh = init_device_mesh("cpu", (1, torch.distributed.get_world_size()))
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = CompressedOptimizer(base, PowerSGD(2), mesh, min_compression_rate=0, **options)
    step(model, optimizer)
    return optimizer


def step(model: nn.Module, optimizer: CompressedOptimizer) -> None:
    model(torch.ones(1, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, ROWS), nn.Linear(ROWS, 8))


def narrow_memory(rank: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    optimizer = trained(network(), error_feedback=ErrorFeedback(dtype="bfloat16"))
    optimizer.consolidate_error_memory()
    state = optimizer.state_dict()["state"].values()
    errors = [one["lowrank_comm_error"] for one in state if "lowrank_comm_error" in one]
    return [(error.dtype, tuple(error.shape)) for error in errors]


def test_a_rank_without_rows_gathers_in_the_dtype_of_the_others(gloo: GlooPool) -> None:
    """It had float32 for the others' bfloat16, at which gloo ended the process."""
    of_all = [(torch.bfloat16, (ROWS, 8)), (torch.bfloat16, (8, ROWS))]
    assert gloo.run(narrow_memory, 4) == [of_all] * 4


def who_keeps_it(rank: int, folder: str) -> dict[str, bool]:
    model = network()
    optimizer = trained(model)
    state, found = optimizer.reducer.state, {}
    optimizer.consolidate_error_memory()
    found["for its state dict"] = state.whole is not None
    step(model, optimizer)
    found["after the next step"] = state.whole is not None
    checkpoint.save_all(folder, model, optimizer)
    found["for save_all"] = state.whole is not None
    return found


def test_a_whole_copy_is_kept_where_and_while_it_is_needed(gloo: GlooPool, tmp_path: Any) -> None:
    for rank, found in enumerate(gloo.run(who_keeps_it, 2, str(tmp_path))):
        assert found == {
            "for its state dict": True,
            "after the next step": False,
            "for save_all": rank == 0,
        }
