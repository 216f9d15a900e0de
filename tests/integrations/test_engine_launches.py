"""What a step of each engine costs an accelerator, counted on its path: at most one
launch more for each further matrix of a shape, whatever the engine.

Counted is what the library does from gradients to averaged gradients, and its commit;
not what an engine or the base optimizer does with them.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, PowerSGD
from lowrank_comm.numerics.device import accelerator_path
from tests.support.gloo import GlooPool
from tests.support.launches import count

DIM, WORLD, LAYERS = 16, 4, (4, 12)
# a shape may cost 60 launches (two levels twice as many: into the node and back)
A_SHAPE, HOST_READS = 120, {False: 2, True: 4}

ENGINES = [
    "plain",
    "plain, two levels, shard",
    "plain, two levels, matrix",
    "DDP",
    "FSDP2, flat",
    "HSDP, shard",
    "HSDP, matrix",
    *(f"ZeRO-{stage}" for stage in (1, 2, 3)),
    "ZeRO-1, two levels",
]


def model_of(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(layers)))


def of_torch(engine: str, layers: int) -> tuple[int, int]:
    model = model_of(layers)
    two_levels = "two levels" in engine or "HSDP" in engine
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if engine == "DDP":
        model = DistributedDataParallel(model)
    elif "FSDP2" in engine or "HSDP" in engine:
        for unit in (*model, model):
            fully_shard(unit, mesh=mesh["shard"] if two_levels else None)
    base = torch.optim.SGD(model.named_parameters(), lr=0.0, foreach=True)
    options: dict[str, Any] = {"process_group": mesh} if two_levels else {}
    if "matrix" in engine:
        options["shard_scope"] = "matrix"
    optimizer = CompressedOptimizer(
        base, PowerSGD(2), min_compression_rate=0, reduce_at="step", **options
    )
    optimizer.attach(model)
    for step in range(3):
        model(torch.randn(4, DIM)).square().mean().backward()
        if step == 2:
            counted = count(lambda: (optimizer.reduce_gradients(), optimizer.reducer.commit()))
            return counted.launches, counted.host_reads
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError


def of_deepspeed(engine: str, layers: int) -> tuple[int, int]:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    import deepspeed

    from lowrank_comm.integrations import deepspeed as ours

    section: dict[str, Any] = {"compressor": "powersgd", "rank": 2, "min_compression_rate": 0}
    if "two levels" in engine:
        section["topology"] = {"shard_size": 2}
    made = deepspeed.initialize(
        model=model_of(layers),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": int(engine[5])},
            "lowrank_comm": section,
        },
        dist_init_required=False,
    )[0]
    adapter: Any = ours.get(made)
    reduce, seen = adapter._levels.reduce, []

    def counting(*arguments: Any) -> Any:
        outcome: list[Any] = []
        seen.append(count(lambda: outcome.append(reduce(*arguments))))
        return outcome[0]

    adapter._levels.reduce = counting
    for _ in range(3):
        made.backward(made(torch.randn(4, DIM)).square().mean())
        made.step()
    return seen[-1].launches, seen[-1].host_reads


Counts = dict[str, list[tuple[int, int]]]


def case(rank: int, engines: list[str]) -> Counts:
    """Engine -> (launches, host reads) with few layers, and with many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            engine: [(of_deepspeed if "ZeRO" in engine else of_torch)(engine, n) for n in LAYERS]
            for engine in engines
        }


@pytest.fixture(scope="module")
def counts(gloo: GlooPool) -> list[Counts]:
    """By rank. DeepSpeed remembers the process group of its first engine, and gets
    processes of its own.
    """
    zero = [engine for engine in ENGINES if "ZeRO" in engine]
    with accelerator_path():
        by_rank: list[Counts] = gloo.run(case, WORLD, [e for e in ENGINES if e not in zero])
        if importlib.util.find_spec("deepspeed"):
            own = GlooPool(WORLD)
            try:
                for one, more in zip(by_rank, own.run(case, WORLD, zero, timeout=180), strict=True):
                    one |= more
            finally:
                own.close()
    return by_rank


@pytest.mark.parametrize("engine", ENGINES)
def test_one_launch_a_matrix(counts: list[Counts], engine: str) -> None:
    if engine not in counts[0]:
        pytest.skip("DeepSpeed is not installed")
    for of_rank in counts:
        (few, few_reads), (many, many_reads) = of_rank[engine]
        assert many - few <= LAYERS[1] - LAYERS[0]
        assert few <= A_SHAPE
        assert few_reads == many_reads <= HOST_READS["two levels" in engine or "HSDP" in engine]
