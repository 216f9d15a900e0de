"""The reducer: one compressed averaging of all gradients of a model.

The order of a step:

1. Agreement (before the first pass, and after a state was loaded or parameters were added). A fingerprint of settings,
   parameters and step is compared between the workers.
2. Delta. For each batch of same-shape matrices the gradients are stacked and the error memory is added: Delta = g / scale
   + e. A missing gradient counts as zero. Small matrices share a batch; a large one is a batch of its own.
3. Phases. The compressors' generators run in lock-step (`lockstep`): each phase is one packet, one collective. Phase one
   also carries what is dense, one finite flag, and which gradients are missing.
4. Veto. If any worker's numbers are not finite, the pass ends here on all workers; nothing has been changed.
5. Decode. P Q^T, times the scale, is written into the gradients.
6. The pass leaves a pending transaction. `commit` writes e <- Delta - sent, the bases, and the step counter;
   `rollback` forgets it. An engine that decides later whether the step counts (loss scaling) decides between the two.

All state is keyed by parameter name. Order of batches and requests follows the order of the slots, the same on all
workers. `exchange` is a generator that yields buffers to be summed, so that a process group and the simulation of N
workers in one process run the same code.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batch, Slot
from .compressors.base import Context, Delta, LowRank, Result, Steps
from .errors import LowRankCommError
from .linalg import full_precision
from .lockstep import Account, Agreed, lockstep
from .reducer_state import ReducerState
from .reporting import LastPass

__all__ = ["Outcome", "Reducer", "Slot"]


@dataclass(frozen=True)
class Outcome:
    """How a pass ended.

    Attributes:
        applied: False if it was vetoed: some worker's numbers were not finite, and nothing was changed.
        grads: in slot order; the tensors given, holding the result; a new tensor where this worker had none but another
            had; None where nobody had one.
    """

    applied: bool
    grads: list[Tensor | None]


@dataclass
class _Job:
    """A batch, or some rows of it, in one pass."""

    batch: Batch
    rows: list[int] | None
    context: Context
    delta: Delta | None = None
    result: Result | None = None

    @property
    def indices(self) -> list[int]:
        """Rows as numbers."""
        return list(range(len(self.batch.names))) if self.rows is None else self.rows


@dataclass
class _Pending:
    """What commit will make true."""

    jobs: list[_Job]
    present: list[bool]


class Reducer(ReducerState):
    """Averages gradients over a group of workers through a compressor with error feedback.

    Args:
        slots: the parameters, in the same order on all workers; names are unique.
        compressor: the scheme.
        group: the workers.
        min_compression_rate, rules: see `policy`.
        error_feedback: how the error memory is kept.
        wire_dtype: "bfloat16", "float16", "float32", "float64", or None for the wider of float32 and the parameter's dtype.
        seed: of all random draws.
        initial_basis: parameter name -> Q (n x r) to start from, instead of a Gaussian one.

    Raises:
        ConfigError: a name occurs twice, a dtype is unknown, or an initial basis does not fit.

    Source: Algorithm 2 of arXiv 2509.11254, steps (7a), (7b) and the error update.
    """

    def reduce(self, grads: Sequence[Tensor | None], *, scale: float = 1.0) -> Outcome:
        """One lock-step pass over all parameters; a collective, to be called by every worker.

        Args:
            grads: this worker's gradients in slot order, None where it has none; overwritten with the result.
            scale: the loss scale that the gradients carry. The error memory is kept without it.

        Returns:
            The outcome. Unless it was vetoed, `commit` or `rollback` must follow.

        Raises:
            ConfigMismatchError: first pass only, on every worker, if settings or parameters differ.
            LowRankCommError: the last pass was neither committed nor rolled back, or the list does not fit the slots.
        """
        if not self._agreed:
            self.agree()
        passing = self.exchange(grads, scale)
        with full_precision(self.device):
            try:
                buffers = next(passing)
                while True:
                    buffers = passing.send(self.group.sum_(buffers))
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    @torch.no_grad()
    def exchange(self, grads: Sequence[Tensor | None], scale: float) -> Generator[list[Tensor], int, Outcome]:
        """The pass as a generator: yields buffers to be summed over the workers in place, is sent how many collectives
        that took, returns the outcome. `reduce` drives it over the process group."""
        self._check(grads)
        clock = time.perf_counter()
        account = Account()
        jobs = [job for batch in self._batches for job in self._jobs(batch)]
        steps = [self._steps(job, grads, scale) for job in jobs]
        dense = [self._flat(group, grads, scale) for group in self._dense_groups()]
        account.seconds["compress"] += time.perf_counter() - clock
        agreed = yield from lockstep(
            steps,
            dense,
            [grad is not None for grad in grads],
            workers=self.group.size,
            rank=self.group.rank,
            wire_dtype=self._wire_dtype,
            device=self.device,
            account=account,
        )
        self._worker = (self.group.rank, self.group.size)
        self._enter_ledger(account, jobs, agreed is not None)
        if agreed is None:
            return Outcome(False, list(grads))
        clock = time.perf_counter()
        for job, result in zip(jobs, agreed.results, strict=True):
            job.result = result
        result_grads = self._decode(jobs, agreed, list(grads), scale)
        self._pending = _Pending(jobs, agreed.present)
        account.seconds["decompress"] = time.perf_counter() - clock
        return Outcome(True, result_grads)

    @torch.no_grad()
    def commit(self) -> None:
        """Make the pending pass true: error memory, bases, step counter."""
        if self._pending is None:
            raise LowRankCommError("commit() without a pending pass; call reduce() first.")
        clock = time.perf_counter()
        pending: _Pending = self._pending
        self._pending = None
        assert self._last is not None
        with full_precision(self.device):
            for job in pending.jobs:
                self._commit(job, pending.present, self._last)
        self.step += 1
        self.ledger.restarts += self._last.restarts
        self._last.account.seconds["commit"] = time.perf_counter() - clock

    def _commit(self, job: _Job, present: list[bool], last: LastPass) -> None:
        assert job.result is not None
        assert job.delta is not None
        delta, result, rows = job.delta.tensor, job.result, job.rows
        alive = [row for row in job.indices if present[job.batch.slots[row]]]
        if len(alive) < len(job.indices):  # nobody had a gradient for some: their error and basis stay as they are
            places = [job.indices.index(row) for row in alive]
            delta, result, rows = delta[places], _rows_of_result(result, places), alive
        if alive:
            last.enter(job.batch, rows, delta, result)
            job.batch.keep_error(delta, result, rows, self.step)
            job.batch.store_state(rows, result.state)
        job.delta, job.result = None, None  # Delta is model-sized: let it go now

    def rollback(self) -> None:
        """Forget the pending pass: error memory, bases and step counter stay as they were before it."""
        self._pending = None
        if self._last is not None:
            self._last.applied = False

    @property
    def pending(self) -> bool:
        """Whether a pass waits for commit or rollback."""
        return self._pending is not None

    # ---------------------------------------------------------------- parts of a step

    def _check(self, grads: Sequence[Tensor | None]) -> None:
        if self._pending is not None:
            raise LowRankCommError("reduce() while the last pass is pending; call commit() or rollback() first.")
        if len(grads) != len(self.slots):
            raise LowRankCommError(f"got {len(grads)} gradients for {len(self.slots)} parameters; give one for each slot.")
        for grad, slot in zip(grads, self.slots, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:
                raise LowRankCommError(f"{slot.name}: sparse gradients cannot be averaged here; use sparse=False.")
            if grad.numel() != slot.numel:
                raise LowRankCommError(
                    f"{slot.name}: the gradient has shape {tuple(grad.shape)}, the parameter {slot.shape}; they must agree."
                )

    def _steps(self, job: _Job, grads: Sequence[Tensor | None], scale: float) -> Steps:
        """The compressor's generator; Delta is made when it is first advanced, just before it is read."""
        job.delta = job.batch.delta(grads, scale, job.rows)
        return (yield from self.compressor.step(job.delta, job.batch.rows_of_state(job.rows), job.context))

    def _jobs(self, batch: Batch) -> list[_Job]:
        """The batch as one job, or as two where only some of its matrices restart."""
        due = [bool(self._schedule and self._schedule.due(name, self.step)) for name in batch.names]
        jobs = []
        for restart in (False, True):
            rows = [row for row, is_due in enumerate(due) if is_due == restart]
            if not rows:
                continue
            whole = len(rows) == len(due)
            context = Context(
                tuple(batch.names[row] for row in rows),
                self.step,
                self.seed,
                batch.rank,
                restart,
                wire_rounds=self._wire_dtype is not None and self._wire_dtype.itemsize < batch.dtype.itemsize,
            )
            jobs.append(_Job(batch, None if whole else rows, context))
        return jobs

    def _dense_groups(self) -> list[list[int]]:
        """Dense slots by dtype of computation and device, in slot order."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k in self._dense:
            groups.setdefault((self.slots[k].compute_dtype, self.slots[k].device), []).append(k)
        return list(groups.values())

    def _flat(self, group: list[int], grads: Sequence[Tensor | None], scale: float) -> Tensor:
        """The dense gradients of a group in one vector, without the loss scale."""
        pieces = []
        for k in group:
            grad, slot = grads[k], self.slots[k]
            flat = torch.zeros(slot.numel, dtype=slot.dtype, device=slot.device) if grad is None else grad.reshape(-1)
            pieces.append(flat.to(slot.compute_dtype))
        flat = torch.cat(pieces)
        return flat.div_(scale) if scale != 1.0 else flat

    def _decode(self, jobs: list[_Job], agreed: Agreed, grads: list[Tensor | None], scale: float) -> list[Tensor | None]:
        """Write the means into the gradients; make a gradient where only other workers had one."""
        for k, slot in enumerate(self.slots):
            if grads[k] is None and agreed.present[k]:
                grads[k] = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
        for job in jobs:
            assert job.result is not None
            targets = [grads[job.batch.slots[row]] for row in job.indices]
            job.batch.write(job.result.applied, targets, scale)
        for group, mean in zip(self._dense_groups(), agreed.dense, strict=True):
            scaled = mean * scale if scale != 1.0 else mean
            pieces = scaled.split([self.slots[k].numel for k in group])
            pairs = [(grad, piece) for k, piece in zip(group, pieces, strict=True) if (grad := grads[k]) is not None]
            if pairs:
                torch._foreach_copy_([g for g, _ in pairs], [piece.view(g.shape) for g, piece in pairs])
        return grads

    def _enter_ledger(self, account: Account, jobs: list[_Job], applied: bool) -> None:
        restarts = sum(len(job.indices) for job in jobs if job.context.restart)
        full = sum(slot.numel * slot.dtype.itemsize for slot in self.slots)
        self._last = LastPass(self.step, applied, account, full, restarts)
        self.ledger.enter(account.bytes, account.collectives, full, applied)


def _rows_of_result(result: Result, rows: list[int]) -> Result:
    """The result of some matrices of a batch."""

    def take(part: LowRank | Tensor) -> LowRank | Tensor:
        return LowRank(part.p[rows], part.q[rows]) if isinstance(part, LowRank) else part[rows]

    return Result(
        take(result.applied),
        take(result.sent),
        {symbol: tensor[rows] for symbol, tensor in result.state.items()},
        None if result.kept is None else result.kept[rows],
    )
