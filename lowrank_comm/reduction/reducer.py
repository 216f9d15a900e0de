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
   nothing has been changed. So it does for a gradient that cannot be averaged
   (`gradients`), and all workers raise.
5. Decode. P Q^T, times the scale, is written into the gradients.
6. The pass leaves a pending transaction. `commit` writes e <- Delta - sent, the bases,
   what restarts go by, and the step; `rollback` forgets it. Whoever takes the optimizer
   step commits; averaged gradients that are given up are rolled back.

A pass may start before the last gradient is there: parameters are cut into buckets, and
`begin(bucket)` starts phase one of a bucket while the backward pass goes on. `reduce`
then starts the rest, and takes all buckets through their further phases side by side:
while one is on the wire, the next is computed. Buckets begin and go on in one order on
all workers.

A worker may be a node whose ranks hold blocks of the parameters (`intra_node`): then
step 4 comes once more at the end, inside the node, so that no rank steps if another
one's block was vetoed.

All state is keyed by parameter name. Order of batches and requests follows the order of
the slots, the same on all workers. A bucket's pass (`bucket_pass`) knows nothing of who
carries its exchanges out, so that a process group and the simulation of N workers in
one process run the same code.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup, Ledger
from lowrank_comm.communication.driver import complete
from lowrank_comm.communication.failures import saying_so
from lowrank_comm.communication.flat_buffers import wire_dtype_called
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, LowRankCommError, StateMismatchError
from lowrank_comm.numerics.linalg import full_precision, unsound
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.options import Seed, check
from lowrank_comm.reduction.assignment import CompressorAssignment
from lowrank_comm.reduction.bucket_pass import BucketPass, Job
from lowrank_comm.reduction.gradients import refuse, writable
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.passes import PIECE_BYTES, Wire
from lowrank_comm.reduction.plan import Plan, make_plan
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.rehearsal import Checkpoints, Rehearsal
from lowrank_comm.reduction.report import PassRecord, StepReport
from lowrank_comm.reduction.row_scatter import RowScatter
from lowrank_comm.reduction.state import CompressionState
from lowrank_comm.reduction.warmup import Warmup

__all__ = ["Outcome", "ParamInfo", "Reducer"]


@dataclass(frozen=True)
class Outcome:
    """How a pass ended.

    Attributes:
        applied: False if it was vetoed: some worker's numbers were not finite, and
            nothing was changed.
        grads: in slot order; the tensors given, holding the result; a new tensor where
            this worker had none but another had, or one that cannot be written to (see
            `gradients.writable`); None where no worker had one.
        unsound: after a veto, which of this worker's numbers were not finite, or huge;
            "" for none.
    """

    applied: bool
    grads: list[Tensor | None]
    unsound: str = ""


@dataclass
class _Pending:
    """What `commit` will make true. present: place of a slot -> whether any worker had
    a gradient.
    """

    jobs: list[Job]
    present: dict[int, bool]


class Reducer:
    """Averages gradients over a group of workers through a compressor with error
    feedback.

    Args:
        slots: the parameters, in the same order on all workers; names are unique.
        compressor: of what the policy compresses.
        group: the workers.
        min_compression_rate, rules: see `policy`.
        error_feedback: its form, and how the error memory is kept.
        quantization: what is sent quantized.
        wire_dtype: "bfloat16", "float16", "float32", "float64", or None for the wider
            of float32 and the parameter's dtype.
        seed: of all random draws.
        initial_basis: parameter name -> Q (n x r) to start from, instead of a Gaussian
            one.
        intra_node: the ranks of this node; None where each rank is a worker.
        bucket_bytes: size of the buckets that may start during backward; None for one
            bucket of all parameters.
        piece_bytes: of whole matrices that are on their way at once, where restarts and
            the warm-up send them.
        warmup_steps, warmup_wire, training_steps: the first steps, which average
            everything; see `warmup.Warmup`.

    Attributes:
        workers: who takes part.
        assignment: which compressor serves which parameter.
        state: what is kept between steps: error memory, bases, step.
        ledger: bytes handed to collectives.
        device: of the first parameter, for flags and control numbers.
        further_settings: what else of the reducer's owner must be equal: given False
            between workers, True between the ranks of a node.
        base_steps: the base optimizer's own count of steps; None where it counts none.

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
        piece_bytes: int = PIECE_BYTES,
        warmup_steps: int | float = 0,
        warmup_wire: str | None = None,
        training_steps: int | None = None,
    ) -> None:
        # of the same settings, for a rehearsal
        self._alike = functools.partial(
            Reducer,
            compressor=compressor,
            min_compression_rate=min_compression_rate,
            rules=rules,
            error_feedback=error_feedback,
            quantization=quantization,
            wire_dtype=wire_dtype,
            seed=seed,
            bucket_bytes=bucket_bytes,
            piece_bytes=piece_bytes,
            warmup_wire=warmup_wire,
        )
        warmup = Warmup(warmup_steps, warmup_wire, training_steps)
        if not slots and training_steps is None:
            # settings are being checked, and nothing depends on how long the run is
            warmup = replace(warmup, training_steps=1)
        self._rehearsals: dict[tuple[RowScatter | None, Checkpoints], Rehearsal] = {}
        self._wire_name, wire = wire_dtype, wire_dtype_called(wire_dtype)
        check("seed", seed, Seed)
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
        if warmup.format is not None and not self.assignment.error_feedback.keeps_errors:
            raise ConfigError(
                f'warmup_wire="{warmup.wire}" needs an error memory for what it rounds off, which'
                f' error_feedback.form="{self.assignment.error_feedback.form}" does not have; use'
                ' warmup_wire="bfloat16", leave it out, or use error_feedback.form="ef14".'
            )
        self.state = CompressionState(
            self.slots,
            self.assignment,
            self.workers,
            seed,
            initial_basis or {},
            bucket_bytes,
            warmup,
        )
        self._wire = Wire(self.workers, wire, self.assignment.quantization, piece_bytes, warmup)
        self.ledger = Ledger()
        self.further_settings: Callable[[bool], dict[str, Any]] | None = None
        self.base_steps: Callable[[], int | None] = lambda: None
        self._uncompressed_bytes = sum(slot.numel * slot.dtype.itemsize for slot in self.slots)
        # buckets that have been started
        self._begun: list[BucketPass] = []
        # a pass that waits for commit or rollback
        self._pending: _Pending | None = None

    @property
    def step(self) -> int:
        """t of the next pass."""
        return self.state.step

    def reduce(
        self,
        grads: Sequence[Tensor | None],
        *,
        scale: float = 1.0,
        refused: Mapping[int, str] = MappingProxyType({}),
    ) -> Outcome:
        """Make one lock-step pass over all parameters; a collective, to be called by
        every worker.

        Args:
            grads: this worker's gradients in slot order, None where it has none;
                overwritten with the result.
            scale: the loss scale that the gradients carry. The error memory is kept
                without it.
            refused: place of a slot -> why the gradient of a rank of this node cannot
                be averaged; see `RowScatter`.

        Returns:
            The outcome. Unless it was vetoed, `commit` or `rollback` must follow.

        Raises:
            ConfigMismatchError: first pass only, on every worker, if settings or
                parameters differ.
            LowRankCommError: the last pass was neither committed nor rolled back, or
                the list does not fit the slots; on all workers, if some worker's
                gradient cannot be averaged.
        """
        self.ensure_agreed()
        with torch.no_grad(), full_precision(self.device):
            for number in range(len(self._begun), len(self.state.buckets)):
                self._begun.append(self.launch(number, grads, scale, refused))
            passes, self._begun = self._begun, []
            complete([one.flight for one in passes])
            return self.finish(grads, passes)

    def begin(self, number: int, grads: Sequence[Tensor | None], *, scale: float = 1.0) -> None:
        """Start phase one of a bucket; a collective. All workers begin the buckets in
        their order, 0 first.

        The gradients of its slots must be final: they are read now, or, where a restart
        waits for room on the wire, until `reduce` returns.

        Args:
            number: of the bucket.
            grads, scale: see `reduce`; the same are to be given there.
        """
        self.ensure_agreed()
        with torch.no_grad(), full_precision(self.device):
            self._begun.append(self.launch(number, grads, scale))

    @property
    def begun(self) -> int:
        """How many buckets have been started since the last `reduce`."""
        return len(self._begun)

    def abandon(self) -> None:
        """Forget the buckets that have been started, after a backward pass that failed
        on all workers.
        """
        for one in self._begun:
            one.flight.abandon()
        self._begun = []

    def launch(
        self,
        number: int,
        grads: Sequence[Tensor | None],
        scale: float,
        refused: Mapping[int, str] = MappingProxyType({}),
    ) -> BucketPass:
        """Start the pass of a bucket, to be taken to its end by `complete`, and handed
        to `finish`. Autograd and autocast are off.
        """
        if self._pending is not None:
            raise LowRankCommError(
                "reduce() while the last pass is pending; call commit() or rollback() first."
            )
        if len(grads) != len(self.slots):
            raise LowRankCommError(
                f"got {len(grads)} gradients for {len(self.slots)} parameters; give one for each"
                " slot."
            )
        return BucketPass(self.state, number, self._wire, grads, scale, refused)

    def finish(self, grads: Sequence[Tensor | None], passes: Sequence[BucketPass]) -> Outcome:
        """Decode what all buckets have agreed on, or find out that some worker vetoed
        one of them.
        """
        workers, state = self.workers, self.state
        node, first = workers.intra_node, passes[0].one
        state.worker = (first.rank * node.size + node.rank, first.size * node.size)
        applied = None not in [one.flight.result for one in passes]
        refused = not applied and any(one.one.refused for one in passes)
        # where the ranks of a node compute whole matrices, all have seen it
        if node.size > 1 and not node.whole_matrices:
            vetoes = workers.sum_in_the_node(math.nan if refused else not applied)
            applied, refused = vetoes == 0.0, math.isnan(vetoes)
        if refused:
            mine = [text for one in passes for text in one.refused.values() if text]
            refuse(workers, mine, vetoed_by_them=True)
        stats, results = first.stats, list(grads)
        present: dict[int, bool] = {}
        for other in passes[1:]:
            stats.add(other.one.stats)
        if applied:
            clock = time.perf_counter()
            results = writable(self.slots, grads)
            for one in passes:
                present |= one.decode(results)
            stats.seconds["decompress"] = time.perf_counter() - clock
        jobs = [job for one in passes for job in one.jobs]
        restarts = sum(
            present[job.batch.slots[row]]
            for job in jobs
            if applied and job.context.restart
            for row in job.indices
        )
        full = self._uncompressed_bytes
        state.last_pass = PassRecord(state.step, applied, stats, full, restarts)
        stats.inside.update(node.bytes)
        node.bytes.clear()
        self.ledger.enter(stats, full, applied)
        if not applied:
            return Outcome(False, results, self._unsound(grads))
        self._pending = _Pending(jobs, present)
        return Outcome(True, results)

    def _unsound(self, grads: Sequence[Tensor | None]) -> str:
        """Return which numbers of this worker can have vetoed the pass: those that are
        not finite, or whose squares or sums are not.
        """
        limit = torch.finfo(torch.float32).max ** 0.5
        if self._wire.dtype is not None:
            limit = min(limit, torch.finfo(self._wire.dtype).max)
        return unsound([*self.state.numbers(), *_gradients(self.slots, grads)], limit)

    @torch.no_grad()
    def commit(self, given_up: Collection[int] = ()) -> None:
        """Make the pending pass true: error memory, bases, step counter.

        Args:
            given_up: places of slots whose averaged gradients are not used, the same on
                all workers. Their errors and bases stay as they were before the pass,
                as if no worker had had a gradient.
        """
        if self._pending is None:
            raise LowRankCommError("commit() without a pending pass; call reduce() first.")
        clock = time.perf_counter()
        pending, self._pending = self._pending, None
        state, last, inside = self.state, self.state.last_pass, self.workers.intra_node.bytes
        assert last is not None
        present = {k: there and k not in given_up for k, there in pending.present.items()}
        # what went back inside the node since the pass
        last.stats.inside.update(inside)
        self.ledger.inside.update(inside)
        inside.clear()
        with full_precision(self.device):
            for job in pending.jobs:
                job.commit(present, last, state.step)
        state.restarts.commit(
            state.step, {self.slots[k].name: there for k, there in present.items()}
        )
        state.step += 1
        # a copy as large as the whole error memory, which is another one now
        state.whole = None
        self.ledger.restarts += last.restarts
        last.stats.seconds["commit"] = spent = time.perf_counter() - clock
        self.ledger.seconds["commit"] += spent

    def rollback(self) -> None:
        """Forget the pending pass, if there is one: error memory, bases and step
        counter stay as they were before it.
        """
        if self._pending is not None and self.state.last_pass is not None:
            self.state.last_pass.applied = False
        self._pending = None

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
        """Go on with the state of a reducer of fewer parameters; all workers do so."""
        self.state.take_over(old.state)
        self.ledger = old.ledger
        self.workers.intra_node.bytes = old.workers.intra_node.bytes

    @torch.no_grad()
    def consolidate_error_memory(self) -> None:
        """Make every worker's error the mean of all; a collective.

        Linear compressors use the mean error only, so training goes on as it would have
        (to round-off), and what any worker then saves is right for every worker at any
        world size. While a pass is pending this is about the state before it, which the
        pass does not read any more.

        Raises:
            LowRankCommError: workers make this call after unlike numbers of steps.
            StateMismatchError: on every worker, if some worker's error memory or basis
                is not finite; then nothing is changed.
        """
        self.state.last_report()
        self._meet()
        self.ensure_agreed()
        state, workers, unsound_here = self.state, self.workers, self.state.not_finite()
        sound = not workers.any_in_the_node(bool(unsound_here))
        if workers.group.size > 1 and state.keeps_private_state:
            state.warn_of_a_mean_that_is_not_exact()
            sound = state.average_errors(self._mean, sound, self.piece_bytes)
        elif workers.group.size > 1 and state.compresses:
            # nothing is averaged that could tell the others
            sound = not any(workers.all_gather_text(unsound_here))
        if not sound:
            told = enumerate(workers.all_gather_text(unsound_here))
            rank, found = next((rank, found) for rank, found in told if found)
            raise StateMismatchError(
                f"{found} on rank {rank}: a checkpoint would carry it on, and every step after it"
                " would be skipped. Resume from an earlier checkpoint, or call"
                " optimizer.reducer.reset() on all ranks, which starts the"
                f" {self.assignment.error_feedback.memory} and the bases anew."
            )
        state.mark_consolidated()

    def _meet(self) -> None:
        """Wait for all ranks, and compare the step; a collective.

        It is a gather of one number, since gloo aborts a process, without a traceback,
        where one rank's all-reduce meets another one's of fewer bytes: so it would if
        one rank alone consolidated and the others went on to the next step.
        """
        workers = self.workers
        if workers.world_size == 1 or (workers.intra_node.size == 1 and not self.state.batches):
            # no collective follows
            return
        with saying_so():
            steps = workers.all_gather_numbers(torch.tensor([self.step], device=self.device))
        self.ledger.collectives += 1
        self.ledger.bytes["consolidation"] += torch.int64.itemsize
        if len({step for (step,) in steps}) > 1:
            told = ", ".join(f"{step} on rank {rank}" for rank, (step,) in enumerate(steps))
            raise LowRankCommError(
                f"lowrank_comm: the error memory is consolidated, but after unlike numbers of"
                f" steps: {told}. Do all ranks make the same calls, in the same order?"
            )

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
        """Return everything that must be equal on all workers."""
        intra_node = self.workers.intra_node
        ranks = f"{intra_node.size} ranks, {intra_node.scope}" if intra_node.size > 1 else None
        return {
            **self.assignment.describe(),
            "seed": self.seed,
            "wire_dtype": self._wire_name,
            "piece_bytes": self.piece_bytes,
            "shards": ranks,
            "warmup_steps": self.state.warmup.length,
            "warmup_wire": self.state.warmup.wire,
            **self.state.describe(),
        }

    @property
    def piece_bytes(self) -> int:
        """Of whole matrices that are on their way at once."""
        return self._wire.room.bytes

    @property
    def plan(self) -> Plan:
        """What goes low-rank, how many bytes that is, and what it costs in memory."""
        return self.plan_with(None, Checkpoints())

    def plan_with(self, rows: RowScatter | None, checkpoints: Checkpoints) -> Plan:
        """Return the plan of a run.

        Args:
            rows: what cuts whole gradients into the slots' blocks, or None.
            checkpoints: what a save and a load do beside consolidating.
        """
        rehearsal = self._rehearsals.get((rows, checkpoints))
        if rehearsal is None:
            wire = self.state.warmup.wire
            warmup = {"warmup_steps": 1, "warmup_wire": wire} if self.state.warmup.length else {}
            rehearsal = Rehearsal(self._alike, self.slots, self.workers, rows, checkpoints, warmup)
            self._rehearsals[rows, checkpoints] = rehearsal
        return make_plan(self.state, self.workers, self._wire.dtype, rehearsal)

    @property
    def last_report(self) -> StepReport | None:
        """The last pass; None before the first. Norms cost one read of the error
        memory, when this is first read.
        """
        return self.state.last_report()


def _gradients(
    slots: Sequence[ParamInfo], grads: Sequence[Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    for slot, grad in zip(slots, grads, strict=True):
        if grad is not None:
            yield f"the gradient of {slot.name}", grad


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
