"""The reducer: one compressed averaging of all gradients of a model.

The order of a step:

1. Agreement (before the first pass, and after a state was loaded or parameters were
   added). A fingerprint of settings, parameters and step is compared between the
   workers.
2. Delta. For each batch of same-shape matrices the gradients are stacked and the error
   memory is added: Delta = g / scale + e. A missing gradient counts as zero. Small
   matrices share a batch; a large one is a batch of its own.
3. Phases. The compressors' generators run in lock-step (`lockstep`): each phase is one
   packet, one collective. Phase one also carries what is dense, one finite flag, and
   which gradients are missing. A matrix with a deferred restart (`restarts`) waits for
   that, and makes it in the phases that follow, if any worker has a gradient for it.
4. Veto. If any worker's numbers are not finite, the pass ends here on all workers;
   nothing has been changed.
5. Decode. P Q^T, times the scale, is written into the gradients.
6. The pass leaves a pending transaction. `commit` writes e <- Delta - sent, the bases,
   what restarts go by, and the step; `rollback` forgets it. An engine that decides
   later whether the step counts (loss scaling) decides between the two.

A pass may start before the last gradient is there: parameters are cut into buckets, and
`begin(bucket)` starts phase one of a bucket while the backward pass goes on. `reduce`
then starts the rest, and takes all buckets through their further phases side by side:
while one is on the wire, the next is computed. Buckets begin and go on in one order on
all workers.

A worker may be a node whose ranks hold blocks of the parameters (`intra_node`): then
step 4 comes once more at the end, inside the node, so that no rank steps if another
one's block was vetoed.

All state is keyed by parameter name. Order of batches and requests follows the order of
the slots, the same on all workers. `exchange` is a generator that yields what is to be
exchanged, so that a process group and the simulation of N workers in one process run
the same code.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.compressors.base import Context, Delta, LowRank, Result, Steps
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.reduction.batches import Batch
from lowrank_comm.reduction.lockstep import Agreed, Passing, PassStats, Presence, lockstep
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.report import PassRecord
from lowrank_comm.reduction.state import Bucket, CompressionState

__all__ = ["Outcome", "ParamInfo", "Reducer"]


@dataclass(frozen=True)
class Outcome:
    """How a pass ended.

    Attributes:
        applied: False if it was vetoed: some worker's numbers were not finite, and
            nothing was changed.
        grads: in slot order; the tensors given, holding the result; a new tensor where
            this worker had none but another had; None where nobody had one.
    """

    applied: bool
    grads: list[Tensor | None]


@dataclass
class _Job:
    """A batch, or some rows of it, in one pass; without a result where it turned out
    that there was nothing to do.
    """

    batch: Batch
    rows: list[int] | None
    context: Context
    # a restart, of those of the rows for which somebody has a gradient
    deferred: bool = False
    delta: Delta | None = None
    result: Result | None = None

    @property
    def indices(self) -> list[int]:
        """Rows as numbers."""
        return list(range(len(self.batch.names))) if self.rows is None else self.rows


@dataclass
class _Passed:
    """A bucket after its last phase; `agreed` is None if it was vetoed."""

    bucket: Bucket
    jobs: list[_Job]
    agreed: Agreed | None
    stats: PassStats


@dataclass
class _Flight:
    """A bucket on its way: its generator, and the collectives that have been started
    for it.
    """

    passing: Generator[list[Exchange], int, _Passed]
    works: list[Any]


@dataclass
class _Pending:
    """What commit will make true. present: place of a slot -> whether any worker had a
    gradient.
    """

    jobs: list[_Job]
    present: dict[int, bool]


class Reducer(CompressionState):
    """Averages gradients over a group of workers through a compressor with error
    feedback.

    Args:
        slots: the parameters, in the same order on all workers; names are unique.
        compressor: the scheme.
        group: the workers.
        min_compression_rate, rules: see `policy`.
        error_feedback: its form, and how the error memory is kept.
        quantization: what travels as codes.
        wire_dtype: "bfloat16", "float16", "float32", "float64", or None for the wider
            of float32 and the parameter's dtype.
        seed: of all random draws.
        initial_basis: parameter name -> Q (n x r) to start from, instead of a Gaussian
            one.

    Raises:
        ConfigError: a name occurs twice, a dtype is unknown, or an initial basis does
            not fit.

    Source: Algorithm 2 of arXiv 2509.11254, steps (7a), (7b) and the error update.
    """

    def reduce(self, grads: Sequence[Tensor | None], *, scale: float = 1.0) -> Outcome:
        """One lock-step pass over all parameters; a collective, to be called by every
        worker.

        Args:
            grads: this worker's gradients in slot order, None where it has none;
                overwritten with the result.
            scale: the loss scale that the gradients carry. The error memory is kept
                without it.

        Returns:
            The outcome. Unless it was vetoed, `commit` or `rollback` must follow.

        Raises:
            ConfigMismatchError: first pass only, on every worker, if settings or
                parameters differ.
            LowRankCommError: the last pass was neither committed nor rolled back, or
                the list does not fit the slots.
        """
        for k in range(len(self._flights), len(self.buckets)):
            self.begin(k, grads, scale=scale)
        flights, self._flights = self._flights, []
        passed: list[_Passed] = []
        with full_precision(self.device):
            going = list(flights)
            while going:
                flight = going.pop(0)
                for work in flight.works:
                    work.wait()
                try:
                    buffers = flight.passing.send(len(flight.works))
                except StopIteration as end:
                    passed.append(end.value)
                    continue
                flight.works = self.group.start(buffers)
                going.append(flight)
            return self.finish(grads, scale, passed)

    def begin(self, k: int, grads: Sequence[Tensor | None], *, scale: float = 1.0) -> None:
        """Start phase one of bucket k; a collective. All workers begin the buckets in
        their order, 0 first.

        The gradients of its slots must be final: what is added to them later is not
        seen.

        Args:
            k: number of the bucket.
            grads, scale: see `reduce`; the same are to be given there.
        """
        self.ensure_agreed()
        with full_precision(self.device):
            passing = self.exchange(self.buckets[k], grads, scale)
            self._flights.append(_Flight(passing, self.group.start(next(passing))))

    @property
    def begun(self) -> int:
        """How many buckets have been started since the last `reduce`."""
        return len(self._flights)

    def abandon(self) -> None:
        """Forget the buckets that have been started, after a backward pass that failed
        on all workers.
        """
        for flight in self._flights:
            for work in flight.works:
                work.wait()
            flight.passing.close()
        self._flights = []

    @torch.no_grad()
    def exchange(
        self, bucket: Bucket, grads: Sequence[Tensor | None], scale: float
    ) -> Generator[list[Exchange], int, _Passed]:
        """The pass of a bucket as a generator: yields what is to be exchanged between
        the workers, is sent how many collectives that took. `reduce` drives it over the
        process group; `finish` takes what it returns.
        """
        self._check(grads, bucket)
        stats = PassStats()
        clock = time.perf_counter()
        jobs = [job for batch in bucket.batches for job in self._jobs(batch)]
        steps = [
            (
                self._deferred(job, bucket, grads, scale)
                if job.deferred
                else self._steps(job, grads, scale)
            )
            for job in jobs
        ]
        dense = [self._flat(group, grads, scale) for group in self._dense_groups(bucket)]
        stats.seconds["compress"] += time.perf_counter() - clock
        agreed = yield from lockstep(
            steps,
            dense,
            [grads[k] is not None for k in bucket.slots],
            workers=self.group.size,
            rank=self.group.rank,
            wire_dtype=self._wire_dtype,
            device=self.device,
            stats=stats,
            intra_node=self.intra_node,
            quantization=self.assignment.quantization,
            noise=self.assignment.noise(self.buckets.index(bucket), self.step, self.group.rank),
        )
        for job, result in zip(jobs, agreed.results if agreed else (), strict=False):
            job.result = result
        return _Passed(bucket, jobs, agreed, stats)

    @torch.no_grad()
    def finish(
        self, grads: Sequence[Tensor | None], scale: float, passed: Sequence[_Passed]
    ) -> Outcome:
        """Decode what all buckets have agreed on, or find out that some worker vetoed
        one of them.
        """
        self._worker = self.here
        vetoed = any(one.agreed is None for one in passed)
        # there, all ranks have seen it
        if not self.intra_node.whole_matrices:
            vetoed = self.any_in_the_node(vetoed)
        jobs = [job for one in passed for job in one.jobs]
        stats = self._account_of_all(passed)
        present = {
            k: there
            for one in passed
            if one.agreed
            for k, there in zip(one.bucket.slots, one.agreed.present, strict=True)
        }
        self._enter_ledger(stats, jobs, {} if vetoed else present, not vetoed)
        if vetoed:
            return Outcome(False, list(grads))
        clock = time.perf_counter()
        result_grads = list(grads)
        for one in passed:
            assert one.agreed is not None
            self._decode(one, one.agreed, result_grads, scale)
        self._pending = _Pending(jobs, present)
        stats.seconds["decompress"] = spent = time.perf_counter() - clock
        self.ledger.clock({"decompress": spent})
        return Outcome(True, result_grads)

    def any_in_the_node(self, mine: bool) -> bool:
        """Whether it is so on any rank of this node; a collective of these ranks."""
        if self.intra_node.size == 1:
            return mine
        # a kernel, not a transfer
        flag = torch.full((1,), float(mine), dtype=torch.float32, device=self.device)
        self.intra_node.sum_([flag], "control")
        return float(flag) != 0.0

    def _account_of_all(self, passed: Sequence[_Passed]) -> PassStats:
        """Sums over the buckets, and what went between the ranks of the node since the
        last pass.
        """
        stats = PassStats()
        for one in passed:
            stats.bytes.update(one.stats.bytes)
            stats.collectives += one.stats.collectives
            stats.surplus += one.stats.surplus
            stats.spared += one.stats.spared
            for phase, seconds in one.stats.seconds.items():
                stats.seconds[phase] += seconds
        self._count_inside(stats)
        return stats

    def _count_inside(self, stats: PassStats) -> None:
        """Enter what went between the ranks of this node since it was last entered."""
        stats.inside.update(self.intra_node.bytes)
        self.ledger.inside.update(self.intra_node.bytes)
        self.intra_node.bytes.clear()

    @torch.no_grad()
    def commit(self) -> None:
        """Make the pending pass true: error memory, bases, step counter."""
        if self._pending is None:
            raise LowRankCommError("commit() without a pending pass; call reduce() first.")
        clock = time.perf_counter()
        pending: _Pending = self._pending
        self._pending = None
        assert self._last is not None
        # what went back inside the node since the pass
        self._count_inside(self._last.stats)
        with full_precision(self.device):
            for job in pending.jobs:
                self._commit(job, pending.present, self._last)
        self.restarts.commit(
            self.step, {self.slots[k].name: there for k, there in pending.present.items()}
        )
        self.step += 1
        self.ledger.restarts += self._last.restarts
        self._last.stats.seconds["commit"] = spent = time.perf_counter() - clock
        self.ledger.clock({"commit": spent})

    def _commit(self, job: _Job, present: dict[int, bool], last: PassRecord) -> None:
        if job.result is None:
            return
        assert job.delta is not None
        delta, result, rows = job.delta.tensor, job.result, job.rows
        alive = [row for row in job.indices if present[job.batch.slots[row]]]
        # nobody had a gradient for some: their error and basis stay as they are
        if len(alive) < len(job.indices):
            places = [job.indices.index(row) for row in alive]
            delta, result, rows = delta[places], _rows_of_result(result, places), alive
        if alive:
            last.enter(job.batch, rows, delta, result)
            job.batch.keep_error(delta, result, rows, self.step)
            job.batch.store_state(rows, result.state)
        # Delta is model-sized: let it go now
        job.delta, job.result = None, None

    def rollback(self) -> None:
        """Forget the pending pass: error memory, bases and step counter stay as they
        were before it.
        """
        self._pending = None
        if self._last is not None:
            self._last.applied = False

    @property
    def pending(self) -> bool:
        """Whether a pass waits for commit or rollback."""
        return self._pending is not None

    # ---------------------------------------------------------------- parts of a step

    def _check(self, grads: Sequence[Tensor | None], bucket: Bucket) -> None:
        if self._pending is not None:
            raise LowRankCommError(
                "reduce() while the last pass is pending; call commit() or rollback() first."
            )
        if len(grads) != len(self.slots):
            raise LowRankCommError(
                f"got {len(grads)} gradients for {len(self.slots)} parameters; give one for each"
                " slot."
            )
        for k in bucket.slots:
            grad, slot = grads[k], self.slots[k]
            if grad is None:
                continue
            if grad.is_sparse:
                raise LowRankCommError(
                    f"{slot.name}: sparse gradients cannot be averaged here; use sparse=False."
                )
            if grad.numel() != slot.numel:
                raise LowRankCommError(
                    f"{slot.name}: the gradient has shape {tuple(grad.shape)}, the parameter"
                    f" {slot.shape}; they must agree."
                )

    def _steps(self, job: _Job, grads: Sequence[Tensor | None], scale: float) -> Steps:
        """The compressor's generator; Delta is made when it is first advanced, just
        before it is read.
        """
        job.delta = job.batch.delta(grads, scale, job.rows)
        return (
            yield from job.batch.compressor.step(
                job.delta, job.batch.rows_of_state(job.rows), job.context
            )
        )

    def _deferred(
        self, job: _Job, bucket: Bucket, grads: Sequence[Tensor | None], scale: float
    ) -> Passing:
        """A deferred restart: of those matrices for which somebody has a gradient. The
        others stay as they are, and send nothing; so it costs a step in which there are
        none nothing at all, and one in which it comes a collective more.
        """
        present = dict(zip(bucket.slots, (yield Presence()), strict=True))
        there = [k for k, row in enumerate(job.indices) if present[job.batch.slots[row]]]
        job.rows, job.context = [job.indices[k] for k in there], job.context.only(there)
        return (yield from self._steps(job, grads, scale)) if there else None

    def _jobs(self, batch: Batch) -> list[_Job]:
        """The batch as one job, or as several where some of its matrices restart, owe a
        restart, or take other turns.
        """
        kinds: dict[tuple[bool, bool, int], list[int]] = {}
        for row, name in enumerate(batch.names):
            deferred = self.restarts.deferred(name)
            restart = deferred or self.restarts.due(name, self.step)
            variant = batch.compressor.variant(self.restarts.of(name, self.step), restart)
            kinds.setdefault((deferred, restart, variant), []).append(row)
        jobs = []
        # one order on all workers, whichever row came first
        for (deferred, restart, variant), rows in sorted(kinds.items()):
            whole = len(kinds) == 1
            context = replace(
                batch.context.only(rows),
                t=self.step,
                restart=restart,
                variant=variant,
                worker=self.group.rank,
                workers=self.group.size,
                wire_rounds=self._wire_dtype is not None
                and self._wire_dtype.itemsize < batch.dtype.itemsize,
            )
            jobs.append(_Job(batch, None if whole else rows, context, deferred))
        return jobs

    def _dense_groups(self, bucket: Bucket) -> list[list[int]]:
        """Dense slots of a bucket by dtype of computation and device, in slot order."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k in bucket.dense:
            groups.setdefault((self.slots[k].compute_dtype, self.slots[k].device), []).append(k)
        return list(groups.values())

    def _flat(self, group: list[int], grads: Sequence[Tensor | None], scale: float) -> Tensor:
        """The dense gradients of a group in one vector, without the loss scale."""
        pieces = []
        for k in group:
            grad, slot = grads[k], self.slots[k]
            flat = (
                torch.zeros(slot.numel, dtype=slot.dtype, device=slot.device)
                if grad is None
                else grad.reshape(-1)
            )
            pieces.append(flat.to(slot.compute_dtype))
        flat = torch.cat(pieces)
        return flat.div_(scale) if scale != 1.0 else flat

    def _decode(
        self, one: _Passed, agreed: Agreed, grads: list[Tensor | None], scale: float
    ) -> None:
        """Write a bucket's means into the gradients; make a gradient where only other
        workers had one.
        """
        for k, present in zip(one.bucket.slots, agreed.present, strict=True):
            slot = self.slots[k]
            if grads[k] is None and present:
                grads[k] = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
        for job in one.jobs:
            if job.result is None:
                continue
            targets = [grads[job.batch.slots[row]] for row in job.indices]
            job.batch.write(job.result.applied, targets, scale)
        for group, mean in zip(self._dense_groups(one.bucket), agreed.dense, strict=True):
            scaled = mean * scale if scale != 1.0 else mean
            pieces = scaled.split([self.slots[k].numel for k in group])
            pairs = [
                (grad, piece)
                for k, piece in zip(group, pieces, strict=True)
                if (grad := grads[k]) is not None
            ]
            if pairs:
                torch._foreach_copy_(
                    [g for g, _ in pairs], [piece.view(g.shape) for g, piece in pairs]
                )

    def _enter_ledger(
        self, stats: PassStats, jobs: list[_Job], present: dict[int, bool], applied: bool
    ) -> None:
        """present: of the slots; {} in a pass that was vetoed, in which nothing has
        restarted.
        """
        restarts = sum(
            present.get(job.batch.slots[row], False)
            for job in jobs
            if job.context.restart
            for row in job.indices
        )
        full = sum(slot.numel * slot.dtype.itemsize for slot in self.slots)
        self._last = PassRecord(self.step, applied, stats, full, restarts)
        self.ledger.enter(
            stats.bytes, stats.collectives, full, applied, stats.surplus, stats.spared
        )
        self.ledger.clock(stats.seconds)


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
