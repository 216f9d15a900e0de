"""Engines under one harness: the same small model, data and optimizer in each, and the
simulation that they must equal.

`train` runs in gloo processes, with compression or with the engine's own averaging;
`simulated` does the same in one process from the paper's algorithm. The model has what
trips up sharding: rows that do not divide by the ranks, biases, a LayerNorm, a layer
whose gradient has less than full rank, and (on request) tied and unused parameters.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.communication import intra_node as shards
from lowrank_comm.communication.intra_node import block_of
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation

DIM, HIDDEN, OUT = 12, 18, 5

BATCH = 8


class Block(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def body(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + (
            checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        )


class Net(nn.Module):
    """12 -> 5 with two residual blocks. `idle` is a layer that no forward uses;
    `at_times`: two layers, one of a single row, that every second forward uses, from
    the first on; `tied`: the head's weight is the first's.
    """

    def __init__(
        self,
        recompute: bool = False,
        idle: bool = False,
        tied: bool = False,
        at_times: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, DIM if tied else OUT)
        if idle:
            self.idle = nn.Linear(DIM, 7)
        self.at_times, self.forwards = at_times, 0
        if at_times:
            self.many, self.single = nn.Linear(DIM, OUT), nn.Linear(DIM, 1)
        if tied:
            self.head.weight = self.first.weight
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(
                    torch.randn(p.shape, generator=generator) / DIM**0.5
                    if p.dim() > 1
                    else torch.ones_like(p)
                )
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for block in self.blocks:
            x = block(x)
        self.forwards += 1
        extra = self.many(x) + self.single(x) if self.at_times and self.forwards % 2 else 0.0
        return self.head(self.norm(x))[:, :OUT] + extra


def loss_of(model: Callable[[Tensor], Tensor], step: int, worker: int, micro: int = 0) -> Tensor:
    """The loss of one worker on its own data."""
    generator = torch.Generator().manual_seed(100_000 + 1_000 * step + 10 * worker + micro)
    x = torch.randn(BATCH, DIM, generator=generator)
    y = torch.randn(BATCH, OUT, generator=generator)
    return ((model(x).float() - y) ** 2).mean()


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    engine: "plain", "ddp", "flat" (FSDP2), "hsdp" (the sub-mesh given to fully_shard),
        "native" (the 2-D mesh given).
    nodes: for two levels; 0 for one. compressor: None for the engine's own averaging.
    """

    engine: str
    compressor: Compressor | None = None
    nodes: int = 0
    scope: str = "shard"
    steps: int = 6
    micro: int = 1
    # by the caller, between backward and step
    clip: float | None = None
    adam: bool = False
    # of CompressedOptimizer
    options: dict[str, Any] = field(default_factory=dict)
    # of DDP or fully_shard
    wrap: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    # tells the engine which backward pass is the last one of a step
    says: bool = True
    lr: float = 0.05
    # step -> how a further batch, with gradients 1000 times as large, is given up
    # before it; see `give_up`
    spikes: dict[int, str] = field(default_factory=dict)

    def base(self, named: Any) -> torch.optim.Optimizer:
        return (
            torch.optim.AdamW(named, lr=self.lr / 5)
            if self.adam
            else torch.optim.SGD(named, lr=self.lr, momentum=0.9)
        )


def mesh_of(setup: Setup) -> Any:
    return init_device_mesh(
        "cpu",
        (setup.nodes, dist.get_world_size() // setup.nodes),
        mesh_dim_names=("replicate", "shard"),
    )


def wrapped(setup: Setup) -> tuple[nn.Module, Any]:
    """The model as the engine wants it, and the process_group of the optimizer."""
    model = Net(**setup.model)
    mesh = mesh_of(setup) if setup.nodes else None
    if setup.engine == "plain":
        return model, mesh
    if setup.engine == "ddp":
        return DistributedDataParallel(model, **setup.wrap), mesh
    over = {"flat": None, "hsdp": mesh and mesh["shard"], "native": mesh}[setup.engine]
    kwargs = dict(setup.wrap)
    if "mp" in kwargs:
        kwargs["mp_policy"] = MixedPrecisionPolicy(**kwargs.pop("mp"))
    units: list[Any] = [*model.blocks]
    if not setup.model.get("tied"):
        units.append([model.norm, model.head])
    for unit in units:
        fully_shard(unit, mesh=over, **kwargs)
    if setup.compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    fully_shard(model, mesh=over, **kwargs)
    return model, mesh if setup.engine == "hsdp" else None


@contextlib.contextmanager
def accumulating(setup: Setup, model: nn.Module, optimizer: Any, last: bool) -> Iterator[None]:
    """What a user of the engine writes around a micro-batch."""
    if not setup.says:
        yield
    elif setup.engine == "ddp":
        with contextlib.nullcontext() if last else model.no_sync():  # type: ignore[operator]
            yield
    elif setup.engine == "native":
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        yield
    elif setup.engine in ("flat", "hsdp"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    elif isinstance(optimizer, CompressedOptimizer) and not last:
        with optimizer.no_sync():
            yield
    else:
        yield


def backward(loss: Tensor, optimizer: Any) -> int:
    """A backward pass. How many buckets had begun when it reached its end, before the
    rest is begun there.
    """
    if not isinstance(optimizer, CompressedOptimizer):
        loss.backward()
        return 0
    reducer, begun = optimizer.reducer, [0]
    reduce = reducer.reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        begun[0] = reducer.begun
        return reduce(*args, **kwargs)

    reducer.reduce = counting  # type: ignore[method-assign]
    try:
        loss.backward()
    finally:
        del reducer.reduce
    return begun[0]


@contextlib.contextmanager
def counted(between: Any, inside: Any) -> Iterator[Counter[str]]:
    """Bytes that this process hands to the collectives of two groups, counted where
    torch is called; whoever calls.
    """
    ranks = {
        tuple(dist.get_process_group_ranks(group)): name
        for name, group in (("between", between), ("inside", inside))
    }
    seen: Counter[str] = Counter()
    originals = [
        (dist, "all_reduce"),
        (shards, "_all_gather"),
        (shards, "_reduce_scatter"),
        (dist, "all_gather"),
    ]

    def counting(call: Callable[..., Any], which: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group") or dist.group.WORLD
            name = ranks.get(tuple(dist.get_process_group_ranks(group)), "elsewhere")
            seen[name] += args[which].nbytes
            return call(*args, **kwargs)

        return wrapped

    kept = [getattr(module, name) for module, name in originals]
    for (module, name), call in zip(originals, kept, strict=True):
        setattr(module, name, counting(call, 0 if name == "all_reduce" else 1))
    try:
        yield seen
    finally:
        for (module, name), call in zip(originals, kept, strict=True):
            setattr(module, name, call)


def give_up(model: nn.Module, optimizer: Any, how: str) -> None:
    """Give the gradients of a batch up, averaged or not, as users do."""
    if how == "after reduce_gradients":
        optimizer.reduce_gradients()
    if how == "optimizer.zero_grad":
        optimizer.zero_grad()
    elif how == "zeros":
        model.zero_grad(set_to_none=False)
    elif how == "step without gradients":
        model.zero_grad()
        optimizer.step()
    elif how == "an exception":
        with pytest.raises(RuntimeError, match="non-finite"):
            for p in model.parameters():
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                local.mul_(torch.inf)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.zero_grad()
    else:
        for p in model.parameters():
            p.grad = None


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def plain_names(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module.").replace("_orig_mod.", ""): p
        for name, p in model.named_parameters()
    }


def train(rank: int, setup: Setup) -> dict[str, Any]:
    """One run in this process; what it ended with."""
    model, process_group = wrapped(setup)
    optimizer: Any = setup.base(plain_names(model).items())
    plan = None
    if setup.compressor is not None:
        options = {"min_compression_rate": 0, "seed": 3, **setup.options}
        if process_group is not None:
            options.update(process_group=process_group)
        optimizer = CompressedOptimizer(
            optimizer, setup.compressor, shard_scope=setup.scope, **options
        )
        plan = optimizer.attach(model)
    elif setup.engine in ("plain", "hsdp"):
        raise AssertionError("has no averaging of its own over all ranks")
    losses, norms, reports, early, carried = [], [], [], [], []
    groups = [dist.group.WORLD, dist.group.WORLD]
    if setup.nodes:
        mesh = mesh_of(setup)
        groups = [mesh.get_group(0), mesh.get_group(1)]
    for step in range(setup.steps):
        if step in setup.spikes:
            with accumulating(setup, model, optimizer, True):
                (1000 * loss_of(model, 100 + step, rank)).backward()
            give_up(model, optimizer, setup.spikes[step])
        total = 0.0
        counting = contextlib.ExitStack()
        seen = counting.enter_context(counted(*groups))
        for micro in range(setup.micro):
            with accumulating(setup, model, optimizer, micro == setup.micro - 1):
                loss = loss_of(model, step, rank, micro) / setup.micro
                early.append(backward(loss, optimizer))
            total += loss.item()
        if setup.clip is not None:
            if setup.engine == "plain" and setup.options.get("reduce_at") != "backward":
                optimizer.reduce_gradients()
            norm = nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
            norms.append(float(full(norm)))
        optimizer.step()
        counting.close()
        carried.append(dict(seen))
        optimizer.zero_grad()
        losses.append(total)
        if setup.compressor is not None:
            reports.append(optimizer.last_report.as_dict())
    result = {
        "losses": losses,
        "norms": norms,
        "parameters": {name: full(p) for name, p in plain_names(model).items()},
        "reports": reports,
        "early": early,
        "carried": carried,
        "plan": None
        if plan is None
        else (str(plan), plan.step_bytes, plan.average_bytes, plan.error_bytes),
    }
    if setup.compressor is not None:
        memory = optimizer.error_memory()
        result["errors"] = {name: full(e) for name, e in memory.items()}
        result["local errors"] = {
            n: tuple((e.to_local() if isinstance(e, DTensor) else e).shape)
            for n, e in memory.items()
        }
        optimizer.detach()
    return result


def simulated(
    setup: Setup, world: int, then: Setup | None = None, at: int = 0, lost: str = ""
) -> dict[str, Any]:
    """The same training in this process: nodes (or ranks) as workers, their gradients
    averaged by `Simulation`. `then`, `at`: saved at this step and gone on with so, see
    `goes_on`.
    """
    model = Net(**setup.model)
    optimizer = setup.base(model.named_parameters())
    workers = setup.nodes or world
    ranks = world // workers
    average = _averages(setup, model, workers, ranks)
    losses: list[list[float]] = [[] for _ in range(world)]
    norms = []
    for step in range(setup.steps):
        if then is not None and step == at:
            workers = then.nodes or world
            old, ranks = average, world // workers
            average = _averages(then, model, workers, ranks)
            goes_on(old.args[0], average.args[0], at, lost)  # type: ignore[attr-defined]
        gradients = []
        for rank in range(world):
            model.zero_grad()
            total = 0.0
            for micro in range(setup.micro):
                loss = loss_of(model, step, rank, micro) / setup.micro
                loss.backward()
                total += loss.item()
            losses[rank].append(total)
            gradients.append(
                {
                    name: None if p.grad is None else p.grad.clone()
                    for name, p in model.named_parameters()
                }
            )
        nodes = [_mean(gradients[k * ranks : (k + 1) * ranks]) for k in range(workers)]
        for name, grad in average(nodes).items():
            model.get_parameter(name).grad = grad
        if setup.clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), setup.clip)))
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "parameters": parameters}


def _mean(gradients: list[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    def mean(name: str) -> Tensor | None:
        there = [g for one in gradients if (g := one[name]) is not None]
        return torch.stack(there).sum(0) / len(gradients) if there else None

    return {name: mean(name) for name in gradients[0]}


OF_THE_REDUCER = (
    "min_compression_rate",
    "rules",
    "wire_dtype",
    "error_feedback",
    "quantization",
    "warmup_steps",
    "warmup_wire",
)


def _averages(
    setup: Setup, model: nn.Module, workers: int, ranks: int
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """node gradients -> what all apply: exact without a compressor, else by the
    simulation, perhaps block by block.
    """
    if setup.compressor is None:
        return _mean
    ranks = 1 if setup.scope == "matrix" else ranks
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    options = {"min_compression_rate": 0, "seed": 3} | {
        k: v for k, v in setup.options.items() if k in OF_THE_REDUCER
    }
    blocks = [
        {
            name: (rows.stop - rows.start, *shape[1:])
            for name, shape in shapes.items()
            if (rows := block_of(shape[0], ranks, f)).stop > rows.start
        }
        for f in range(ranks)
    ]
    return functools.partial(
        _reduced, [Simulation(block, setup.compressor, workers, **options) for block in blocks]
    )


def _reduced(simulations: list[Simulation], nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """By one simulation for each block of rows."""
    parts = []
    for f, simulation in enumerate(simulations):
        names = [slot.name for slot in simulation.reducers[0].slots]
        cut = [
            {
                n: None if node[n] is None else node[n][block_of(len(node[n]), len(simulations), f)]
                for n in names
            }
            for node in nodes
        ]
        parts.append(simulation.reduce(cut))
    return {
        name: None
        if parts[0][name] is None
        else torch.cat([part[name] for part in parts if name in part])
        for name in parts[0]
    }


def goes_on(olds: list[Simulation], news: list[Simulation], at: int, lost: str = "") -> None:
    """A run with EF21 in other blocks and with other workers: every worker has the mean
    of what the workers kept, its rows where they belong now; bases are new. `lost`: a
    symbol that starts anew instead.
    """
    for new in news:
        for reducer in new.reducers:
            reducer.state.continue_at(at)
    for name, kept in olds[0].reducers[0].state.bases().items():
        for symbol in kept.keys() & {"y", "y_mean", "v"} - {lost}:
            blocks = [
                torch.stack([reducer.state.bases()[name][symbol] for reducer in old.reducers]).mean(
                    0
                )
                for old in olds
                if name in old.reducers[0].state.bases()
            ]
            whole = torch.cat(blocks)
            assert whole.norm() > 0
            for f, new in enumerate(news):
                for reducer in new.reducers:
                    if name in reducer.state.bases():
                        started = {"v_started": torch.ones(1, 1)} if symbol == "v" else {}
                        reducer.state.set_state(
                            name,
                            None,
                            {symbol: whole[block_of(len(whole), len(news), f)], **started},
                        )


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of parameters."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


WORLD = 4

FULL, RANK_2 = PowerSGD(99), PowerSGD(2)

RESTARTS = PowerSGDPlus(2, restart_every=7)

ENGINES = {
    "plain model": Setup("plain", options={"reduce_at": "backward"}),
    "plain model, two levels, shard": Setup("plain", nodes=2, options={"reduce_at": "backward"}),
    "plain model, two levels, matrix": Setup(
        "plain", nodes=2, scope="matrix", options={"reduce_at": "backward"}
    ),
    "DDP": Setup("ddp"),
    "DDP, two levels, shard": Setup("ddp", nodes=2),
    "DDP, two levels, matrix": Setup("ddp", nodes=2, scope="matrix"),
    "FSDP2, flat": Setup("flat"),
    "FSDP2, HSDP sub-mesh, shard": Setup("hsdp", nodes=2),
    "FSDP2, HSDP sub-mesh, matrix": Setup("hsdp", nodes=2, scope="matrix"),
    "FSDP2, HSDP 2-D mesh, shard": Setup("native", nodes=2),
    "FSDP2, HSDP 2-D mesh, matrix": Setup("native", nodes=2, scope="matrix"),
}

every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())


def by_turns(
    what: str, values: Mapping[str, Any], every: int, engines: Mapping[str, Setup] = ENGINES
) -> pytest.MarkDecorator:
    """Every engine and every value, but not every pair: with `every` = 2 half of them,
    by turns.
    """
    return pytest.mark.parametrize(
        ("engine", what),
        [
            pytest.param(setup, value, id=f"{label}-{name}")
            for i, (name, setup) in enumerate(engines.items())
            for j, (label, value) in enumerate(values.items())
            if (i + j) % every == 0
        ],
    )
