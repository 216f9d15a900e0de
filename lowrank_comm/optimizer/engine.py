"""What an optimizer must know of the engine that runs the model: where gradients wait,
who the workers are, when backward ends.

`Engine` is the answer for a plain model: `p.grad` is this worker's whole gradient. The
adapters in `integrations` give the others' answers (DDP, FSDP2 and HSDP);
`CompressedOptimizer.attach` looks for the adapter of the model that it is given.

A step asks an engine, in this order:

    slots       once: the parameters as this rank holds them
    collect     local gradients, one for each slot; with two levels the exact mean
                inside the node is formed here
    deliver     put the averaged ones into `p.grad`
    fill_nan    or, after a veto, put NaN there, where it must be visible
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm.checkpointing.whole_tensors import tensors_of, untouched
from lowrank_comm.communication.topology import levels, ranks_in_a_node
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.reduction.gradients import own_memory
from lowrank_comm.reduction.params import ParamInfo, gradient_dtype
from lowrank_comm.reduction.plan import Plan
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.row_scatter import RowScatter


class Engine:
    """A plain model, or several levels of plain ranks.

    Args:
        process_group: the workers; see `communication.topology.levels`.
        shard_scope: "shard" or "matrix", for two levels.

    Attributes:
        name: what the plan calls it.
        group, intra_node: the workers, and the ranks of this node.
        reduces_at: when gradients are averaged unless the user says otherwise, "step"
            or "backward".
        compares_values: whether parameters are to be equal on all workers of `group` at
            the start.
        can_overlap: whether a bucket may start while the backward pass goes on.
        saves_whole: a state dict holds whole parameters, also where a rank holds blocks
            of them.
        accumulates_by: what a user writes around all backward passes but the last of a
            step.
        kept_local: ids of parameters whose gradients the engine averages over no ranks;
            they are left as they are.
        refused: of what was collected last, place of a slot -> why a gradient of this
            node cannot be averaged; see `RowScatter`.
    """

    name = "plain model"
    reduces_at = "step"
    compares_values = True
    accumulates_by = "with optimizer.no_sync(): loss.backward()"
    saves_whole = True
    kept_local: Set[int] = frozenset()
    refused: Mapping[int, str] = MappingProxyType({})

    def __init__(self, process_group: Any = None, shard_scope: str = "shard") -> None:
        self.group, self.intra_node = levels(process_group, shard_scope)
        self._rows = RowScatter([], self.intra_node)

    @property
    def rows(self) -> RowScatter | None:
        """What cuts whole gradients into this rank's blocks; None where the engine
        does.
        """
        return self._rows

    @property
    def can_overlap(self) -> bool:
        """Whether a bucket may start during backward: not with two levels, which have a
        collective inside the node first, for which all gradients must be there.
        """
        return self.intra_node.size == 1

    @property
    def begins_early(self) -> bool:
        """Whether a bucket may start during backward; not where the engine has
        collectives of its own then, since a rank that misses a gradient starts the
        bucket later, and all ranks must have collectives in one order.
        """
        return True

    def slots(self, named: Sequence[tuple[str, Tensor]]) -> list[ParamInfo]:
        """Return what this rank holds of these parameters."""
        sharded = [name for name, p in named if isinstance(p, DTensor)]
        if sharded:
            raise ConfigError(
                f"parameter {sharded[0]!r} is a DTensor, as fully_shard makes them, and the"
                " optimizer was not told: call optimizer.attach(model) before the first step."
            )
        whole = [ParamInfo(name, tuple(p.shape), gradient_dtype(p), p.device) for name, p in named]
        self._rows = RowScatter(whole, self.intra_node)
        return self._rows.slots

    def collect(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the local gradients in slot order, to be overwritten; None where there
        is none. With two levels a collective.
        """
        blocks = self._rows.scatter([p.grad for p in parameters])
        self.refused = self._rows.refused
        return blocks

    def deliver(self, parameters: Sequence[Tensor], results: Sequence[Tensor | None]) -> None:
        """Put the averaged gradients into `p.grad`; None means that no worker had one.
        With two levels a collective.
        """
        whole = self._rows.gather(results, [p.grad for p in parameters])
        for parameter, grad in zip(parameters, whole, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad

    def fill_nan(self, parameters: Sequence[Tensor]) -> None:
        """Put NaN into every gradient that is there."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            held = self.local(parameter.grad)
            if own_memory(held):
                held.fill_(float("nan"))
            else:
                parameter.grad = torch.full_like(parameter.grad, float("nan"))

    def drop(self) -> None:
        """Forget what waits elsewhere than in `p.grad`; the user clears gradients."""

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this rank holds of a parameter or gradient."""
        return tensor

    def error_view(self, slot: ParamInfo, parameter: Tensor, error: Tensor) -> Tensor:
        """Return an error memory, or what else has a parameter's shape, as the user
        sees it.
        """
        return error

    def saved(
        self, reducer: Reducer, whole: dict[str, dict[str, Tensor]] | None
    ) -> dict[str, dict[str, Tensor]]:
        """Return what goes into a state dict: parameter name -> {"error": ..., "Q":
        ...}; no communication.

        Args:
            reducer: whose state it is.
            whole: the state of whole parameters, if ranks hold blocks and it was
                gathered since the last step.
        """
        if whole is not None:
            return whole
        if self.intra_node.size > 1 and reducer.step == 0:
            return untouched(reducer)
        state, result = reducer.state, dict[str, dict[str, Tensor]]()
        for name, parts in tensors_of(reducer).items():
            compressor = state.compressor_of(name)
            # as large as the error memory, and live as that is
            live = ("error", *(compressor.parameter_shaped_state if compressor else ()))
            result[name] = {k: t if k in live else t.clone() for k, t in parts.items()}
        return result

    def is_last_backward(self) -> bool:
        """Return whether the backward pass that ends (or goes on) is the last of its
        step.
        """
        return True

    def watch(
        self,
        parameters: Sequence[Tensor],
        on_gradient: Callable[[Tensor], None],
        at_end: Callable[[], None] | None,
    ) -> BackwardWatch:
        """Place hooks that tell of gradients and of the end of a backward pass."""
        return BackwardWatch(parameters, on_gradient, at_end)

    def on_join(self, take_part: weakref.WeakMethod[Callable[[], None]]) -> None:
        """Keep `take_part`, to be called where other workers reduce and this one has no
        data any more.
        """

    def release(self) -> None:
        """Give the model back to its engine."""

    def notes(self) -> list[str]:
        """Return further lines of the plan."""
        return []


ADAPTERS = {
    "DistributedDataParallel": "lowrank_comm.integrations.ddp",
    "FSDPModule": "lowrank_comm.integrations.fsdp",
    "FullyShardedDataParallel": "lowrank_comm.integrations.fsdp",
    "DeepSpeedEngine": None,
    "ReplicateModule": None,
}
"""Class of a wrapper, by name -> the module whose `connect` knows it; None where it is
refused.
"""


def wrapper_of(model: nn.Module) -> str | None:
    """Return the class name of the wrapper that reduces gradients by itself, or None
    for a plain model.

    Raises:
        ConfigError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"attach: it takes the model, as it is wrapped, and got {type(model).__name__}; write"
            " optimizer.attach(model)."
        )
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in ADAPTERS:
                return kind.__name__
    return None


def kept_local(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that DistributedDataParallel was told to ignore:
    each rank keeps its own gradient for them.
    """
    found: set[int] = set()
    for ddp in model.modules():
        names = getattr(ddp, "parameters_to_ignore", ())
        if isinstance(ddp, DistributedDataParallel) and names:
            named = list(ddp.module.named_parameters(remove_duplicate=False))
            found |= {id(p) for name, p in named if name in names}
            found -= {id(p) for name, p in named if name not in names}
    return found


def connect(wrapper: str, model: nn.Module, process_group: Any, shard_scope: str) -> Engine:
    """Return the engine of a wrapped model, by the adapter that knows its wrapper.

    Raises:
        UnsupportedError: there is none, or it cannot work with this model.
        ConfigError: process_group does not fit the model.
    """
    adapter = ADAPTERS[wrapper]
    if adapter is None:
        raise UnsupportedError(_REFUSED[wrapper])
    engine: Engine = importlib.import_module(adapter).connect(model, process_group, shard_scope)
    return engine


def hint_of_two_levels(plan: Plan) -> list[str]:
    """Return a hint where several ranks share a node and each is a worker."""
    ranks = ranks_in_a_node()
    if plan.ranks_in_a_node > 1 or not ranks or ranks < 2 or plan.workers <= ranks:
        return []
    return [
        f"hint: {ranks} ranks share a node here; with two levels (a 2-D mesh, or"
        " topology.shard_size) gradients are averaged exactly inside it, and the error memory of a"
        f" rank is 1/{ranks} of this"
    ]


_REFUSED = {
    "DeepSpeedEngine": (
        "attach: the model is a DeepSpeedEngine, which reduces gradients itself. Put a section"
        ' "lowrank_comm" with the compressor\'s settings into the DeepSpeed JSON, import'
        " lowrank_comm.integrations.deepspeed, and give DeepSpeed the base optimizer."
    ),
    "ReplicateModule": (
        "attach: the model was given to torch's composable `replicate`, which is not supported;"
        " wrap it by DistributedDataParallel, or use fully_shard."
    ),
}
