"""Parameters as slots, and same-shape matrices as batches: the bookkeeping between a
model's tensors and (B, m, n).

Matrices of one shape share a batch, so that orthonormalising many of them is a few
kernels and no Python loop. What a matrix gives does not depend on its batch.

Between gradients and batch, on a CPU, small matrices are moved together; from `LARGE`
elements on, where one operation takes longer than Python needs to start it, each is
added and decoded directly, which saves a pass over memory. On an accelerator all
matrices of a shape are one batch, however large they are, gradients are added by one
`foreach` operation, and only the way out is a product for each matrix, straight into
its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    LowRank,
    Result,
    State,
    columns_in_memory,
)
from lowrank_comm.error_feedback.memory import LARGE, ErrorMemory, places, row_blocks
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.device import on_accelerator
from lowrank_comm.numerics.linalg import orthonormal_rank_revealing
from lowrank_comm.reduction.assignment import CompressorAssignment
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.policy import Treatment

# elements of a batch on a CPU at most: 8 MB in float32, so that it stays in a cache
# from one operation to the next
CHUNK = 1 << 21
# elements that are decoded together where they cannot be written to gradients directly
DECODED = 1 << 23


@dataclass
class Batch:
    """B matrices of one shape and rank, with their error memory and the compressor's
    state.

    Attributes:
        slots: places in the list of gradients.
        names: of the parameters.
        m, n: of each matrix, of which `m` are the rows that this rank holds.
        dtype, device: of the computation.
        memory: errors, (B, m, n).
        compressor: with its rounds and EF21 around it.
        context: what a compressor may know, but for the step.
        initial_basis: parameter name -> Q (n x r), in the place of a drawn one.
        state: the compressor's state, symbol -> (B, ...).

    Raises:
        ConfigError: an initial basis does not fit.
    """

    slots: tuple[int, ...]
    names: tuple[str, ...]
    m: int
    n: int
    dtype: torch.dtype
    device: torch.device
    memory: ErrorMemory
    compressor: Compressor
    context: Context
    initial_basis: Mapping[str, Tensor]
    state: State = field(init=False)
    _work: Tensor | None = None

    def __post_init__(self) -> None:
        # whether all its matrices share the operations on the way in and out
        self._at_once = on_accelerator(self.device)
        self.state = self.initial_state()

    def initial_state(self) -> State:
        """Return the compressor's state before the first step, with the given bases in
        the place of drawn ones.
        """
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        state = self.compressor.initial_state(self.context, self.context.m, self.n, like)
        for row, name in enumerate(self.names):
            if name in self.initial_basis:
                if "Q" not in state:
                    raise ConfigError(
                        f"initial_basis names {name!r}, but {self.compressor.json_name} has no Q;"
                        " leave it out."
                    )
                state["Q"][row] = self._given_basis(name, state["Q"][row])
        return state

    def _given_basis(self, name: str, like: Tensor) -> Tensor:
        """Return a given Q as the compressor keeps it: orthonormal, no dead columns."""
        basis, context = self.initial_basis[name], self.context
        shape = (self.n, context.rank)
        if tuple(basis.shape) != shape:
            raise ConfigError(
                f"initial_basis[{name!r}] has shape {tuple(basis.shape)}, Q must be n x r ="
                f" {self.n} x {context.rank}."
            )
        alone = Context((name,), context.t, context.seed, context.rank)
        fill = alone.draw("redraw Q", shape, like)
        return orthonormal_rank_revealing(basis.to(like).unsqueeze(0), fill)[0]

    def delta(
        self, grads: Sequence[Tensor | None], scale: float, rows: list[int] | None = None
    ) -> Delta:
        """Return Delta = g / scale + e of all matrices, or of `rows`; zero in place of
        a missing g. Valid until the next step.
        """
        slots = self.slots if rows is None else tuple(self.slots[row] for row in rows)
        if self._at_once:
            return self._delta_at_once([grads[k] for k in slots], scale, rows)
        error = self.memory.tensor
        at: slice | Tensor = slice(None)
        if rows is not None:
            at = places(rows, error.device)
            error = error[at]
        if isinstance(at, slice):
            work = self._workspace()[at]
        else:
            work = torch.empty(error.shape, dtype=self.dtype, device=self.device)
        parts: list[Tensor | None] = []
        for k in slots:
            grad = grads[k]
            if grad is not None:
                grad = grad.reshape(self.m, self.n)
                # a dtype whose sum with the error memory is formed in the computation's
                if torch.promote_types(grad.dtype, error.dtype) != self.dtype:
                    grad = grad.to(self.dtype)
            parts.append(grad)
        if self.m * self.n >= LARGE:
            return LazyDelta(work, error, parts, scale)
        zero = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.m, self.n)
        torch.stack([zero if part is None else part.to(self.dtype) for part in parts], out=work)
        return Delta(torch.add(error, work, alpha=1.0 / scale, out=work))

    def _delta_at_once(
        self, grads: Sequence[Tensor | None], scale: float, rows: list[int] | None
    ) -> Delta:
        """Form Delta in a few operations, in room of its own: an accelerator's
        allocator hands it out for nothing, and between steps it is of use to the
        backward pass.
        """
        work = torch.empty(len(grads), self.m, self.n, dtype=self.dtype, device=self.device)
        self.memory.copy_to(work, rows)
        pairs = [
            (room, grad.reshape(self.m, self.n))
            for room, grad in zip(work.unbind(0), grads, strict=True)
            if grad is not None
        ]
        if pairs:
            rooms, given = zip(*pairs, strict=True)
            torch._foreach_add_(rooms, given, alpha=1.0 / scale)
        return Delta(work)

    def _workspace(self) -> Tensor:
        """Return room for Delta, kept between steps: on a CPU fresh pages cost as much
        as a pass over memory.
        """
        if self._work is None:
            self._work = torch.empty(
                len(self.slots), self.m, self.n, dtype=self.dtype, device=self.device
            )
        return self._work

    def write(
        self, applied: LowRank | Tensor, targets: Sequence[Tensor | None], scale: float
    ) -> None:
        """Decode into the gradients; None targets are left out."""
        left = list(targets)
        if isinstance(applied, LowRank) and (self._at_once or self.m * self.n >= LARGE):
            for row, target in enumerate(targets):
                if target is not None and target.dtype == self.dtype and target.is_contiguous():
                    self._write_product(applied.p[row], applied.q[row], target, scale)
                    left[row] = None
        together = max(1, DECODED // max(1, self.m * self.n))
        for start in range(0, len(left), together):
            some = left[start : start + together]
            if any(target is not None for target in some):
                self._write_dense(applied[start : start + together], some, scale)

    def _write_dense(
        self, applied: LowRank | Tensor, targets: Sequence[Tensor | None], scale: float
    ) -> None:
        """Decode into gradients of another dtype or layout; large matrices by blocks of
        rows.
        """
        if isinstance(applied, Tensor):
            copy_to(targets, (applied * scale if scale != 1.0 else applied).unbind(0))
            return
        rows = max(1, DECODED // (len(targets) * self.n))
        if not all(target is None or target.is_contiguous() for target in targets):
            rows = self.m
        for start in range(0, self.m, rows):
            dense = LowRank(applied.p[:, start : start + rows], applied.q).dense()
            if scale != 1.0:
                dense *= scale
            if rows < self.m:
                blocks = [
                    None if t is None else t.view(self.m, self.n)[start : start + rows]
                    for t in targets
                ]
                copy_to(blocks, dense.unbind(0))
            else:
                copy_to(targets, dense.unbind(0))

    def _write_product(self, p: Tensor, q: Tensor, target: Tensor, scale: float) -> None:
        """Write P Q^T, times the scale, into a gradient."""
        matrix = target.view(self.m, self.n)
        if scale == 1.0:
            torch.mm(p, q.T, out=matrix)
        else:
            torch.addmm(matrix, p, q.T, beta=0.0, alpha=scale, out=matrix)

    def commit(self, delta: Tensor, result: Result, rows: list[int] | None, t: int) -> None:
        """Store the errors, e <- Delta - sent, and the compressor's next state, of all
        matrices or of `rows`. `delta` may be overwritten.
        """
        free = None
        if rows is None and result.kept is None and isinstance(result.sent, LowRank):
            free = self.memory.exchange(delta, result.sent)
        if free is None:
            self.memory.keep(delta, result.sent, result.kept, rows, t)
        elif not self._at_once:
            self._work = free
        for symbol, tensor in result.state.items():
            if rows is None:
                self.state[symbol] = tensor
            else:
                self.state[symbol][places(rows, self.device)] = tensor


def copy_to(targets: Sequence[Tensor | None], parts: Sequence[Tensor]) -> None:
    """Copy each part into its target, in its shape; None targets are left out."""
    there, given = [], []
    for target, part in zip(targets, parts, strict=True):
        if target is not None:
            there.append(target)
            given.append(part.reshape(target.shape))
    if there:
        torch._foreach_copy_(there, given)


class LazyDelta(Delta):
    """Delta of large matrices, formed within its first product, block of rows by block,
    while a block is in the cache.
    """

    def __init__(
        self, work: Tensor, error: Tensor, gradients: Sequence[Tensor | None], scale: float
    ) -> None:
        super().__init__(work)
        self._error: Tensor | None = error
        self._gradients, self._scale, self._formed = gradients, scale, False

    @property
    def tensor(self) -> Tensor:
        if not self._formed:
            for row in range(len(self._gradients)):
                self._form(row, slice(None))
            self._done()
        return self._tensor

    def times(self, q: Tensor) -> Tensor:
        if self._formed:
            return super().times(q)
        product = torch.empty(*self._tensor.shape[:2], q.shape[-1], dtype=q.dtype, device=q.device)
        q = columns_in_memory(q)
        for row in range(len(self._gradients)):
            for block in row_blocks(self._tensor[row]):
                self._form(row, block)
                torch.mm(self._tensor[row, block], q[row], out=product[row, block])
        self._done()
        return product

    def _form(self, row: int, block: slice) -> None:
        assert self._error is not None
        gradient, error = self._gradients[row], self._error[row, block]
        if gradient is None:
            self._tensor[row, block] = error
        else:
            torch.add(error, gradient[block], alpha=1.0 / self._scale, out=self._tensor[row, block])

    def _done(self) -> None:
        # gradients may be here as copies in another dtype
        self._formed, self._gradients, self._error = True, (), None


def build_batches(
    slots: Sequence[ParamInfo],
    treatments: Sequence[Treatment],
    assignment: CompressorAssignment,
    workers: Workers,
    seed: int,
    initial_basis: Mapping[str, Tensor],
    indices: Sequence[int],
) -> list[Batch]:
    """Group the parameters that are given to a compressor by compressor, shape, rank,
    dtype and device, in slot order.

    Args:
        slots, treatments: the parameters and what the policy decided.
        assignment: which compressor carries out a treatment.
        workers: who takes part; this worker's number is for private draws.
        seed: of the draws.
        initial_basis: parameter name -> Q (n x r).
        indices: which of the slots to group.

    Returns:
        Batches; the same grouping on all workers.

    Raises:
        ConfigError: an initial basis has the wrong shape.
    """
    intra_node, worker = workers.intra_node, workers.group.rank
    groups: dict[tuple[object, ...], list[int]] = {}
    for k in indices:
        slot, treatment = slots[k], treatments[k]
        if treatment.batched:
            key = (
                treatment.scheme,
                treatment.m,
                treatment.n,
                treatment.rank,
                slot.compute_dtype,
                slot.device,
            )
            groups.setdefault(key, []).append(k)
    batches = []
    for members in groups.values():
        together = len(members)
        if not on_accelerator(slots[members[0]].device):
            # not this rank's own: the grouping is the same on all ranks of a node
            largest = slots[members[0]].block(intra_node, 0)
            together = max(1, CHUNK // max(1, math.prod(largest)))
        for start in range(0, len(members), together):
            chosen = tuple(members[start : start + together])
            slot, treatment = slots[chosen[0]], treatments[chosen[0]]
            m, n, rank, dtype = treatment.m, treatment.n, treatment.rank, slot.compute_dtype
            # of a block of a whole matrix, fewer than m
            rows, device = slot.numel // n, slot.device
            compressor, error_feedback = assignment.compressor_for(treatment)
            names = tuple(slots[k].name for k in chosen)
            memory = ErrorMemory(error_feedback, names, rows, n, dtype, device, seed, worker)
            held = intra_node.block(m) if rows != m else slice(None)
            context = Context(
                names, -1, seed, rank, m=m, rows=held, in_blocks=intra_node.whole_matrices
            )
            batches.append(
                Batch(
                    chosen,
                    names,
                    rows,
                    n,
                    dtype,
                    device,
                    memory,
                    compressor,
                    context,
                    initial_basis,
                )
            )
    return batches
