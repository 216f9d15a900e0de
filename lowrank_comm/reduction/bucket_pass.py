"""A bucket of parameters in one pass: from gradients to what the lock-step protocol
averages, and from what the workers agreed on to gradients and to the next state.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_comm.communication.driver import Flight
from lowrank_comm.communication.quantized_mean import Noise
from lowrank_comm.compressors.base import Context, Delta, Result
from lowrank_comm.compressors.warmup import warmup_step
from lowrank_comm.error_feedback.memory import places
from lowrank_comm.numerics.randomness import uniform
from lowrank_comm.reduction.batches import Batch, copy_to
from lowrank_comm.reduction.gradients import unusable
from lowrank_comm.reduction.lockstep import lockstep
from lowrank_comm.reduction.passes import Pass, Presence, Steps, Wire
from lowrank_comm.reduction.report import PassRecord
from lowrank_comm.reduction.state import Bucket, CompressionState, DenseGroup


@dataclass
class Job:
    """A batch, or some rows of it, in one pass.

    Attributes:
        rows: of the batch; None for all.
        deferred: whether it is a deferred restart, of those of the rows for which any
            worker has a gradient.
        piece: bytes of the whole matrices that it sends; 0 if it sends none.
        delta: what was compressed; formed when the generator begins.
        result: of the compressor; None where there was nothing to do.
    """

    batch: Batch
    rows: list[int] | None
    context: Context
    deferred: bool = False
    piece: int = 0
    delta: Delta | None = None
    result: Result | None = None

    @property
    def indices(self) -> Sequence[int]:
        """The rows of the batch as numbers."""
        return range(len(self.batch.names)) if self.rows is None else self.rows

    def start(self, grads: Sequence[Tensor | None], scale: float) -> Steps:
        """Form Delta, just before it is read, and begin the compressor's generator."""
        batch, rows = self.batch, self.rows
        self.delta = batch.delta(grads, scale, rows)
        state = batch.state
        if rows is not None:
            at = places(rows, batch.device)
            state = {symbol: tensor[at] for symbol, tensor in state.items()}
        if self.context.warmup:
            return warmup_step(batch.compressor, self.delta, state, self.context)
        return batch.compressor.step(self.delta, state, self.context)

    def start_deferred(self, bucket: Bucket, grads: Sequence[Tensor | None], scale: float) -> Steps:
        """Make a deferred restart of the matrices for which any worker has a gradient.

        The others stay as they are, and send nothing. A step in which no worker has a
        gradient for any of them therefore costs nothing; one in which the restart comes
        costs a collective more.
        """
        present = dict(zip(bucket.slots, (yield Presence()), strict=True))
        there = [k for k, row in enumerate(self.indices) if present[self.batch.slots[row]]]
        indices = self.indices
        self.rows, self.context = [indices[k] for k in there], self.context.only(there)
        return (yield from self.start(grads, scale)) if there else None

    def commit(self, present: Mapping[int, bool], record: PassRecord, t: int) -> None:
        """Store the errors and the compressor's state of the matrices for which any
        worker had a gradient; those of the others stay as they are.
        """
        if self.result is None:
            return
        assert self.delta is not None
        batch, indices = self.batch, self.indices
        delta, result, rows = self.delta.tensor, self.result, self.rows
        there = [k for k, row in enumerate(indices) if present[batch.slots[row]]]
        if 0 < len(there) < len(indices):
            at = places(there, batch.device)
            delta, result = delta[at], _rows_of_result(result, at)
            rows = [indices[k] for k in there]
        if there:
            record.enter(batch, rows, delta, result)
            batch.commit(delta, result, rows, t)
        # Delta is as large as the model: let it go now
        self.delta = self.result = None


class BucketPass:
    """The pass of one bucket, from its first exchange to its last.

    Args:
        state: of the reducer.
        number: of the bucket.
        wire: how it communicates.
        grads: this worker's gradients in slot order; those of the bucket are final.
        scale: the loss scale that they carry.
        refused: place of a slot -> why a rank of this node cannot have its gradient
            averaged, "" where that is another rank's; known before the pass.

    Attributes:
        jobs: its batches.
        one: what the protocol averages.
        flight: the pass on its way; its first phase is started, a collective.
        refused: as given, and of this worker's gradients; they veto the pass.
    """

    def __init__(
        self,
        state: CompressionState,
        number: int,
        wire: Wire,
        grads: Sequence[Tensor | None],
        scale: float,
        refused: Mapping[int, str],
    ) -> None:
        clock = time.perf_counter()
        self.bucket = bucket = state.buckets[number]
        group = wire.workers.group
        self._state, self._wire, self._scale = state, wire, scale
        self.refused = unusable(state.slots, grads, bucket.slots)
        if refused:
            self.refused |= {k: refused[k] for k in bucket.slots if k in refused}
        if self.refused:
            grads = [None if k in self.refused else grad for k, grad in enumerate(grads)]
        rank, size = group.rank, group.size
        nearest = state.assignment.quantization.rounding == "nearest"
        self.jobs = [job for batch in bucket.batches for job in self._jobs(batch, rank, size)]
        self.one = Pass(
            [
                functools.partial(job.start_deferred, bucket, grads, scale)
                if job.deferred
                else functools.partial(job.start, grads, scale)
                for job in self.jobs
            ],
            [_flat(dense, grads, scale) for dense in bucket.dense_groups],
            [math.nan if k in self.refused else grads[k] is not None for k in bucket.slots],
            wire,
            rank,
            size,
            None if nearest else rounding_noise(state.seed, number, state.step, rank),
            {k: job.piece for k, job in enumerate(self.jobs) if job.piece},
        )
        self.one.stats.seconds["compress"] += time.perf_counter() - clock
        self.flight = Flight(lockstep(self.one), group.start)

    def _jobs(self, batch: Batch, rank: int, size: int) -> list[Job]:
        """Cut a batch into jobs: several where some of its matrices restart, have a
        deferred restart, or are at another variant of a step, and where they send more
        whole matrices than fit into one piece.
        """
        t = self._state.step
        warmup = t < self._state.warmup.length and batch.compressor.warms_up
        kinds: dict[tuple[bool, bool, int], list[int]] = {}
        for (restart, history), rows in self._state.restarts.histories(batch.names, t).items():
            variant = batch.compressor.variant(history, restart)
            kinds.setdefault((history.deferred, restart, variant), []).extend(rows)
        jobs = []
        # one order on all workers, whichever row came first
        for (deferred, restart, variant), rows in sorted(kinds.items()):
            whole = self._whole_matrix_bytes(batch, variant, restart, warmup)
            together = max(1, self._wire.room.bytes // whole) if whole else len(rows)
            for start in range(0, len(rows), together):
                some = sorted(rows)[start : start + together]
                all_of_it = len(some) == len(batch.names)
                context = replace(
                    batch.context if all_of_it else batch.context.only(some),
                    t=t,
                    restart=restart,
                    warmup=warmup,
                    variant=variant,
                    worker=rank,
                    workers=size,
                    wire_rounds=self._wire.rounds(batch.dtype),
                )
                given, piece = None if all_of_it else some, whole * len(some)
                jobs.append(Job(batch, given, context, deferred, piece))
        return jobs

    def _whole_matrix_bytes(self, batch: Batch, variant: int, restart: bool, warmup: bool) -> int:
        """Return the bytes of a matrix of the batch if this step sends it whole, as the
        warm-up does, and a restart may; else 0. The same on all ranks.
        """
        context = batch.context
        m, n = context.m or batch.m, batch.n
        sent = m * n if warmup else 0
        if restart:
            sent = batch.compressor.elements_in(m, n, context.rank, variant, restart)
        return m * n * batch.dtype.itemsize if sent >= m * n else 0

    def decode(self, grads: list[Tensor | None]) -> dict[int, bool]:
        """Write the means into the gradients; make a gradient where there is none to be
        written to.

        Args:
            grads: from `gradients.writable`.

        Returns:
            Place of a slot -> whether any worker had a gradient.
        """
        agreed, slots, scale = self.flight.result, self._state.slots, self._scale
        assert agreed is not None
        present = dict(zip(self.bucket.slots, agreed.present, strict=True))
        for k, there in present.items():
            if grads[k] is None and there:
                slot = slots[k]
                grads[k] = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
        for job, result in zip(self.jobs, agreed.results, strict=True):
            job.result = result
            if result is not None:
                targets = [grads[job.batch.slots[row]] for row in job.indices]
                job.batch.write(result.applied, targets, scale)
        for dense, mean in zip(self.bucket.dense_groups, agreed.dense, strict=True):
            scaled = mean * scale if scale != 1.0 else mean
            copy_to([grads[k] for k in dense.slots], scaled.split(dense.numels))
        return present


def rounding_noise(seed: int, bucket: int, t: int, worker: int) -> Callable[[int], Noise]:
    """Return a function: number of a packet -> its draws for the stochastic rounding of
    what is sent quantized.
    """

    def of_packet(number: int) -> Noise:
        def draw(purpose: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
            whose = f"{purpose} of packet {number} of worker {worker}"
            return uniform(seed, (f"bucket {bucket}",), t, whose, shape, torch.float32, device)[0]

        return draw

    return of_packet


def _flat(dense: DenseGroup, grads: Sequence[Tensor | None], scale: float) -> Tensor:
    """Return the dense gradients of a group in one vector, without the loss scale."""
    pieces = []
    for k, numel in zip(dense.slots, dense.numels, strict=True):
        grad = grads[k]
        if grad is None:
            pieces.append(torch.zeros(numel, dtype=dense.dtype, device=dense.device))
        else:
            pieces.append(grad.reshape(-1).to(dense.dtype))
    flat = torch.cat(pieces)
    return flat.div_(scale) if scale != 1.0 else flat


def _rows_of_result(result: Result, rows: slice | Tensor) -> Result:
    """Return the result of some matrices of a batch."""
    return Result(
        result.applied[rows],
        None if result.sent is None else result.sent[rows],
        {symbol: tensor[rows] for symbol, tensor in result.state.items()},
        None if result.kept is None else result.kept[rows],
        result.norms,
    )
