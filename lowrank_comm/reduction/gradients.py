"""The gradients that a caller hands in: which of them cannot be averaged, and which may
be overwritten with the result.

A gradient that cannot be averaged is found on one worker, and all must come to the same
end. That worker sends NaN as the control number that says whether it has the gradient
(`packet`), which vetoes the pass on all workers, and each reads from the sum why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.reduction.params import ParamInfo, gradient_dtype


def unusable(
    slots: Sequence[ParamInfo], grads: Sequence[Tensor | None], places: Iterable[int]
) -> dict[int, str]:
    """Find gradients that cannot be averaged.

    Args:
        slots: the parameters.
        grads: in slot order, None where there is none.
        places: of the slots to look at.

    Returns:
        Place of a slot -> what is wrong with its gradient, and what to do about it.
    """
    found = {}
    for k in places:
        grad, slot = grads[k], slots[k]
        if grad is None or (
            grad.dtype is slot.dtype
            and grad.layout is torch.strided
            and grad.device == slot.device
            and grad.shape == slot.shape
        ):
            continue
        if grad.layout is not torch.strided:
            found[k] = f"{slot.name} is sparse ({grad.layout}); use sparse=False, or to_dense()"
        elif not grad.dtype.is_floating_point:
            found[k] = f"{slot.name} is of {grad.dtype}; give it a real floating dtype"
        elif grad.device != slot.device:
            found[k] = (
                f"{slot.name} is on {grad.device}, and its parameter's is expected on"
                f" {slot.device}; move it there"
            )
        elif grad.shape != slot.shape:
            found[k] = (
                f"{slot.name} has shape {tuple(grad.shape)}, its parameter {slot.shape}; they"
                " must agree"
            )
    return found


def unusable_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return parameter name -> what is wrong with its `.grad`, and what to do about it,
    for gradients that cannot be averaged.
    """
    there = [(name, p) for name, p in named if p.grad is not None]
    slots = [ParamInfo(n, tuple(p.shape), gradient_dtype(p), p.device) for n, p in there]
    found = unusable(slots, [p.grad for _, p in there], range(len(there)))
    return {there[k][0]: text for k, text in found.items()}


def refuse(workers: Workers, mine: Iterable[str], vetoed_by_them: bool = False) -> None:
    """Raise, on all workers, for gradients that cannot be averaged; called by all of
    them after a veto. A collective tells whose they are.

    Args:
        workers: who have seen the veto.
        mine: what is wrong with this worker's.
        vetoed_by_them: whether it is known that such a gradient has vetoed. Else some
            worker must say so.

    Raises:
        LowRankCommError: some worker has such a gradient.
    """
    told = workers.all_gather_text("; the gradient of ".join(list(mine)[:4]))
    whose = [f"on rank {rank} the gradient of {text}" for rank, text in enumerate(told) if text]
    if whose or vetoed_by_them:
        raise LowRankCommError(
            "lowrank_comm: gradients that cannot be averaged, so no worker steps:"
            f" {'; '.join(whose) or 'on another worker'}."
        )


def writable(slots: Sequence[ParamInfo], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients that may be overwritten, None in the place of the others.

    Those are left out that share memory with another gradient or with themselves (an
    expanded tensor), since what is written to one would be read from the other; and
    those of another dtype than the slot's, since the result must be the same on all
    workers, also on those that had no gradient.
    """
    targets = list(grads)
    spans: list[tuple[int, int, int]] = []
    for k, (slot, grad) in enumerate(zip(slots, grads, strict=True)):
        if grad is None:
            continue
        if grad.dtype is not slot.dtype:
            targets[k] = None
        elif grad.is_contiguous():
            spans.append((grad.data_ptr(), slot.numel, k))
        elif own_memory(grad):
            spans.append((grad.data_ptr(), _reach(grad), k))
        else:
            targets[k] = None
    spans.sort()
    end = last = 0
    for start, elements, k in spans:
        if start < end and elements:
            targets[k] = targets[last] = None
        stop = start + elements * slots[k].dtype.itemsize
        if stop > end:
            end, last = stop, k
    return targets


def separate_from_parameters(
    holders: Iterable[Tensor],
    parameters: Iterable[Tensor],
    local: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Copy the gradients that lie in a parameter's storage (`a.grad = b.detach()`),
    since the result would be written into the parameter.

    Args:
        holders: the parameters whose `.grad` will be overwritten.
        parameters: whose memory is to be left alone.
        local: returns this rank's part of a parameter or gradient, where they are not
            plain tensors.
    """
    held = [(p, p.grad) for p in holders if p.grad is not None]
    mine = [grad for _, grad in held]
    if local is not None:
        parameters, mine = map(local, parameters), list(map(local, mine))
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    for (holder, grad), part in zip(held, mine, strict=True):
        dense = part.layout is torch.strided and part.numel()
        if dense and part.untyped_storage().data_ptr() in storages:
            holder.grad = grad.clone()


def _reach(tensor: Tensor) -> int:
    """Return how many elements of memory a tensor spans, those between its own too."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def own_memory(tensor: Tensor) -> bool:
    """Return whether each element surely has memory of its own, as those of an expanded
    tensor have not.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True
