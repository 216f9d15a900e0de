"""Parameters as slots, and same-shape matrices as batches: the bookkeeping between a model's tensors and (B, m, n).

Small matrices of one shape share a batch, so that many of them cost no Python loop and few kernels; a batch stays
below `CHUNK` elements, so that it fits a cache and its workspace stays small; a matrix larger than that is a batch of
its own and is used in place, without being copied together. What a matrix gives does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .compressors.base import Compressor, Context, LowRank, State
from .error_feedback import ErrorFeedback, ErrorMemory
from .errors import ConfigError
from .linalg import orthonormal_rank_revealing
from .policy import Treatment

CHUNK = 1 << 20


@dataclass(frozen=True)
class Slot:
    """One parameter: its name in the model, full shape, dtype of its gradient, device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The wider of float32 and the parameter's dtype."""
        return torch.promote_types(self.dtype, torch.float32)


@dataclass
class Batch:
    """B matrices of one shape and rank, with their error memory and the compressor's state.

    Attributes:
        slots: places in the list of gradients.
        names: of the parameters.
        m, n, rank: of each matrix.
        dtype, device: of the computation.
        memory: errors, (B, m, n).
        state: symbol -> (B, ...).
    """

    slots: tuple[int, ...]
    names: tuple[str, ...]
    m: int
    n: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    memory: ErrorMemory
    state: State

    def stack(self, grads: Sequence[Tensor | None], scale: float) -> Tensor:
        """The gradients as (B, m, n) without the loss scale, zero where there is none. May be a view of a gradient."""
        parts = []
        for k in self.slots:
            grad = grads[k]
            if grad is None:
                parts.append(torch.zeros(self.m, self.n, dtype=self.dtype, device=self.device))
            else:
                parts.append(grad.reshape(self.m, self.n))
        if len({part.dtype for part in parts}) > 1:
            parts = [part.to(self.dtype) for part in parts]
        stacked = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        stacked = stacked.to(self.dtype)
        return stacked / scale if scale != 1.0 else stacked

    def write(self, applied: LowRank | Tensor, targets: Sequence[Tensor | None], scale: float) -> None:
        """Decode into the gradients; None targets are left out."""
        only = targets[0]
        if isinstance(applied, LowRank) and len(targets) == 1 and scale == 1.0:
            if only is None:
                return
            if only.dtype == self.dtype and only.is_contiguous():
                torch.mm(applied.p[0], applied.q[0].T, out=only.view(self.m, self.n))
                return
        dense = applied.dense() if isinstance(applied, LowRank) else applied
        if scale != 1.0:
            dense = dense * scale
        pairs = [(target, part) for target, part in zip(targets, dense.unbind(0), strict=True) if target is not None]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [part.reshape(t.shape) for t, part in pairs])

    def rows_of_state(self, rows: list[int] | None) -> State:
        """State of some matrices, or of all."""
        return self.state if rows is None else {symbol: tensor[rows] for symbol, tensor in self.state.items()}

    def store_state(self, rows: list[int] | None, state: State) -> None:
        """Take over the next state of some matrices, or of all."""
        for symbol, tensor in state.items():
            if rows is None:
                self.state[symbol] = tensor
            else:
                self.state[symbol] = self.state[symbol].clone()
                self.state[symbol][rows] = tensor


def build_batches(
    slots: Sequence[Slot],
    treatments: Sequence[Treatment],
    compressor: Compressor,
    error_feedback: ErrorFeedback,
    seed: int,
    worker: int,
    initial_basis: Mapping[str, Tensor],
) -> list[Batch]:
    """Group the low-rank parameters by shape, rank, dtype and device, in slot order.

    Args:
        slots, treatments: the parameters and what the policy decided.
        compressor: makes the initial state.
        error_feedback: how errors are kept.
        seed: of the draws.
        worker: this worker's number, for private draws.
        initial_basis: parameter name -> Q (n x r).

    Returns:
        Batches; the same grouping on all workers.

    Raises:
        ConfigError: an initial basis names no compressed parameter or has the wrong shape.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, (slot, treatment) in enumerate(zip(slots, treatments, strict=True)):
        if treatment.low_rank:
            key = (treatment.m, treatment.n, treatment.rank, slot.compute_dtype, slot.device)
            groups.setdefault(key, []).append(k)
    low_rank = {slots[k].name for members in groups.values() for k in members}
    for name in initial_basis:
        if name not in low_rank:
            raise ConfigError(f"initial_basis names {name!r}, which is not a compressed parameter; remove it.")
    batches = []
    for members in groups.values():
        together = max(1, CHUNK // max(1, slots[members[0]].numel))
        for start in range(0, len(members), together):
            chosen = tuple(members[start : start + together])
            slot, treatment = slots[chosen[0]], treatments[chosen[0]]
            m, n, rank, dtype = treatment.m, treatment.n, treatment.rank, slot.compute_dtype
            names = tuple(slots[k].name for k in chosen)
            memory = ErrorMemory(error_feedback, names, m, n, dtype, slot.device, seed, worker)
            context = Context(names, -1, seed, rank)
            state = compressor.initial_state(context, m, n, torch.empty(0, dtype=dtype, device=slot.device))
            for row, name in enumerate(names):
                if name in initial_basis:
                    state["Q"][row] = _checked_basis(name, initial_basis[name], n, rank, context, state["Q"][row])
            batches.append(Batch(chosen, names, m, n, rank, dtype, slot.device, memory, state))
    return batches


def _checked_basis(name: str, basis: Tensor, n: int, rank: int, context: Context, like: Tensor) -> Tensor:
    """A given Q as the compressor keeps it: orthonormal, dead columns replaced."""
    if tuple(basis.shape) != (n, rank):
        raise ConfigError(f"initial_basis[{name!r}] has shape {tuple(basis.shape)}, Q must be n x r = {n} x {rank}.")
    alone = Context((name,), context.t, context.seed, context.rank)
    fill = alone.draw("redraw Q", (n, rank), like)
    return orthonormal_rank_revealing(basis.to(like).unsqueeze(0), fill)[0]
