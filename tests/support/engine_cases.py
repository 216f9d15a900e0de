"""What goes wrong or goes on in a run under an engine: overflows, exhausted data,
interruptions. Each function runs on every rank of a gloo group.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lowrank_comm import CompressedOptimizer, PowerSGD, StateMismatchError
from lowrank_comm.checkpoint import load_all, save_all
from lowrank_comm.checkpointing import file as checkpoint
from tests.support.engines import Setup, backward, full, loss_of, plain_names, wrapped


def built(setup: Setup, scaler: Any = None) -> tuple[nn.Module, CompressedOptimizer]:
    """The wrapped model and its optimizer, attached."""
    model, process_group = wrapped(setup)
    options = {"min_compression_rate": 0, "seed": 3, **setup.options}
    assert setup.compressor is not None
    optimizer = CompressedOptimizer(
        setup.base(plain_names(model).items()),
        setup.compressor,
        process_group,
        shard_scope=setup.scope,
        **options,
    )
    optimizer.attach(model, scaler=scaler)
    return model, optimizer


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(model: nn.Module, optimizer: CompressedOptimizer) -> dict[str, Tensor]:
    """Parameters, error memory and bases on this rank, as they are."""
    state = {f"p {name}": local(p) for name, p in plain_names(model).items()}
    state |= {f"e {name}": local(e) for name, e in optimizer.error_memory().items()}
    state |= {f"q {name}": b["Q"] for name, b in optimizer.reducer.state.bases().items()}
    return state | {"t": torch.tensor(optimizer.reducer.step)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def overflow(rank: int, setup: Setup, culprit: int, unscale: bool) -> dict[str, Any]:
    """A GradScaler; at step 2 the loss of one rank is infinite. What every rank did
    then, and at the end.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    model, optimizer = built(setup, scaler)
    seen: dict[str, Any] = {"scales": [], "equal": None}
    for step in range(setup.steps):
        before = state_of(model, optimizer)
        loss = loss_of(model, step, rank)
        if step == 2 and rank == culprit:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 2:
            seen["equal"] = same(before, state_of(model, optimizer))
        seen["scales"].append(scaler.get_scale())
    seen["parameters"] = {name: full(p) for name, p in plain_names(model).items()}
    return seen


def without_scaler(rank: int, setup: Setup, skipped: int) -> dict[str, Tensor]:
    """The same run without a scaler and without step `skipped`."""
    model, optimizer = built(setup)
    for step in range(setup.steps):
        if step != skipped:
            loss_of(model, step, rank).backward()
            if setup.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
            optimizer.step()
            optimizer.zero_grad()
    return {name: full(p) for name, p in plain_names(model).items()}


def not_finite(rank: int, setup: Setup, culprit: int) -> list[bool]:
    """NaN on one rank at step 1, without a scaler: whether it left everything as it
    was, and whether the run goes on.
    """
    model, optimizer = built(setup)
    found = []
    for step in range(3):
        before = state_of(model, optimizer)
        loss = loss_of(model, step, rank)
        (loss * float("nan") if step == 1 and rank == culprit else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(same(before, state_of(model, optimizer)))
    return found


def exhausted(rank: int, setup: Setup, joins: bool) -> dict[str, Any]:
    """Rank 0 has two batches less than the others."""
    model, optimizer = built(setup)
    steps = setup.steps - 2 * (rank == 0)
    with model.join() if joins else contextlib.nullcontext():  # type: ignore[operator]
        for step in range(steps):
            loss_of(model, step, rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {
        "parameters": {name: full(p) for name, p in plain_names(model).items()},
        "step": optimizer.reducer.step,
    }


class OneBranch(nn.Module):
    """A layer in the middle that some ranks use and others do not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 4)

    def forward(self, x: Tensor, all_layers: bool) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(x) if all_layers or k != 1 else x
        return x


def used_on_one_rank_only(rank: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """DDP looks for unused parameters, by a collective during the backward pass."""
    model = nn.parallel.DistributedDataParallel(OneBranch(), find_unused_parameters=True)
    base = torch.optim.SGD(plain_names(model).items(), lr=0.1)
    optimizer = CompressedOptimizer(base, PowerSGD(rank=2), min_compression_rate=0, **options)
    optimizer.attach(model)
    for step in range(4):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x, rank == 0).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p) for name, p in plain_names(model).items()}


def one_micro_batch_more(rank: int, setup: Setup, more: tuple[int, ...]) -> dict[str, Tensor]:
    """Some ranks accumulate three micro-batches a step, the others two."""
    model, optimizer = built(setup)
    for step in range(3):
        count = 3 if rank in more else 2
        for micro in range(count):
            last = micro == count - 1
            with contextlib.nullcontext() if last else optimizer.no_sync():
                if setup.engine == "ddp":
                    with contextlib.nullcontext() if last else model.no_sync():  # type: ignore[operator]
                        loss_of(model, step, rank, micro).backward()
                else:
                    loss_of(model, step, rank, micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p) for name, p in plain_names(model).items()}


def second_backward(rank: int, setup: Setup) -> str:
    """Two backward passes before a step, with nothing said about accumulation."""
    model, _optimizer = built(setup)
    loss_of(model, 0, rank, 0).backward()
    try:
        loss_of(model, 0, rank, 1).backward()
    except Exception as error:
        return str(error)
    return "no error"


def interrupted(
    rank: int, setup: Setup, stop: int, more: int, way: str, folder: str
) -> tuple[dict[str, Tensor], ...]:
    """`more` steps after `stop`: as they come, and after everything was saved and
    loaded into new objects.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, stop, setup)
    saved = saved_state(model, optimizer, way, folder)
    run(rank, model, optimizer, stop, more, setup)
    expected = {name: full(p) for name, p in plain_names(model).items()}
    optimizer.detach()
    fresh, again = built(setup)
    load_state(fresh, again, way, folder, saved)
    run(rank, fresh, again, stop, more, setup)
    return expected, {name: full(p) for name, p in plain_names(fresh).items()}


def kept_whole(
    rank: int, setup: Setup, stop: int, more: int, folder: str
) -> tuple[dict[str, Tensor], ...]:
    """As `interrupted`, by `save_all` and `load_all`."""
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, stop, setup)
    save_all(folder, model, optimizer, step=stop)
    run(rank, model, optimizer, stop, more, setup)
    expected = {name: full(p) for name, p in plain_names(model).items()}
    optimizer.detach()
    fresh, again = built(setup)
    assert load_all(folder, fresh, again) == {"step": stop}
    run(rank, fresh, again, stop, more, setup)
    return expected, {name: full(p) for name, p in plain_names(fresh).items()}


def copied(value: Any) -> Any:
    """A deep copy, also of DTensors that are views."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value


def loaded_otherwise(
    rank: int, setup: Setup, stop: int, more: int, how: str
) -> tuple[dict[str, Tensor], ...]:
    """As `interrupted`, by a state dict. how: the base loads it and is wrapped
    afterwards; or it is loaded where parameters have no names, or others, and no model
    is attached before.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, stop, setup)
    optimizer.consolidate_error_memory()
    state, weights = copied((optimizer.state_dict(), model.state_dict()))
    run(rank, model, optimizer, stop, more, setup)
    expected = {name: full(p) for name, p in plain_names(model).items()}
    optimizer.detach()
    fresh, process_group = wrapped(setup)
    fresh.load_state_dict(weights)
    named = list(plain_names(fresh).items())
    given: list[Any] = {
        "unnamed": [p for _, p in named],
        "renamed": [(f"net.{name}", p) for name, p in named],
    }.get(how, named)
    base = setup.base(given)
    if how == "wrapped afterwards":
        base.load_state_dict(state)
    options = {"min_compression_rate": 0, "seed": 3, **setup.options}
    assert setup.compressor is not None
    again = CompressedOptimizer(
        base, setup.compressor, process_group, shard_scope=setup.scope, **options
    )
    again.attach(fresh)
    if how != "wrapped afterwards":
        again.load_state_dict(state)
    assert again.reducer.step == stop
    run(rank, fresh, again, stop, more, setup)
    return expected, {name: full(p) for name, p in plain_names(fresh).items()}


def bad_state(rank: int, setup: Setup, culprit: int, folder: str) -> list[str]:
    """One rank's error memory holds NaN: what saving says, and whether it changed
    anything. The last rank of a node may hold no row of the head.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 2, setup)
    if rank == culprit:
        name = max(
            optimizer.error_memory(), key=lambda n: local(optimizer.error_memory()[n]).numel()
        )
        optimizer.reducer.state.error_memory()[name].view(-1)[1] = float("nan")
    before = repr(state_of(model, optimizer))
    said = []
    for save in (
        optimizer.consolidate_error_memory,
        lambda: checkpoint.save(optimizer.reducer, folder),
        lambda: save_all(folder, model, optimizer),
    ):
        try:
            save()
        except StateMismatchError as error:
            said.append(str(error).split(":")[0])
    assert repr(state_of(model, optimizer)) == before
    return said


def run(
    rank: int,
    model: nn.Module,
    optimizer: CompressedOptimizer,
    first: int,
    count: int,
    setup: Setup,
) -> None:
    for step in range(first, first + count):
        backward(loss_of(model, step, rank), optimizer)
        optimizer.step()
        optimizer.zero_grad()


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE_FROM_ALL = StateDictOptions(full_state_dict=True)


def saved_state(model: nn.Module, optimizer: CompressedOptimizer, way: str, folder: str) -> Any:
    """way: "file" (the compressor's own file beside the base optimizer's state) or
    "dcp" (everything in the state dict).
    """
    optimizer.consolidate_error_memory()
    if way == "file":
        checkpoint.save(optimizer.reducer, folder)
        # they are live
        return copy.deepcopy(
            (get_model_state_dict(model), get_optimizer_state_dict(model, optimizer.base))
        )
    state = (
        get_model_state_dict(model, options=WHOLE),
        get_optimizer_state_dict(model, optimizer, options=WHOLE),
    )
    if dist.get_rank() == 0:
        torch.save(state, Path(folder) / "whole.pt")
    dist.barrier()
    return None


def load_state(
    model: nn.Module, optimizer: CompressedOptimizer, way: str, folder: str, saved: Any
) -> None:
    if way == "file":
        of_model, of_optimizer = saved
        set_model_state_dict(model, of_model)
        set_optimizer_state_dict(model, optimizer.base, of_optimizer)
        checkpoint.load(optimizer.reducer, folder)
        return
    of_model, of_optimizer = torch.load(Path(folder) / "whole.pt", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_model_state_dict(model, of_model, options=WHOLE_FROM_ALL)
        set_optimizer_state_dict(model, optimizer, of_optimizer, options=WHOLE_FROM_ALL)


def first_part(rank: int, setup: Setup, stop: int, more: int, folder: str) -> dict[str, Tensor]:
    """Train, save for another engine, and go on."""
    model, optimizer = built(setup)
    same_data(rank, model, optimizer, 0, stop)
    saved_state(model, optimizer, "dcp", folder)
    checkpoint.save(optimizer.reducer, folder)
    same_data(rank, model, optimizer, stop, more)
    return {name: full(p) for name, p in plain_names(model).items()}


def second_part(
    rank: int, setup: Setup, stop: int, more: int, folder: str, way: str
) -> dict[str, Tensor]:
    """Go on from what `first_part` saved, under another engine and with another number
    of workers.
    """
    model, optimizer = built(setup)
    load_state(model, optimizer, "dcp", folder, None)
    if way == "file":
        optimizer.reducer.reset()
        checkpoint.load(optimizer.reducer, folder)
    same_data(rank, model, optimizer, stop, more)
    return {name: full(p) for name, p in plain_names(model).items()}


def in_other_blocks(
    rank: int, first: Setup, second: Setup, stop: int, more: int, folder: str
) -> dict[str, dict[str, Tensor]]:
    """What a run ends with that is saved in the blocks of `first` and goes on in those
    of `second`, by way of saving.
    """
    model, optimizer = built(first)
    run(rank, model, optimizer, 0, stop, first)
    checkpoint.save(optimizer.reducer, folder)
    saved_state(model, optimizer, "dcp", folder)
    flags = [
        entry.get("lowrank_comm_v_started") for entry in optimizer.state_dict()["state"].values()
    ]
    # whichever rank's torch.distributed.checkpoint takes
    assert all(flag is None or bool(flag.all()) for flag in flags)
    dcp.save(
        {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder,
    )
    optimizer.detach()
    found = {}
    for way in ("file", "whole", "disk"):
        model, optimizer = built(second)
        if way == "disk":
            state = {
                "m": get_model_state_dict(model),
                "o": get_optimizer_state_dict(model, optimizer),
            }
            dcp.load(
                state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True)
            )
            set_model_state_dict(model, state["m"])
            set_optimizer_state_dict(model, optimizer, state["o"])
        else:
            load_state(model, optimizer, "dcp", folder, None)
        if way == "file":
            optimizer.reducer.reset()
            checkpoint.load(optimizer.reducer, folder)
        run(rank, model, optimizer, stop, more, second)
        found[way] = {name: full(p) for name, p in plain_names(model).items()}
        optimizer.detach()
    return found


def same_data(
    rank: int, model: nn.Module, optimizer: CompressedOptimizer, first: int, count: int
) -> None:
    """Four parts of data, whatever the number of ranks: the mean gradient is
    the same.
    """
    world = dist.get_world_size()
    mine = range(rank * 4 // world, (rank + 1) * 4 // world)
    for step in range(first, first + count):
        loss = sum(loss_of(model, step, part) for part in mine) / len(mine)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()


def stale_gathered_state(rank: int, setup: Setup, folder: str) -> list[float]:
    """State dicts made after the compressor's file was saved or loaded: the gap of
    their errors to those of the reducer.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 2, setup)
    optimizer.consolidate_error_memory()
    run(rank, model, optimizer, 2, 3, setup)
    checkpoint.save(optimizer.reducer, folder)
    gaps = [gap_of_saved_errors(optimizer)]
    run(rank, model, optimizer, 5, 2, setup)
    optimizer.consolidate_error_memory()
    checkpoint.load(optimizer.reducer, folder)
    return [*gaps, gap_of_saved_errors(optimizer)]


def gap_of_saved_errors(optimizer: CompressedOptimizer) -> float:
    """Between what a state dict holds of this rank's blocks and what the
    reducer holds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = optimizer.state_dict()
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    gap = 0.0
    for slot in optimizer.reducer.slots:
        entry = saved["state"][names.index(slot.name)].get("lowrank_comm_error")
        if entry is not None:
            mine = optimizer.reducer.state.error_memory()[slot.name]
            whole = (
                entry
                if entry.shape == mine.shape
                else optimizer.reducer.workers.intra_node.own(entry, slot.dim)
            )
            gap = max(gap, float((whole - mine).abs().max()))
    return gap


def through_disk(
    rank: int, setup: Setup, stop: int, more: int, folder: str
) -> tuple[dict[str, Tensor], ...]:
    """As `interrupted`, by dcp.save and dcp.load, which reads in place into the state
    of a run that has made no step.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, stop, setup)
    optimizer.consolidate_error_memory()
    dcp.save(
        {"m": get_model_state_dict(model), "o": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder,
    )
    run(rank, model, optimizer, stop, more, setup)
    expected = {name: full(p) for name, p in plain_names(model).items()}
    optimizer.detach()
    fresh, again = built(setup)
    state = {"m": get_model_state_dict(fresh), "o": get_optimizer_state_dict(fresh, again)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state["m"])
    set_optimizer_state_dict(fresh, again, state["o"])
    run(rank, fresh, again, stop, more, setup)
    return expected, {name: full(p) for name, p in plain_names(fresh).items()}


def failed_backward(rank: int, setup: Setup, fails: bool) -> dict[str, Tensor]:
    """A backward pass that raises on all ranks after buckets have begun; the run goes
    on with one that is not the last.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 2, setup)
    if fails:
        handle = model.first.register_full_backward_hook(_raise)  # type: ignore[union-attr]
        with contextlib.suppress(ZeroDivisionError):
            loss_of(model, 9, rank).backward()
        handle.remove()
        optimizer.zero_grad()
    with optimizer.no_sync():
        loss_of(model, 2, rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    run(rank, model, optimizer, 3, 2, setup)
    return {name: full(p) for name, p in plain_names(model).items()}


def _raise(*_: Any) -> None:
    raise ZeroDivisionError


def gone_without_detach(rank: int, setup: Setup) -> list[float]:
    """The optimizer is dropped; the engine averages by itself again. The sum of the
    parameters before and after a step.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 1, setup)
    there = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert there() is None
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = []
    for step in range(2):
        loss_of(model, step, rank).backward()
        base.step()
        base.zero_grad()
        sums.append(sum(full(p).double().sum().item() for p in model.parameters()))
    return sums


def disjoint_passes(rank: int, setup: Setup) -> str:
    """Two backward passes over different parameters before a step, with
    nothing said.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 1, setup)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))
    try:
        model.blocks[0](x).sum().backward()  # type: ignore[index, operator]
        model.blocks[1](x).sum().backward()  # type: ignore[index, operator]
    except Exception as error:
        return str(error)
    return "no error"


def clipped_after_a_second_attach(rank: int) -> list[float]:
    """detach() and attach() of a plain model: norms that the caller sees."""
    model, optimizer = built(Setup("plain", PowerSGD(2), options={"reduce_at": "backward"}))
    norms = []
    for step in range(2):
        loss_of(model, step, rank).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.detach()
        optimizer.attach(model)
    return norms


def differing_within_a_node(rank: int, what: str) -> str:
    """Two levels; ranks of a node that differ in something."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.fill_(float(rank % 2) if what == "weights" else 0.5)
    clip = 1.0 if what == "clipping" and rank % 2 else None
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = CompressedOptimizer(
        base, PowerSGD(2), mesh, min_compression_rate=0, max_grad_norm=clip
    )
    model(torch.full((1, 8), 1.0 + rank)).sum().backward()
    try:
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def unconsolidated(rank: int, setup: Setup) -> str:
    """A state dict that was made without consolidation, loaded by the very rank that
    made it.
    """
    model, optimizer = built(setup)
    run(rank, model, optimizer, 0, 2, setup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = optimizer.state_dict()
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:
        return str(error)
    return "loaded"
