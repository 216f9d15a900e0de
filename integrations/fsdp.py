"""FSDP2 (`fully_shard`), flat and HSDP: `optimizer.attach(model)`.

HSDP. Inside a node FSDP's own reduce-scatter makes the exact mean, of which each rank keeps its block of rows; between
nodes the reducer averages these blocks, compressed. `p.grad.to_local()` is the block; error memory is as large as the
shard. Two ways to get there, the same from here on:

    fully_shard(model, mesh=mesh["shard"]) and process_group=mesh     FSDP never reduces between nodes
    fully_shard(model, mesh=mesh), a 2-D mesh                         FSDP's all-reduce over replicas is taken over

Flat, all ranks share one copy of the model. There is no gradient of a part of the workers to compress after a
reduce-scatter, so the reduce-scatter itself is replaced: FSDP is told not to reduce and keeps each rank's own whole
gradients; the reducer averages them over all ranks, compressed, and each rank keeps its rows of the result. That costs
what compression costs without HSDP: whole gradients until the end of backward, and an error memory of the whole model on
every rank. The plan says how much.

In both, one pass over all parameters runs at the end of the last backward pass of a step, after FSDP's own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lowrank_comm.backward_end import BackwardWatch
from lowrank_comm.batches import Slot
from lowrank_comm.checkpoint import block_bases, of_blocks
from lowrank_comm.communication import Group, Shards
from lowrank_comm.communication.shards import block_of
from lowrank_comm.communication.topology import levels
from lowrank_comm.diagnostics import human_bytes
from lowrank_comm.engine import Engine
from lowrank_comm.errors import ConfigError, LowRankCommError, UnsupportedError
from lowrank_comm.reducer import Reducer

from . import _fsdp_seams as seams


class _FSDPEngine(Engine):
    """What both kinds share: gradients are DTensors, placed like their parameters."""

    reduces_at = "backward"

    def __init__(self, model: nn.Module, group: Group, shards: Shards) -> None:
        self.group, self.shards = group, shards
        self._model = model

    @property
    @override
    def can_overlap(self) -> bool:
        return False  # FSDP's last reduce-scatters and the copies into p.grad end with the backward pass

    @override
    def collect(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if p.grad is None else _local(p.grad) for p in parameters]

    @override
    def deliver(self, parameters: Sequence[Tensor], results: Sequence[Tensor | None]) -> None:
        for parameter, result in zip(parameters, results, strict=True):
            if result is None:
                continue
            if parameter.grad is None:
                parameter.grad = _placed_like(parameter, result)
            elif _local(parameter.grad) is not result:
                _local(parameter.grad).copy_(result)

    @override
    def poison(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad).fill_(float("nan"))

    @override
    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    @override
    def is_last_backward(self) -> bool:
        return seams.is_last_backward(self._model)


class HSDPEngine(_FSDPEngine):
    """Sharded inside the node, replicated between nodes.

    Args:
        model: after fully_shard.
        group: between nodes.
        shards: inside a node.
        taken_over: (parameter group of FSDP, its former description) where FSDP's own all-reduce between nodes was switched
            off.
    """

    name = "FSDP2, HSDP"
    accumulates_by = "model.set_requires_all_reduce(False) or set_requires_gradient_sync(False), or optimizer.no_sync(),"

    saves_whole = False

    def __init__(self, model: nn.Module, group: Group, shards: Shards, taken_over: list[tuple[Any, Any]]) -> None:
        super().__init__(model, group, shards)
        self._taken_over = taken_over
        self._mesh_is_2d = seams.param_groups(model)[0].mesh_info.mesh.ndim == 2
        self._mesh: DeviceMesh | None = None
        self._named: list[tuple[str, Tensor]] = []

    @override
    def slots(self, named: Sequence[tuple[str, Tensor]]) -> list[Slot]:
        self._named = list(named)
        slots = []
        for name, p in named:
            local, dim = _local(p), _shard_dim(p)
            if dim != 0 and self.shards.whole_matrices:
                raise UnsupportedError(
                    f'attach: {name} is sharded along dimension {dim}, and shard_scope="matrix" needs blocks of rows; use '
                    'Shard(0), or shard_scope="shard".'
                )
            whole = tuple(p.shape) if self.shards.size > 1 else None
            slots.append(Slot(name, tuple(local.shape), p.dtype, local.device, whole, dim))
        return slots

    @override
    def release(self) -> None:
        for group, info in self._taken_over:
            seams.give_back_replicas(group, info)

    @override
    def is_last_backward(self) -> bool:
        return super().is_last_backward() and seams.wants_all_reduce(self._model)

    @override
    def saved(self, reducer: Reducer, whole: dict[str, dict[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
        """DTensors, which torch.distributed.checkpoint reshards: errors like their parameters; bases of blocks as blocks."""
        named, memory = dict(self._named), reducer.error_memory()
        result: dict[str, dict[str, Tensor]] = {}
        for slot in reducer.slots:
            largest = reducer.treatment_of_largest(slot)
            if not largest.low_rank:
                continue
            error = memory.get(slot.name)
            if error is None:
                error = torch.zeros(slot.shape, dtype=slot.compute_dtype, device=slot.device)
            entry = {"error": self.error_view(slot, named[slot.name], error)}
            bases = block_bases(reducer, slot, largest)
            if self.shards.size == 1 or self.shards.whole_matrices:
                entry |= bases
            else:
                mesh = self._shard_mesh(named[slot.name])
                for symbol, basis in bases.items():
                    placed = DTensor.from_local(basis, mesh, (Shard(0),), run_check=False)
                    entry[of_blocks(symbol, self.shards.size)] = placed
            result[slot.name] = entry
        return result

    def _shard_mesh(self, parameter: Tensor) -> DeviceMesh:
        assert isinstance(parameter, DTensor)
        if self._mesh is None:
            if self.shards.process_group is None:
                self._mesh = parameter.device_mesh
            else:
                self._mesh = DeviceMesh.from_group(self.shards.process_group, parameter.device_mesh.device_type)
        return self._mesh

    @override
    def error_view(self, slot: Slot, parameter: Tensor, error: Tensor) -> Tensor:
        mesh = self._shard_mesh(parameter)
        if mesh.ndim != 1:  # one rank in a node: the parameter's own mesh is all there is
            return error
        places = (Shard(slot.dim),)
        view = DTensor.from_local(
            error, self._mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        view._local_tensor = error  # and not a view of it: the memory moves, and takes along the views that it has given
        return view

    @override
    def notes(self) -> list[str]:
        held = sum(_padded(p, self.shards.size) for p in self._model.parameters() if p.requires_grad)
        how = (
            "fully_shard's all-reduce between nodes is off" if self._mesh_is_2d else "fully_shard works inside the node only"
        )
        return [
            f"FSDP2, HSDP: {how}; its exact reduce-scatter in a node carries {human_bytes(held)} a backward pass",
            "error memory is that of this rank's shards",
        ]


class FlatEngine(_FSDPEngine):
    """Sharded over all workers; see the module's text.

    Args:
        model: after fully_shard on a 1-D mesh.
        group: all ranks of that mesh.
    """

    name = "FSDP2, flat"
    compares_values = False  # every rank holds other rows
    accumulates_by = "model.set_requires_gradient_sync(False), or optimizer.no_sync(),"

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__(model, group, Shards())
        self._by_id = {id(p.sharded_param): p for g in seams.param_groups(model) for p in g.fsdp_params}
        self._mine: list[Any] = []
        self._class_method(False)
        model.__dict__[_SYNCS] = True
        model.__dict__["set_requires_gradient_sync"] = functools.partial(_remember, weakref.ref(model))
        for module in seams.modules(model):
            if hasattr(module, "set_custom_reduce_scatter"):
                module.set_custom_reduce_scatter(_Unreduced())

    def _class_method(self, requires_gradient_sync: bool) -> None:
        type(self._model).set_requires_gradient_sync(self._model, requires_gradient_sync)  # type: ignore[attr-defined]

    @override
    def slots(self, named: Sequence[tuple[str, Tensor]]) -> list[Slot]:
        slots = []
        self._mine = [self._by_id[id(p)] for _, p in named]
        for name, p in named:
            if _shard_dim(p) != 0:
                raise UnsupportedError(
                    f"attach: {name} is sharded along dimension {_shard_dim(p)}; the flat FSDP2 engine needs Shard(0)."
                )
            slots.append(Slot(name, tuple(p.shape), seams.gradient_dtype(self._by_id[id(p)]), _local(p).device))
        return slots

    @override
    def collect(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [seams.take_unsharded_gradient(self._by_id[id(p)]) for p in parameters]

    @override
    def deliver(self, parameters: Sequence[Tensor], results: Sequence[Tensor | None]) -> None:
        for parameter, result in zip(parameters, results, strict=True):
            if result is None:
                continue
            rows = block_of(result.shape[0], self.group.size, self.group.rank)
            parameter.grad = _placed_like(parameter, result[rows].to(parameter.dtype, copy=True))

    @override
    def poison(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = _placed_like(parameter, torch.full_like(_local(parameter), torch.nan))

    @override
    def drop(self) -> None:
        for parameter in self._mine:
            seams.take_unsharded_gradient(parameter)

    @override
    def is_last_backward(self) -> bool:
        return bool(self._model.__dict__.get(_SYNCS, True)) and super().is_last_backward()

    @override
    def watch(
        self, parameters: Sequence[Tensor], on_gradient: Callable[[Tensor], None], at_end: Callable[[], None] | None
    ) -> BackwardWatch:
        return _GroupWatch(self._model, parameters, on_gradient, at_end)

    @override
    def release(self) -> None:
        self._model.__dict__.pop("set_requires_gradient_sync", None)
        self._class_method(True)
        for module in seams.modules(self._model):
            if hasattr(module, "set_custom_reduce_scatter"):
                module.set_custom_reduce_scatter(_default_reduce_scatter())

    @override
    def notes(self) -> list[str]:
        parameters = list(self._by_id.values())
        whole = sum(p.sharded_param.numel() * seams.gradient_dtype(p).itemsize for p in parameters)
        return [
            "FSDP2, flat: the reduce-scatter is replaced by a compressed all-reduce, of which each rank keeps its rows",
            f"until the end of backward every rank holds its own whole gradients ({human_bytes(whole)}), and the "
            "whole error memory; HSDP (a 2-D mesh) divides both by the ranks in a node",
        ]


_SYNCS = "_lowrank_comm_syncs"


def _remember(model: weakref.ref[nn.Module], requires_gradient_sync: bool, *, recurse: bool = True) -> None:
    """In place of the model's method: what it says tells the last backward pass of a step from those before."""
    there = model()
    if there is not None:
        there.__dict__[_SYNCS] = requires_gradient_sync


class _Unreduced:
    """Stands where FSDP would reduce by itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise LowRankCommError(
            "FSDP2 was about to reduce-scatter gradients past the compressed reduction: set_requires_gradient_sync(True) "
            "was called on a part of the model. Call it on the model that was given to attach()."
        )


def _default_reduce_scatter() -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    return DefaultReduceScatter()


class _GroupWatch(BackwardWatch):
    """FSDP fires no hooks of parameters while it does not reduce; its groups tell of their gradients instead."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        on_gradient: Callable[[Tensor], None],
        at_end: Callable[[], None] | None,
    ) -> None:
        super().__init__(parameters, on_gradient, at_end)
        self._undo = list(seams.after_each_group(model, self._group_is_done))

    def _group_is_done(self, group: Any) -> None:
        for parameter in group.fsdp_params:
            if id(parameter.sharded_param) in self._watched and seams.has_unsharded_gradient(parameter):
                self._gradient_is_there(parameter.sharded_param)

    @override
    def remove(self) -> None:
        super().remove()
        for undo in self._undo:
            undo()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placed_like(parameter: Tensor, local: Tensor) -> Tensor:
    """A gradient of which this rank holds `local`."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        local.view(_local(parameter).shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _shard_dim(parameter: Tensor) -> int:
    assert isinstance(parameter, DTensor)
    place = parameter.placements[-1]
    assert isinstance(place, Shard)
    return place.dim


def _padded(parameter: Tensor, shards: int) -> int:
    """Bytes of a gradient in a reduce-scatter, whose blocks are all as long as the first."""
    rows = -(-parameter.shape[0] // shards) * shards if parameter.dim() else 1
    return rows * (parameter.numel() // max(1, parameter.shape[0])) * parameter.dtype.itemsize if parameter.dim() else 0


def connect(model: nn.Module, process_group: Any, shard_scope: str) -> Engine:
    """The engine of a model to which fully_shard was applied.

    Raises:
        UnsupportedError: FSDP1, or a placement other than that of data parallelism.
        ConfigError: process_group does not fit the model's mesh.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedError(
            "attach: the model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens all parameters of a unit into "
            "one vector and cuts it anywhere, so that a rank's part has no rows to compress. Use FSDP2: "
            "torch.distributed.fsdp.fully_shard(module) for each block, then for the model."
        )
    groups = seams.param_groups(model)
    if not groups or not seams.modules(model) or seams.modules(model)[0] is not model:
        raise UnsupportedError(
            "attach: fully_shard was applied to parts of the model only; apply it to the model last, too."
        )
    kinds = {seams.kind(group) for group in groups}
    if len(kinds) > 1 or not kinds <= {"flat", "hsdp"}:
        raise UnsupportedError(
            f"attach: the model's parameters are {' and '.join(sorted(kinds))}; one mesh for all, 1-D or 2-D (replicate, "
            "shard), is needed."
        )
    _refuse(model, groups)
    make = _hsdp if groups[0].mesh_info.mesh.ndim == 2 else _one_d
    return make(model, groups, process_group, shard_scope)


def _hsdp(model: nn.Module, groups: list[Any], process_group: Any, shard_scope: str) -> Engine:
    """A 2-D mesh: FSDP's all-reduce between nodes becomes ours (it may be already, from an earlier optimizer)."""
    info = groups[0].mesh_info
    between = info.mesh.get_group(1 - info.shard_mesh_dim)
    if process_group is not None and _ranks(levels(process_group)[0].process_group) != _ranks(between):
        raise ConfigError(
            "attach: process_group is another one than that of the model's mesh between nodes; leave process_group out, or "
            "give the mesh that fully_shard was given."
        )
    inside = info.shard_process_group if info.shard_mesh_size > 1 else None
    shards = Shards(inside, shard_scope)
    taken_over = [(group, seams.take_over_replicas(group)) for group in groups if seams.kind(group) == "hsdp"]
    return HSDPEngine(model, Group(between), shards, taken_over)


def _one_d(model: nn.Module, groups: list[Any], process_group: Any, shard_scope: str) -> Engine:
    """A 1-D mesh: of one node, with a group between nodes given; or of all ranks."""
    info = groups[0].mesh_info
    ours = _ranks(info.shard_process_group)
    if isinstance(process_group, DeviceMesh) and process_group.ndim == 2:
        group, shards = levels(process_group, shard_scope)
        inside = _ranks(process_group.get_group(1))
        if inside != ours:
            raise ConfigError(
                f"attach: fully_shard's mesh holds the ranks {ours}, the second dimension of process_group the ranks "
                f"{inside}; give fully_shard the sub-mesh inside the node: fully_shard(module, mesh=mesh['shard'])."
            )
        return HSDPEngine(model, group, shards, [])
    if process_group is not None:
        given = _ranks(levels(process_group)[0].process_group)
        if given != ours:
            raise ConfigError(
                f"attach: fully_shard's mesh holds the ranks {ours}, process_group the ranks {given}; to compress between "
                "nodes, give the whole 2-D mesh (between nodes, inside a node) as process_group."
            )
    elif len(ours) != dist.get_world_size():
        raise ConfigError(
            f"attach: the model is sharded over {len(ours)} of {dist.get_world_size()} ranks, and nothing says who averages "
            "between the nodes: give CompressedOptimizer(process_group=mesh) the 2-D mesh (between nodes, inside a node)."
        )
    return FlatEngine(model, Group(info.shard_process_group))


def _ranks(process_group: Any) -> list[int]:
    """Global ranks of a group; None is the default group."""
    return dist.get_process_group_ranks(process_group if process_group is not None else dist.group.WORLD)


def _refuse(model: nn.Module, groups: list[Any]) -> None:
    """UnsupportedError for what of FSDP2 cannot go with compression."""
    for group in groups:
        if group.gradient_divide_factor is not None:
            raise UnsupportedError("attach: set_gradient_divide_factor is not possible; error feedback is for the mean.")
        for parameter in group.fsdp_params:
            if getattr(parameter, "offload_to_cpu", False):
                raise UnsupportedError("attach: CPUOffloadPolicy is not supported; leave offload_policy out.")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor):
            raise UnsupportedError(
                f"attach: {name} is not sharded (ignored_params), so FSDP does not average it inside the node; shard it, or "
                "freeze it."
            )
        if not seams.is_data_parallel(parameter):
            raise UnsupportedError(
                f"attach: {name} is placed as {parameter.placements}; only data parallelism is supported: (Shard(0),), or "
                "(Replicate(), Shard(0))."
            )


__all__ = ["FlatEngine", "HSDPEngine", "connect"]
