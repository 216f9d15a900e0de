"""What a run holds, measured by the meter of allocations, beside what its plan says."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, ErrorFeedback, PowerSGDPlus
from lowrank_comm.checkpointing import file
from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.communication.group import Group
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.row_scatter import RowScatter
from tests.support.allocations import Meter, metered

Figures = dict[str, tuple[int, int]]
"""Phase -> bytes held at most beside the error memory, as measured and as planned."""
OURS = "ours"
CLOSE = 0.05
"""How near a plan has to be."""


class Watched:
    """A block in which parts of the library's code are metered, in the phase that is
    going on.

    Attributes:
        phase: name of a part.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter, self.phase, self._begun = meter, "", set[str]()

    def begin(self, phase: str) -> None:
        self.phase = phase
        self._begun.discard(phase)

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """What happens inside is the library's."""
        again = self.phase in self._begun
        self._begun.add(self.phase)
        first = OURS not in self._begun
        self._begun.add(OURS)
        with self._meter.part(OURS, again=not first):
            if not self.phase:
                yield
                return
            with self._meter.part(self.phase, again=again):
                yield

    def wrap(self, owner: Any, *methods: str) -> None:
        for method in methods:
            original: Callable[..., Any] = getattr(owner, method)
            setattr(owner, method, functools.partial(self.call, original))

    def call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.ours():
            return original(*args, **kwargs)

    def figures(self, plan: Any) -> Figures:
        needs = asdict(plan.needs)
        return {
            phase: (self._meter.total(phase, OURS) - plan.error_bytes, needs[phase])
            for phase in ("step", "restart", "warmup", "save", "load")
            if phase in self._begun
        }


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """After each collective wait until gloo's threads have let go of its tensors: what
    they give back last is not seen to come back.
    """
    start, run = Group.start, IntraNodeGroup.run

    class Patient:
        def __init__(self, work: Any, tensors: list[Tensor], users: list[int]) -> None:
            self._work, self._tensors, self._users = work, tensors, users

        def wait(self) -> None:
            self._work.wait()
            self._work = None
            _until(self._tensors, self._users)
            self._tensors = []

    def patient_start(self: Group, exchanges: Any) -> list[Any]:
        tensors = [t for one in exchanges for t in _tensors_of(one)]
        users = [_users_of(t) for t in tensors]
        return [Patient(work, tensors, users) for work in start(self, exchanges)]

    def patient_run(self: IntraNodeGroup, collective: Any, *tensors: Tensor) -> None:
        users = [_users_of(t) for t in tensors]
        run(self, collective, *tensors)
        _until(tensors, users)

    Group.start, IntraNodeGroup.run = patient_start, patient_run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Group.start, IntraNodeGroup.run = start, run  # type: ignore[method-assign]


def _tensors_of(exchange: Exchange) -> list[Tensor]:
    if isinstance(exchange, Tensor):
        return [exchange]
    return [one for one in vars(exchange).values() if isinstance(one, Tensor)]


def _users_of(tensor: Tensor) -> int:
    return int(tensor._use_count())  # type: ignore[attr-defined]


def _until(tensors: Sequence[Tensor], users: list[int]) -> None:
    end = time.monotonic() + 5
    while any(map(operator.gt, map(_users_of, tensors), users)) and time.monotonic() < end:
        time.sleep(0.0002)


def watch_rows(watched: Watched, rows: RowScatter | None) -> None:
    if rows is not None:
        watched.wrap(rows, "scatter", "gather")


def plain(
    shapes: list[tuple[int, ...]],
    compressor: Compressor,
    folder: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Figures:
    """A plain model's steps, the first of which restarts all; a save and a load."""
    model = torch.nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)
    base = torch.optim.SGD(model.named_parameters(), lr=0.0, foreach=True)
    with patient(), metered() as meter:
        watched = Watched(meter)
        with watched.ours():
            optimizer = CompressedOptimizer(base, compressor, **options)
            reducer = optimizer.reducer
        watched.wrap(reducer, "reduce", "commit")
        watch_rows(watched, optimizer._attachment.engine.rows)
        for t in range(3):
            first = "warmup" if options.get("warmup_steps") else "restart"
            watched.begin("step" if t else first)
            for parameter in model:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        save_and_load(watched, reducer, folder)
    return watched.figures(optimizer.plan)


def save_and_load(watched: Watched, reducer: Reducer, folder: str) -> None:
    # the least of two loads counts: what a thread of gloo's gives back late in a save
    # is seen to be back when the next takes its place. The first save makes the report
    for phase in ("save", "another save"):
        watched.begin(phase)
        with watched.ours():
            name = file.save(reducer, folder)
        watched.begin("load")
        with watched.ours():
            file.load(reducer, folder, name)


def of_torch(engine: str, folder: str, options: dict[str, Any]) -> Figures:
    """The first steps of a model under an engine of torch, a save and a load."""
    model: nn.Module = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(SIDES)))
    two_levels = "two levels" in engine or "HSDP" in engine
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if engine == "DDP":
        model = DistributedDataParallel(model)
    elif "FSDP2" in engine or "HSDP" in engine:
        for unit in (*model.children(), model):
            fully_shard(unit, mesh=mesh["shard"] if two_levels else None)
    base = torch.optim.SGD(model.named_parameters(), lr=0.0, foreach=True)
    options = dict(options)
    if "error_feedback" in options:
        options["error_feedback"] = ErrorFeedback(**options["error_feedback"])
    if two_levels:
        options["process_group"] = mesh
    if "matrix" in engine:
        options["shard_scope"] = "matrix"
    with patient(), metered() as meter:
        watched = Watched(meter)
        with watched.ours():
            optimizer = CompressedOptimizer(base, PowerSGDPlus(4), reduce_at="step", **options)
            plan = optimizer.attach(model)
            reducer = optimizer.reducer
        watched.wrap(reducer, "reduce", "commit")
        watch_rows(watched, optimizer._attachment.engine.rows)
        for t in range(3):
            watched.begin("step" if t else "restart")
            _loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_and_load(watched, reducer, folder)
    return watched.figures(plan)


# two of one shape, one above 2^20 elements, and rows that two ranks do not share alike
SIDES = [256, 512, 256, 512, 1041, 1024]


def _loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.randn(2, SIDES[0], generator=torch.Generator().manual_seed(dist.get_rank()))
    return model(x).square().mean()


def of_deepspeed(engine: str, folder: str, options: dict[str, Any]) -> Figures:
    """The same under DeepSpeed."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    import deepspeed

    from lowrank_comm.integrations import deepspeed as ours

    section: dict[str, Any] = {"compressor": "powersgd_plus", "rank": 4, "restart_every": 200}
    section |= options
    if "two levels" in engine:
        section["topology"] = {"shard_size": 2}
    with patient(), metered() as meter:
        watched = Watched(meter)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ours, "attach", functools.partial(watched.call, ours.attach))
            made = deepspeed.initialize(
                model=nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(SIDES))),
                config={
                    "train_micro_batch_size_per_gpu": 2,
                    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
                    "zero_optimization": {"stage": int(engine[5])},
                    "lowrank_comm": section,
                },
                dist_init_required=False,
            )[0]
        adapter: Any = ours.get(made)
        watched.wrap(adapter.reducer, "reduce", "commit")
        watch_rows(watched, adapter._levels.rows)
        for t in range(3):
            watched.begin("step" if t else "restart")
            made.backward(_loss_of(made))
            made.step()
        save_and_load(watched, adapter.reducer, folder)
    return watched.figures(adapter.plan)
