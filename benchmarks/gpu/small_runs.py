"""Small trainings for the checks: one model under every engine, and the simulation on
the CPU that it must equal.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.device import Device
from lowrank_comm import CompressedOptimizer
from lowrank_comm.communication.intra_node import block_of
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation

# rows that do not divide by the ranks, and gradients of full rank
DIM, HIDDEN, OUT, BATCH = 32, 54, 5, 64
SEED = 3
# of the optimizer and of the simulation
SETTINGS: dict[str, Any] = {"min_compression_rate": 0, "seed": SEED}
OF_THE_ENGINE = {"overlap", "bucket_cap_mb"}


class Net(nn.Module):
    """Two residual blocks between two layers, with biases and a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, DIM)) for _ in "ab"
        )
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, OUT)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(
                    torch.randn(p.shape, generator=generator) / DIM**0.5
                    if p.dim() > 1
                    else torch.ones_like(p)
                )

    def forward(self, x: Tensor) -> Tensor:
        """x + block(x), twice."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        engine: "plain", "ddp", "flat" (FSDP2), or "native" (FSDP2 on a 2-D mesh).
        compressor: None for the exact mean.
        nodes: for two levels; 0 for one.
        options: further ones of `CompressedOptimizer`.
    """

    engine: str
    compressor: Compressor | None
    nodes: int = 0
    scope: str = "shard"
    steps: int = 6
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trained:
    """What a run ended with. early: most buckets that had begun when a backward pass
    reached its end.
    """

    parameters: dict[str, Tensor]
    losses: list[float]
    early: int = 0
    buckets: int = 0


def data(step: int, worker: int) -> tuple[Tensor, Tensor]:
    """One worker's batch, drawn on the CPU: the same numbers wherever it is used."""
    generator = torch.Generator().manual_seed(100_000 + 1_000 * step + worker)
    x = torch.randn(BATCH, DIM, generator=generator)
    return x, torch.tanh(x[:, :OUT] + x[:, OUT : 2 * OUT])


def loss_of(
    model: Callable[[Tensor], Tensor],
    step: int,
    worker: int,
    device: Device,
    dtype: Any = torch.float32,
) -> Tensor:
    """Mean squared error of one worker."""
    x, y = (tensor.to(device.device) for tensor in data(step, worker))
    return (model(x.to(dtype)).float() - y).square().mean()


def base_of(named: Any) -> torch.optim.Optimizer:
    """Momentum, so that a wrong gradient shows in later steps too."""
    return torch.optim.SGD(named, lr=0.05, momentum=0.9)


def mesh_of(run: Run, device: Device) -> DeviceMesh:
    """Return the mesh of all ranks: of one dimension, or of nodes and their ranks."""
    if run.nodes:
        shape = (run.nodes, device.world // run.nodes)
        return init_device_mesh(device.kind, shape, mesh_dim_names=("replicate", "shard"))
    # init_device_mesh of some versions makes a group of NCCL here, whatever the
    # backend of this one, and NCCL refuses two ranks on one GPU
    world = dist.group.WORLD
    assert world is not None
    return DeviceMesh.from_group(world, device.kind, mesh_dim_names=("all",))


def wrapped(run: Run, device: Device) -> tuple[nn.Module, Any]:
    """Return the model as its engine wants it, and the process_group of the
    optimizer.
    """
    model = Net().to(device=device.device, dtype=run.dtype)
    if run.engine == "plain":
        return model, None
    mesh = mesh_of(run, device)
    if run.engine == "ddp":
        return DistributedDataParallel(model), mesh if run.nodes else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, None


def engine_works(run: Run, device: Device) -> None:
    """Make a step under the run's engine without this library, which raises where the
    backend has not what the engine needs.
    """
    model, _ = wrapped(run, device)
    loss_of(model, 0, device.rank, device, run.dtype).backward()
    base_of(model.named_parameters()).step()
    device.wait()


def train(run: Run, device: Device) -> Trained:
    """Train compressed on this rank's device, on the path of an accelerator."""
    assert run.compressor is not None
    with device.path():
        model, group = wrapped(run, device)
        base = base_of([(name.removeprefix("module."), p) for name, p in model.named_parameters()])
        optimizer = CompressedOptimizer(
            base, run.compressor, group, shard_scope=run.scope, **SETTINGS, **run.options
        )
        quietly(lambda: optimizer.attach(model))
        began: list[int] = []
        reducer = optimizer.reducer
        reduce = reducer.reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            began.append(reducer.begun)
            return reduce(*args, **kwargs)

        reducer.reduce = counting  # type: ignore[method-assign]
        losses = []
        for step in range(run.steps):
            loss = loss_of(model, step, device.rank, device, run.dtype)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        trained = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
        optimizer.detach()
    return Trained(trained, losses, max(began), len(reducer.state.buckets))


def quietly(attach: Callable[[], object]) -> None:
    """Without the plan that rank 0 prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        attach()


def whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU; a collective where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of parameters; infinite where one is not
    finite.
    """
    assert a.keys() == b.keys()
    differences = torch.stack([(a[name] - b[name]).abs().max() for name in a])
    return float(torch.nan_to_num(differences, nan=torch.inf).max())


def spread(parameters: dict[str, Tensor], device: Device) -> float:
    """The largest difference between the ranks; 0 if all hold the same numbers."""
    mine = torch.cat([p.detach().double().reshape(-1) for p in parameters.values()]).to(
        device.device
    )
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(torch.nan_to_num(most - least, nan=torch.inf).max())


def simulated(run: Run, world: int) -> dict[str, Tensor]:
    """The same training in this process, on the CPU: nodes (or ranks) as workers."""
    cpu = Device("cpu", torch.device("cpu"), "CPU")
    model = Net()
    optimizer = base_of(model.named_parameters())
    workers = run.nodes or world
    average = averages(
        run,
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        workers,
        world // workers,
    )
    for step in range(run.steps):
        gradients = []
        for rank in range(world):
            model.zero_grad()
            loss_of(model, step, rank, cpu).backward()
            gradients.append(
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            )
        ranks = world // workers
        for name, gradient in average(
            [mean(gradients[k * ranks : (k + 1) * ranks]) for k in range(workers)]
        ).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
    return {name: whole(p) for name, p in model.named_parameters()}


def mean(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The exact one."""
    return {name: torch.stack([one[name] for one in gradients]).mean(0) for name in gradients[0]}


def averages(
    run: Run, shapes: dict[str, tuple[int, ...]], workers: int, ranks: int
) -> Callable[[list[dict[str, Tensor]]], dict[str, Any]]:
    """The nodes' gradients -> what all apply; with shard_scope="shard" each rank's
    block of rows is a matrix of its own.
    """
    if run.compressor is None:
        return mean
    options = SETTINGS | {k: v for k, v in run.options.items() if k not in OF_THE_ENGINE}
    if ranks == 1 or run.scope == "matrix":
        return Simulation(shapes, run.compressor, workers, **options).reduce
    blocks = [
        {
            name: rows
            for name, shape in shapes.items()
            if (rows := block_of(shape[0], ranks, f)).stop > rows.start
        }
        for f in range(ranks)
    ]
    simulations = [
        Simulation(
            {name: (rows.stop - rows.start, *shapes[name][1:]) for name, rows in block.items()},
            run.compressor,
            workers,
            **options,
        )
        for block in blocks
    ]

    def average(nodes: list[dict[str, Tensor]]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [
            simulation.reduce(
                [{name: node[name][rows] for name, rows in block.items()} for node in nodes]
            )
            for block, simulation in zip(blocks, simulations, strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in shapes}

    return average
