"""FSDP2 (`fully_shard`), flat and HSDP: `optimizer.attach(model)`.

HSDP. Inside a node FSDP's own reduce-scatter makes the exact mean, of which each rank
keeps its block of rows; between nodes the reducer averages these blocks, compressed.
`p.grad.to_local()` is the block; error memory is as large as the shard. Two ways to get
there, the same from here on:

    fully_shard(model, mesh=mesh["shard"]) and process_group=mesh
        FSDP never reduces between nodes.
    fully_shard(model, mesh=mesh), a 2-D mesh
        FSDP's all-reduce over replicas is taken over.

Flat. All ranks share one copy of the model. There is no gradient of a part of the
workers to compress after a reduce-scatter, so the reduce-scatter itself is replaced:
FSDP is told not to reduce and keeps each rank's own whole gradients; the reducer
averages them over all ranks, compressed, and each rank keeps its rows of the result.
That costs what compression costs without HSDP: whole gradients until the end of
backward, and an error memory of the whole model on every rank. The plan says how much.

In both, one pass over all parameters runs at the end of the last backward pass of a
step, after FSDP's own.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.communication.topology import covered_ranks, levels
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.integrations._fsdp import internals
from lowrank_comm.integrations._fsdp.flat import FlatEngine
from lowrank_comm.integrations._fsdp.hybrid import HSDPEngine
from lowrank_comm.optimizer.engine import Engine


def connect(model: nn.Module, process_group: Any, shard_scope: str) -> Engine:
    """Return the engine of a model to which fully_shard was applied.

    Raises:
        UnsupportedError: FSDP1, or a placement other than that of data parallelism.
        ConfigError: process_group does not fit the model's mesh.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedError(
            "attach: the model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens all"
            " parameters of a unit into one vector and cuts it anywhere, so that a rank's part has"
            " no rows to compress. Use FSDP2: torch.distributed.fsdp.fully_shard(module) for each"
            " block, then for the model."
        )
    # of torch.compile
    model = getattr(model, "_orig_mod", model)
    groups = internals.param_groups(model)
    if not groups or internals.modules(model)[:1] != [model]:
        raise UnsupportedError(
            "attach: fully_shard was applied to parts of the model only; apply it to the model"
            " last, too."
        )
    kinds = {internals.kind(group) for group in groups}
    if len(kinds) > 1 or not kinds <= {"flat", "hsdp"}:
        raise UnsupportedError(
            f"attach: the model's parameters are {' and '.join(sorted(kinds))}; one mesh for all,"
            " 1-D or 2-D (replicate, shard), is needed."
        )
    _refuse(model, groups)
    make = _hsdp if groups[0].mesh_info.mesh.ndim == 2 else _one_d
    return make(model, groups, process_group, shard_scope)


def _hsdp(model: nn.Module, groups: list[Any], process_group: Any, shard_scope: str) -> Engine:
    """Return the engine for a 2-D mesh. FSDP's all-reduce between nodes is replaced by
    ours, unless an earlier optimizer has done so already.
    """
    info = groups[0].mesh_info
    between = info.mesh.get_group(1 - info.shard_mesh_dim)
    if process_group is not None and covered_ranks(
        levels(process_group)[0].process_group
    ) != covered_ranks(between):
        raise ConfigError(
            "attach: process_group is another one than that of the model's mesh between nodes;"
            " leave process_group out, or give the mesh that fully_shard was given."
        )
    inside = info.shard_process_group if info.shard_mesh_size > 1 else None
    intra_node = IntraNodeGroup(inside, shard_scope)
    give_back = [
        internals.take_over_replicas(group) for group in groups if internals.kind(group) == "hsdp"
    ]
    return HSDPEngine(model, Group(between), intra_node, give_back)


def _one_d(model: nn.Module, groups: list[Any], process_group: Any, shard_scope: str) -> Engine:
    """Return the engine for a 1-D mesh: of one node, where a group between nodes is
    given, or of all ranks.
    """
    info = groups[0].mesh_info
    ours = covered_ranks(info.shard_process_group)
    if isinstance(process_group, DeviceMesh) and process_group.ndim == 2:
        group, intra_node = levels(process_group, shard_scope)
        inside = covered_ranks(process_group.get_group(1))
        if inside != ours:
            raise ConfigError(
                f"attach: fully_shard's mesh holds the ranks {ours}, the second dimension of"
                f" process_group (or of topology.shard_size) the ranks {inside}; give fully_shard"
                " the sub-mesh inside the node: fully_shard(module, mesh=mesh['shard'])."
            )
        return HSDPEngine(model, group, intra_node, [])
    if process_group is not None:
        given = covered_ranks(levels(process_group)[0].process_group)
        if given != ours:
            raise ConfigError(
                f"attach: fully_shard's mesh holds the ranks {ours}, process_group the ranks"
                f" {given}; to compress between nodes, give the whole 2-D mesh (between nodes,"
                " inside a node) as process_group."
            )
    elif len(ours) != dist.get_world_size():
        raise ConfigError(
            f"attach: the model is sharded over {len(ours)} of {dist.get_world_size()} ranks, and"
            " nothing says who averages between the nodes: give"
            " CompressedOptimizer(process_group=mesh) the 2-D mesh (between nodes, inside a node)."
        )
    return FlatEngine(model, Group(info.shard_process_group))


def _refuse(model: nn.Module, groups: list[Any]) -> None:
    """Raise UnsupportedError for what of FSDP2 cannot go with compression."""
    for group in groups:
        if group.gradient_divide_factor is not None:
            raise UnsupportedError(
                "attach: set_gradient_divide_factor is not possible; error feedback is for the"
                " mean."
            )
        for parameter in group.fsdp_params:
            if getattr(parameter, "offload_to_cpu", False):
                raise UnsupportedError(
                    "attach: CPUOffloadPolicy is not supported; leave offload_policy out."
                )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor):
            raise UnsupportedError(
                f"attach: {name} is not sharded (ignored_params), so FSDP does not average it"
                " inside the node; shard it, or freeze it."
            )
        if not internals.is_data_parallel(parameter):
            raise UnsupportedError(
                f"attach: {name} is placed as {parameter.placements}; only data parallelism is"
                " supported: (Shard(0),), or (Replicate(), Shard(0))."
            )


__all__ = ["FlatEngine", "HSDPEngine", "connect"]
