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
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup, Ledger
from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.communication.flat_buffers import wire_dtype_called
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Compressor, Context, Delta, LowRank, Result, Steps
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, LowRankCommError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.assignment import CompressorAssignment
from lowrank_comm.reduction.batches import Batch
from lowrank_comm.reduction.lockstep import Agreed, Passing, PassStats, Presence, lockstep
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import Plan, make_plan
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.report import PassRecord, StepReport
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


class Reducer:
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
        intra_node: the ranks of this node; None where each rank is a worker.
        bucket_bytes: size of the buckets that may start during backward; None for one
            bucket of all parameters.

    Attributes:
        workers: who takes part.
        assignment: which compressor serves which parameter.
        state: what is kept between steps: error memory, bases, step.
        ledger: bytes handed to collectives.
        device: of the first parameter, for flags and control numbers.
        further_settings: what else must be equal, of whoever uses the reducer: given
            False between workers, True between the ranks of a node.

    Raises:
        ConfigError: a name occurs twice, a dtype is unknown, or an initial basis does
            not fit.

    Source: Algorithm 2 of arXiv 2509.11254, steps (7a), (7b) and the error update.
    """

    def __init__(
        self,
        slots: Sequence[ParamInfo],
        compressor: Compressor,
        group: Group,
        *,
        min_compression_rate: float = 2.0,
        rules: Sequence[Rule] = (),
        error_feedback: ErrorFeedback | None = None,
        quantization: Quantization | None = None,
        wire_dtype: str | None = None,
        seed: int = 0,
        initial_basis: Mapping[str, Tensor] | None = None,
        intra_node: IntraNodeGroup | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        self._wire_name, self._wire_dtype = wire_dtype, wire_dtype_called(wire_dtype)
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(
                f"seed must be an integer of 64 bits, got {seed!r}; write for example seed=0."
            )
        self.slots, self.compressor, self.seed = list(slots), compressor, seed
        _check_slots(self.slots)
        self.device = self.slots[0].device if self.slots else torch.device("cpu")
        self.workers = Workers(group, intra_node, self.device)
        self.assignment = CompressorAssignment(
            compressor,
            min_compression_rate,
            rules,
            error_feedback,
            quantization,
            self.workers.intra_node,
            seed,
        )
        self.state = CompressionState(
            self.slots, self.assignment, self.workers, seed, initial_basis or {}, bucket_bytes
        )
        self.ledger = Ledger()
        self.further_settings: Callable[[bool], dict[str, Any]] | None = None
        # buckets that have been started
        self._flights: list[_Flight] = []
        # a pass that waits for commit or rollback
        self._pending: _Pending | None = None

    @property
    def step(self) -> int:
        """t of the next pass."""
        return self.state.step

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
        for k in range(len(self._flights), len(self.state.buckets)):
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
                flight.works = self.workers.group.start(buffers)
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
            passing = self.exchange(self.state.buckets[k], grads, scale)
            self._flights.append(_Flight(passing, self.workers.group.start(next(passing))))

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
            workers=self.workers.group.size,
            rank=self.workers.group.rank,
            wire_dtype=self._wire_dtype,
            device=self.device,
            stats=stats,
            intra_node=self.workers.intra_node,
            quantization=self.assignment.quantization,
            noise=self.assignment.noise(
                self.state.buckets.index(bucket), self.step, self.workers.group.rank
            ),
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
        workers = self.workers
        self.state.belongs_to(workers.global_rank, workers.world_size)
        vetoed = any(one.agreed is None for one in passed)
        # there, all ranks have seen it
        if not workers.intra_node.whole_matrices:
            vetoed = workers.any_in_the_node(vetoed)
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
        sent = self.workers.intra_node.bytes
        stats.inside.update(sent)
        self.ledger.inside.update(sent)
        sent.clear()

    @torch.no_grad()
    def commit(self) -> None:
        """Make the pending pass true: error memory, bases, step counter."""
        if self._pending is None:
            raise LowRankCommError("commit() without a pending pass; call reduce() first.")
        clock = time.perf_counter()
        pending, self._pending = self._pending, None
        last = self.state.last_pass
        assert last is not None
        # what went back inside the node since the pass
        self._count_inside(last.stats)
        with full_precision(self.device):
            for job in pending.jobs:
                self._commit(job, pending.present, last)
        self.state.restarts.commit(
            self.step, {self.slots[k].name: there for k, there in pending.present.items()}
        )
        self.state.step += 1
        self.ledger.restarts += last.restarts
        last.stats.seconds["commit"] = spent = time.perf_counter() - clock
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
        if self.state.last_pass is not None:
            self.state.last_pass.applied = False

    @property
    def pending(self) -> bool:
        """Whether a pass waits for commit or rollback."""
        return self._pending is not None

    # ---------------------------------------------------------------- between steps

    def reset(self) -> None:
        """Go back to the state before the first step: no pending pass, zero errors,
        initial bases, step 0.
        """
        self._pending = None
        self.state.reset()

    def take_over(self, old: Reducer) -> None:
        """Go on with the state of a reducer of fewer parameters, on all workers alike."""
        self.state.take_over(old.state)
        self.ledger = old.ledger
        self.workers.intra_node.bytes = old.workers.intra_node.bytes

    @torch.no_grad()
    def consolidate_error_memory(self) -> None:
        """Every worker's error becomes the mean of all; a collective.

        Linear compressors use the mean error only, so training goes on as it would have
        (to round-off), and what any worker then saves is right for every worker at any
        world size.

        Raises:
            LowRankCommError: a pass is pending.
        """
        if self._pending is not None:
            raise LowRankCommError(
                "consolidate_error_memory() within a step; call it after optimizer.step()."
            )
        self.state.settle_last_report()
        self.ensure_agreed()
        if self.workers.group.size > 1:
            self.state.average_errors(self._mean)
        self.state.mark_consolidated()

    def _mean(self, tensor: Tensor) -> Tensor:
        self.ledger.collectives += self.workers.group.sum_([tensor])
        self.ledger.bytes["consolidation"] += tensor.nbytes
        return tensor.div_(self.workers.group.size)

    def ensure_agreed(self) -> None:
        """Compare settings, parameters and step with the other workers, unless that was
        done since they last changed. A collective.

        Before the first pass, and before the next one after a state was loaded or
        parameters were added, which all workers must do alike: workers that loaded
        different steps would restart at different times, and wait for each other.
        """
        if self.workers.agreed:
            return
        further = self.further_settings or (lambda in_the_node: {})
        mine, blocks = self.describe(), None
        if self.workers.intra_node.size > 1:
            settings = {key: value for key, value in mine.items() if key != "parameters"}
            blocks = {
                "settings": settings | further(True),
                "parameters": [(slot.name, slot.whole) for slot in self.slots],
            }
        self.ledger.bytes["fingerprint"] += self.workers.agree(mine | further(False), blocks)

    def describe(self) -> dict[str, Any]:
        """Everything that must be equal on all workers."""
        intra_node = self.workers.intra_node
        ranks = f"{intra_node.size} ranks, {intra_node.scope}" if intra_node.size > 1 else None
        return {
            **self.assignment.describe(),
            "seed": self.seed,
            "wire_dtype": self._wire_name,
            "shards": ranks,
            **self.state.describe(),
        }

    @property
    def plan(self) -> Plan:
        """What goes low-rank, how many bytes that is, and what it costs in memory."""
        schedule = self.state.restarts.schedule
        idle = self.assignment.policy.idle_rules([slot.name for slot in self.slots])
        return make_plan(
            self.slots,
            self.state.treatments,
            self.assignment.scheme,
            self.state.batches,
            self.workers.group.size,
            self._wire_dtype,
            self.assignment.quantization,
            schedule.restart_every if schedule else None,
            idle,
            [self.assignment.of_the_node(slot) for slot in self.slots],
            self.workers.intra_node,
        )

    @property
    def last_report(self) -> StepReport | None:
        """The last pass; None before the first. Norms cost one read of the error
        memory, when this is first read.
        """
        last = self.state.last_pass
        return last.report(self.state.batches) if last else None

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
            restarts = self.state.restarts
            deferred = restarts.deferred(name)
            restart = deferred or restarts.due(name, self.step)
            variant = batch.compressor.variant(restarts.of(name, self.step), restart)
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
                worker=self.workers.group.rank,
                workers=self.workers.group.size,
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
        self.state.last_pass = PassRecord(self.step, applied, stats, full, restarts)
        self.ledger.enter(
            stats.bytes, stats.collectives, full, applied, stats.surplus, stats.spared
        )
        self.ledger.clock(stats.seconds)


def _check_slots(slots: Sequence[ParamInfo]) -> None:
    """Refuse dtypes that cannot be averaged, and names that occur twice."""
    seen: set[str] = set()
    for slot in slots:
        if not slot.dtype.is_floating_point:
            raise ConfigError(
                f"{slot.name}: parameters of {slot.dtype} cannot be averaged here; use a real"
                " floating dtype."
            )
        if slot.name in seen:
            raise ConfigError(
                f"parameter names must be unique, but {slot.name!r} occurs twice; give each its"
                " own name."
            )
        seen.add(slot.name)


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
