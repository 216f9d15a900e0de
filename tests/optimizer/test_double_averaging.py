"""Gradients that an engine has averaged already are found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, PowerSGD
from tests.support.engines import WORLD, Net, loss_of, plain_names
from tests.support.gloo import GlooPool


def compressed(model: nn.Module, process_group: Any = None, **options: Any) -> CompressedOptimizer:
    base = torch.optim.SGD(plain_names(model).items(), lr=0.1)
    return CompressedOptimizer(base, PowerSGD(2), process_group, min_compression_rate=0, **options)


def never_attached(rank: int, how: str) -> str:
    """An engine that nobody told us of."""
    model: nn.Module = Net()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "native":
        fully_shard(
            model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        )
    elif how == "hooks":
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    optimizer = compressed(model)
    same = how == "same data"
    try:
        for step in range(2):
            loss_of(model, step, 0 if same else rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("how", ["ddp", "hooks"])
def test_gradients_that_an_engine_has_averaged_are_found_out(gloo: GlooPool, how: str) -> None:
    for said in gloo.run(never_attached, WORLD, how):
        assert "have averaged" in said or "has averaged" in said
        assert "attach(model)" in said


def test_sharded_parameters_need_attach(gloo: GlooPool) -> None:
    for said in gloo.run(never_attached, WORLD, "native"):
        assert "DTensor" in said
        assert "attach(model)" in said


@pytest.mark.parametrize("how", ["plain", "same data"])
def test_gradients_of_a_plain_model_are_not_suspected(gloo: GlooPool, how: str) -> None:
    assert gloo.run(never_attached, WORLD, how) == ["no error"] * WORLD
