"""The one place that reads FSDP2's private surface.

    param_groups(model)       every group of parameters that FSDP reduces together
    FSDPParamGroup.mesh_info  over which mesh it is sharded, and whether FSDP averages
                              over replicas, too
    FSDPParam                 one parameter: `sharded_param` (a DTensor), the unsharded
                              one and its gradient

Groups and parameters of FSDP are `Any` here: torch does not export their classes.
Tested with the torch version of the constraints file; anything missing is refused by
name.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lowrank_comm.errors import UnsupportedError

_GROUP = (
    "fsdp_params",
    "mesh_info",
    "post_backward",
    "reduce_grads",
    "all_reduce_grads",
    "gradient_divide_factor",
)
_PARAM = (
    "sharded_param",
    "_module_info",
    "mp_policy",
    "to_sharded_dtensor",
    "unsharded_accumulated_grad",
)


def _check(owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise UnsupportedError(
            f"attach: {type(owner).__name__} of torch {torch.__version__} has no"
            f" {', '.join(missing)}, which the FSDP2 adapter needs. It is tested with torch 2.13."
        )


def modules(model: nn.Module) -> list[Any]:
    """Return all modules to which fully_shard was applied, outermost first."""
    # By class: what torch.compile returns passes on names that it does not know.
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]


def param_groups(model: nn.Module) -> list[Any]:
    """Return every parameter group once: `fully_shard([norm, head])` shows one group
    at several modules.
    """
    groups: dict[int, Any] = {}
    for module in modules(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)
        if several is None:
            several = [getattr(state, "_fsdp_param_group", None)]
        for group in filter(None, several):
            _check(group, _GROUP)
            for parameter in group.fsdp_params:
                _check(parameter, _PARAM)
            groups[id(group)] = group
    return list(groups.values())


def of_the_model(parameter: Any) -> Tensor:
    """Return the model's parameter, also where it was replaced after fully_shard
    (weights loaded by assignment): FSDP itself notices that at the first forward only.
    """
    info = parameter._module_info
    return getattr(info.module, info.param_name)  # type: ignore[no-any-return]


def kind(group: Any) -> str:
    """Return "flat" (sharded over one dimension), "hsdp" (sharded and replicated),
    "replicated", or the name of another kind of mesh.
    """
    name = type(group.mesh_info).__name__
    kinds = {"FSDPMeshInfo": "flat", "HSDPMeshInfo": "hsdp", "DDPMeshInfo": "replicated"}
    return kinds.get(name, name)


def take_over_replicas(group: Any) -> Callable[[], None]:
    """Let FSDP average this group over its shards only, and no more over its replicas;
    return a function that undoes it.

    The group is given the description of a mesh without replicas; the parameters keep
    theirs, with both dimensions, so clipping and checkpoints see what they saw.
    """
    info = group.mesh_info
    parent = next(base for base in type(info).__mro__ if base.__name__ == "FSDPMeshInfo")
    alone = parent(mesh=info.mesh, shard_mesh_dim=info.shard_mesh_dim)
    alone.reduce_scatter_process_group = getattr(info, "reduce_scatter_process_group", None)
    group.mesh_info = alone
    return functools.partial(setattr, group, "mesh_info", info)


def is_data_parallel(parameter: DTensor) -> bool:
    """Return whether a DTensor is placed as data parallelism alone places it, with at
    most one replicated dimension in front.
    """
    *before, last = parameter.placements
    return (
        type(last) is Shard
        and len(before) <= 1
        and all(isinstance(place, Replicate) for place in before)
    )


def is_last_backward(model: nn.Module) -> bool:
    """Return whether this is the last backward pass of a step: it is, unless the user
    has said otherwise by `set_is_last_backward`.
    """
    context = getattr(model._get_fsdp_state(), "_state_ctx", None)  # type: ignore[operator]
    return bool(getattr(context, "is_last_backward", True))


def wants_all_reduce(groups: Sequence[Any]) -> bool:
    """Return whether the groups want an all-reduce: they do, unless the user has turned
    it off by `set_requires_all_reduce`.
    """
    return all(group.all_reduce_grads for group in groups)


def unsharded_gradient(parameter: Any, take: bool = False) -> Tensor | None:
    """Return the whole local gradient that waits because FSDP was told not to reduce;
    `take` takes it away from FSDP.
    """
    unsharded = getattr(parameter, "_unsharded_param", None)
    for owner, name in ((parameter, "unsharded_accumulated_grad"), (unsharded, "grad")):
        grad: Tensor | None = getattr(owner, name, None)
        if grad is not None:
            if take:
                setattr(owner, name, None)
            return grad
    return None


def gradient_dtype(parameter: Any) -> torch.dtype:
    """Return the dtype in which the gradients of a parameter are reduced."""
    policy = parameter.mp_policy
    return policy.reduce_dtype or policy.param_dtype or parameter.sharded_param.dtype  # type: ignore[no-any-return]


def replace_reduce_scatter(group: Any, stands_in: Any) -> Callable[[], None]:
    """Put something in the place of a group's reduce-scatter; return a function that
    puts it back.
    """
    _check(group, ("_reduce_scatter_comm",))
    before = group._reduce_scatter_comm
    group._reduce_scatter_comm = stands_in
    return functools.partial(setattr, group, "_reduce_scatter_comm", before)


def after_each_group(model: nn.Module, call: Callable[[Any], None]) -> Callable[[], None]:
    """Call `call(group)`, a method that is held weakly, whenever a group of parameters
    has its gradients; return a function that undoes it.
    """
    undo, weak = contextlib.ExitStack(), weakref.WeakMethod(call)
    for group in param_groups(model):
        original = group.post_backward

        def post_backward(
            *args: Any, group: Any = group, original: Callable[..., None] = original
        ) -> None:
            original(*args)
            method = weak()
            if method is not None:
                method(group)

        group.post_backward = post_backward
        undo.callback(group.__dict__.pop, "post_backward", None)
    return undo.close
