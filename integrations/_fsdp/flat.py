"""FSDP2 over one dimension: every rank is a worker, with whole gradients.

FSDP is told not to reduce, so that whole local gradients wait in it until the end of
backward. The reducer averages them, and each rank keeps its rows of the result. What
would reduce-scatter past the reducer raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.communication.intra_node import block_of
from lowrank_comm.errors import LowRankCommError, UnsupportedError
from lowrank_comm.integrations._fsdp import internals
from lowrank_comm.integrations._fsdp.base import FSDPEngine, local, placed_like, shard_dim
from lowrank_comm.integrations._methods import wrap_method
from lowrank_comm.optimizer.backward_hooks import BackwardWatch, run_users_hooks
from lowrank_comm.reduction.params import ParamInfo, gradient_dtype
from lowrank_comm.reduction.plan import human_bytes

_SYNC = "set_requires_gradient_sync"


class FlatEngine(FSDPEngine):
    """A model that is sharded over all workers.

    Args:
        model: after fully_shard on a 1-D mesh.
        group: all ranks of that mesh.
    """

    name = "FSDP2, flat"
    # every rank holds other rows
    compares_values = False
    accumulates_by = (
        "model.set_requires_gradient_sync(False)` before, or `with optimizer.no_sync():"
        " loss.backward()"
    )

    def __init__(self, model: nn.Module, group: Group) -> None:
        super().__init__(model, group, IntraNodeGroup())
        self._by_id = {
            id(internals.of_the_model(p)): p for group in self._groups for p in group.fsdp_params
        }
        self._give_back = [
            internals.replace_reduce_scatter(group, _Unreduced()) for group in self._groups
        ]
        self._class_method(False)
        self._syncs = True
        wrap_method(model, _SYNC, self._remember)

    def _class_method(self, requires_gradient_sync: bool) -> None:
        getattr(type(self._model), _SYNC)(self._model, requires_gradient_sync)

    def _remember(
        self, original: Callable[..., None], requires_gradient_sync: bool, *, recurse: bool = True
    ) -> None:
        """Take the place of the model's `set_requires_gradient_sync`, which tells the
        last backward pass of a step from those before.
        """
        self._syncs = requires_gradient_sync

    @override
    def slots(self, named: Sequence[tuple[str, Tensor]]) -> list[ParamInfo]:
        slots = []
        for name, p in named:
            if shard_dim(p) != 0:
                raise UnsupportedError(
                    f"attach: {name} is sharded along dimension {shard_dim(p)}; the flat FSDP2"
                    " engine needs Shard(0)."
                )
            dtype = internals.gradient_dtype(self._by_id[id(p)])
            slots.append(ParamInfo(name, tuple(p.shape), dtype, local(p).device))
        return slots

    @override
    def collect(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [internals.unsharded_gradient(self._by_id[id(p)], take=True) for p in parameters]

    @override
    def deliver(self, parameters: Sequence[Tensor], results: Sequence[Tensor | None]) -> None:
        there, blocks = [], []
        for parameter, result in zip(parameters, results, strict=True):
            if result is not None:
                there.append(parameter)
                blocks.append(result[block_of(result.shape[0], self.group.size, self.group.rank)])
        copies = [
            torch.empty_like(block, dtype=gradient_dtype(parameter))
            for parameter, block in zip(there, blocks, strict=True)
        ]
        if copies:
            torch._foreach_copy_(copies, blocks)
        for parameter, mine in zip(there, copies, strict=True):
            if parameter.grad is None:
                parameter.grad = placed_like(parameter, mine)
            else:
                # averaged before, and not cleared: torch adds to it, too
                local(parameter.grad).add_(mine)
            # FSDP runs them when it has reduced
            run_users_hooks(parameter)

    @override
    def fill_nan(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = placed_like(parameter, torch.full_like(local(parameter), torch.nan))
            run_users_hooks(parameter)

    @override
    def drop(self) -> None:
        for parameter in self._by_id.values():
            internals.unsharded_gradient(parameter, take=True)

    @override
    def is_last_backward(self) -> bool:
        return self._syncs and super().is_last_backward()

    @override
    def watch(
        self,
        parameters: Sequence[Tensor],
        on_gradient: Callable[[Tensor], None],
        at_end: Callable[[], None] | None,
    ) -> BackwardWatch:
        return _GroupWatch(self._model, parameters, on_gradient, at_end)

    @override
    def release(self) -> None:
        self._model.__dict__.pop(_SYNC, None)
        self._class_method(True)
        super().release()

    @override
    def notes(self) -> list[str]:
        whole = sum(
            p.sharded_param.numel() * internals.gradient_dtype(p).itemsize
            for p in self._by_id.values()
        )
        replaced = (
            "FSDP2, flat: the reduce-scatter is replaced by a compressed all-reduce, of which"
            " each rank keeps its rows"
        )
        held = (
            "until the end of backward every rank holds its own whole gradients"
            f" ({human_bytes(whole)}), and the whole error memory where one is kept; HSDP (a"
            " 2-D mesh) divides both by the ranks in a node"
        )
        return [replaced, held]


class _Unreduced:
    """Raises where FSDP would reduce by itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise LowRankCommError(
            "FSDP2 was about to reduce-scatter gradients past the compressed reduction:"
            " set_requires_gradient_sync(True) was called on a part of the model. Call it on the"
            " model that was given to attach()."
        )


class _GroupWatch(BackwardWatch):
    """FSDP fires no hooks of parameters while it does not reduce; its groups tell of
    their gradients instead.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        on_gradient: Callable[[Tensor], None],
        at_end: Callable[[], None] | None,
    ) -> None:
        super().__init__(parameters, on_gradient, at_end)
        undo = internals.after_each_group(model, self._group_is_done)
        self._give_back = weakref.finalize(self, undo)
        self._give_back.atexit = False

    def _group_is_done(self, group: Any) -> None:
        for parameter in group.fsdp_params:
            there = internals.unsharded_gradient(parameter) is not None
            if there and self._watches(parameter.sharded_param):
                self._gradient_is_there(parameter.sharded_param)

    @override
    def remove(self) -> None:
        super().remove()
        self._give_back()
