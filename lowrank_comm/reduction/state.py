"""What a reducer keeps between steps: treatments, batches with their error memory and
bases, the step, the ledger.

Everything is keyed by parameter name. `reducer` has the steps that change it;
checkpoints, a change of the parameters and the consolidation of the error memory change
it here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.ef21 import EF21
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import is_finite, unsound
from lowrank_comm.reduction.assignment import CompressorAssignment
from lowrank_comm.reduction.batches import Batch, build_batches
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.policy import Treatment
from lowrank_comm.reduction.report import PassRecord, StepReport
from lowrank_comm.reduction.restarts import Restarts
from lowrank_comm.reduction.warmup import Warmup

_log = logging.getLogger("lowrank_comm")


@dataclass(frozen=True)
class DenseGroup:
    """Parameters that are averaged uncompressed in one vector.

    Attributes:
        slots: their places, ascending.
        numels: elements of each.
        dtype, device: of the vector.
    """

    slots: list[int]
    numels: list[int]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Bucket:
    """Parameters whose pass may start together.

    Attributes:
        slots: their places, ascending.
        batches: of the compressed ones.
        dense_groups: of the others, by dtype of the computation and device.
    """

    slots: list[int]
    batches: list[Batch]
    dense_groups: list[DenseGroup]


class CompressionState:
    """What a reducer keeps between steps.

    Args:
        slots: the parameters, in the same order on all workers.
        assignment: which compressor serves which of them.
        workers: who takes part.
        seed: of all random draws.
        initial_basis: parameter name -> Q (n x r) to start from.
        bucket_bytes: size of the buckets that may start early; None for one bucket.
        warmup: the first steps, which average everything.

    Attributes:
        warmup: as given.
        step: t of the next pass.
        treatments: of the slots, in their order.
        buckets: parameters whose pass may start together.
        batches: of all buckets.
        restarts: which matrices restart in a step.
        last_pass: the record of the last pass, vetoed or not, whose norms are of the
            error memory as that pass left it; None before the first.
        worker: (global rank, world size) at the last pass, whose error memory this is,
            also when the process group is gone by now; None before the first.
        whole: the tensors of whole parameters, if they were gathered at the last
            consolidation; right as long as `consolidated` is.
        lineage: what the files of this run's saves, and of those that it resumed from,
            have in common; "" before the first of them.
        files: folder -> the file in it that this run has saved or loaded last.

    Raises:
        ConfigError: an initial basis does not fit.
    """

    def __init__(
        self,
        slots: list[ParamInfo],
        assignment: CompressorAssignment,
        workers: Workers,
        seed: int,
        initial_basis: Mapping[str, Tensor],
        bucket_bytes: int | None,
        warmup: Warmup | None = None,
    ) -> None:
        self.warmup = warmup or Warmup()
        self.slots, self.assignment, self._workers, self.seed = slots, assignment, workers, seed
        self.step = 0
        # of the largest block of each slot in the node, which decides for all its ranks
        self._largest = [assignment.treat(slot, 0) for slot in slots]
        self.treatments: list[Treatment] = [
            assignment.treat(slot, workers.intra_node.rank) for slot in slots
        ]
        low = {slot.name for slot, t in zip(slots, self.treatments, strict=True) if t.low_rank}
        for name in initial_basis:
            if name not in low:
                raise ConfigError(
                    f"initial_basis names {name!r}, which is not a compressed parameter; remove it."
                )
        self.buckets = [self._bucket(indices, initial_basis) for indices in self._cut(bucket_bytes)]
        self.batches = [batch for bucket in self.buckets for batch in bucket.batches]
        self._described = {
            "initial_basis": {name: _digest(basis) for name, basis in initial_basis.items()},
            "bucket_bytes": bucket_bytes,
        }
        self._place = {
            name: (batch, row) for batch in self.batches for row, name in enumerate(batch.names)
        }
        self.restarts = self._restarts()
        self.last_pass: PassRecord | None = None
        self.whole: dict[str, dict[str, Tensor]] | None = None
        self._consolidated_at: int | None = None
        self.worker: tuple[int, int] | None = None
        self.lineage, self.files = "", dict[Path, Path]()

    def _cut(self, bucket_bytes: int | None) -> list[list[int]]:
        """Cut the slots into buckets, each of which may start when its last gradient is
        there: the last parameters first, as backward makes gradients. One bucket of all
        where nothing starts early.
        """
        if bucket_bytes is None:
            return [list(range(len(self.slots)))]
        buckets: list[list[int]] = []
        room = 0
        for k in reversed(range(len(self.slots))):
            size = self.slots[k].numel * self.slots[k].dtype.itemsize
            if not buckets or size > room:
                buckets.append([])
                room = bucket_bytes
            buckets[-1].append(k)
            room -= size
        return [sorted(bucket) for bucket in buckets] or [[]]

    def _bucket(self, indices: list[int], initial_basis: Mapping[str, Tensor]) -> Bucket:
        batches = build_batches(
            self.slots,
            self.treatments,
            self.assignment,
            self._workers,
            self.seed,
            initial_basis,
            indices,
        )
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k in indices:
            if not self.treatments[k].batched:
                slot = self.slots[k]
                groups.setdefault((slot.compute_dtype, slot.device), []).append(k)
        dense_groups = [
            DenseGroup(members, [self.slots[k].numel for k in members], dtype, device)
            for (dtype, device), members in groups.items()
        ]
        return Bucket(indices, batches, dense_groups)

    def _restarts(self) -> Restarts:
        """Make the restarts by the largest block of each matrix: all ranks of a node
        restart it in the same steps, also those with fewer rows of it or none.
        """
        compressor, costs = self.assignment.low_rank_compressor, {}
        for slot, largest in zip(self.slots, self._largest, strict=True):
            if largest.low_rank:
                costs[slot.name] = compressor.restart_elements(largest.m, largest.n, largest.rank)
        steps = self.warmup.length
        return Restarts(compressor.schedule(costs, steps), costs, steps)

    @property
    def compressed(self) -> list[str]:
        """Names of the parameters of which this rank gives something to a
        compressor.
        """
        return list(self._place)

    @property
    def error_bytes(self) -> int:
        """Bytes of the error memory, and of what EF21 keeps in its place."""
        kept = [batch.memory.tensor for batch in self.batches if batch.memory.kept]
        for batch in self.batches:
            if batch.compressor.tracks:
                kept += [batch.state[k] for k in EF21.symbols if k in batch.state]
        return sum(tensor.nbytes for tensor in kept)

    def error_memory(self) -> dict[str, Tensor]:
        """Return parameter name -> this worker's error, a live view in the parameter's
        shape; what keeps none is absent.
        """
        return {
            name: batch.memory.view(row, self.slots[batch.slots[row]].shape)
            for name, (batch, row) in self._place.items()
            if batch.memory.kept
        }

    def numbers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all numbers that are kept, each with what it is called in messages."""
        for name, error in self.error_memory().items():
            yield f"the error memory of {name}", error
        for batch in self.batches:
            for name in batch.names:
                for symbol, tensor in self.bases_of(name).items():
                    if tensor.is_floating_point():
                        yield f"the state {symbol} of {name}", tensor

    def blocks(self) -> list[tuple[ParamInfo, Treatment, dict[str, Tensor]]]:
        """List every parameter that is given to a compressor in this node.

        Returns:
            For each the slot, the treatment of its largest block, which decides whether
            it is given to a compressor, and symbol -> what this rank keeps in its
            shape: the error, a live view, where one is kept, and the compressor's
            `parameter_shaped_state` as it is now. Tensors are empty where other ranks
            of the node hold all rows.
        """
        memory, blocks = self.error_memory(), []
        for slot, largest in zip(self.slots, self._largest, strict=True):
            if not largest.batched:
                continue
            compressor, error_feedback = self.assignment.compressor_for(largest)
            held = self.bases_of(slot.name)
            if slot.name in memory:
                held["error"] = memory[slot.name]
            symbols = compressor.parameter_shaped_state
            if error_feedback.keeps_errors:
                symbols = ("error", *symbols)
            if not held:
                empty = torch.zeros(slot.shape, dtype=slot.compute_dtype, device=slot.device)
                held = dict.fromkeys(symbols, empty)
                if "error" in held:
                    # as of the ranks that hold rows, with which it is gathered
                    held["error"] = empty.to(error_feedback.stored_as(slot.compute_dtype))
            blocks.append((slot, largest, {symbol: held[symbol] for symbol in symbols}))
        return blocks

    def compressor_of(self, name: str) -> Compressor | None:
        """Return the compressor of one parameter, with all that is around it; None
        where it is not compressed on this rank.
        """
        return self._place[name][0].compressor if name in self._place else None

    def bases_of(self, name: str) -> dict[str, Tensor]:
        """Return the live state of the compressor of one parameter, with what is
        `parameter_shaped_state` in the parameter's shape; {} where the parameter is not
        compressed on this rank.
        """
        if name not in self._place:
            return {}
        batch, row = self._place[name]
        shape, shaped = self.slots[batch.slots[row]].shape, batch.compressor.parameter_shaped_state
        return {
            k: tensor[row].reshape(shape) if k in shaped else tensor[row]
            for k, tensor in batch.state.items()
        }

    def bases(self) -> dict[str, dict[str, Tensor]]:
        """Return parameter name -> state of the compressor by its symbol (Q), as in
        `bases_of`, a copy as it is now.
        """
        return {
            name: {symbol: tensor.clone() for symbol, tensor in self.bases_of(name).items()}
            for name in self._place
        }

    @torch.no_grad()
    def set_state(self, name: str, error: Tensor | None, state: Mapping[str, Tensor]) -> None:
        """Overwrite the error memory and the basis of one parameter, as read from a
        checkpoint.
        """
        self.last_report()
        self._consolidated_at = None
        batch, row = self._place[name]
        if error is not None and batch.memory.kept:
            batch.memory.tensor[row].copy_(error.reshape(batch.m, batch.n))
        for symbol, value in state.items():
            here = batch.state[symbol][row]
            here.copy_(value.reshape(here.shape))

    @torch.no_grad()
    def reset(self, names: Sequence[str] | None = None) -> None:
        """Go back to the state before the first step: zero errors and initial bases, of
        all parameters and the step counter, or of the named parameters only.
        """
        if names is None:
            names = list(self._place)
            self.continue_at(0)
        self.restarts.start_anew(names, self.step)
        self._workers.agreed = False
        self.last_report()
        self._consolidated_at = None
        for batch in self.batches:
            rows = [row for row, name in enumerate(batch.names) if name in names]
            if not rows:
                continue
            if batch.memory.kept:
                batch.memory.tensor[rows] = 0
            for symbol, initial in batch.initial_state().items():
                batch.state[symbol][rows] = initial[rows]

    def continue_at(self, step: int, irregular: Mapping[str, Sequence[int]] | None = None) -> None:
        """Make t = step the next pass, as read from a checkpoint. irregular: see
        `Restarts.go_on`.
        """
        self.step, self._workers.agreed, self._consolidated_at = step, False, None
        self.restarts.go_on(step, irregular or {})

    @property
    def consolidated(self) -> bool:
        """Whether the error memory is the mean of all workers' errors since the last
        step.
        """
        return self._consolidated_at == self.step

    def mark_consolidated(self) -> None:
        """Note that the error memory is the mean of all workers' errors, as that of a
        checkpoint which holds the mean.
        """
        self._consolidated_at, self.whole = self.step, None

    def take_over(self, old: CompressionState) -> None:
        """Go on with the state of a reducer of fewer parameters; all workers do so."""
        memory, before = old.error_memory(), {slot.name for slot in old.slots}
        self.continue_at(old.step, old.restarts.irregular())
        self.restarts.start_anew({slot.name for slot in self.slots} - before, old.step)
        for name, state in old.bases().items():
            self.set_state(name, memory.get(name), state)
        old.last_report()
        self.worker, self.last_pass = old.worker, old.last_pass
        self.lineage, self.files = old.lineage, old.files
        if old.consolidated:
            self.mark_consolidated()

    def last_report(self) -> StepReport | None:
        """Return the report of the last pass; None before the first. It is made once,
        and must be made before the error memory is changed by anything but a step.
        """
        return self.last_pass.report(self.batches) if self.last_pass else None

    def not_finite(self) -> str:
        """Return which numbers of this rank are not finite, or too large for a sum over
        the workers; "" for none.
        """
        largest = min((torch.finfo(batch.dtype).max for batch in self.batches), default=0.0)
        return unsound(self.numbers(), largest / self._workers.group.size)

    def warn_of_a_mean_that_is_not_exact(self) -> None:
        """Warn where a run that goes on from the mean of all errors does not go on as
        it would have.
        """
        assignment = self.assignment
        inexact = [] if assignment.linear else [assignment.compressor.json_name]
        inexact += [b.compressor.json_name for b in self.batches if not b.compressor.linear]
        if inexact:
            words = "%s: not linear; the workers' mean %s is a valid start, not an exact one"
            which = ", ".join(dict.fromkeys(inexact))
            _log.warning(words, which, assignment.error_feedback.memory)

    def average_errors(
        self, mean: Callable[[Tensor], Tensor], sound: bool, piece_bytes: int
    ) -> bool:
        """Replace this worker's errors, and what else of the state is its own, by the
        mean over the workers.

        Args:
            mean: averages a tensor over the workers, in place; a collective.
            sound: whether this worker's numbers are fit for it. One that has others
                sends NaN in the place of the first tensor, which all see.
            piece_bytes: of errors that are averaged at once, unless one matrix has
                more.

        Returns:
            False, with nothing changed, if some worker's numbers are not sound.
        """
        told = False

        def averaged(own: Tensor) -> Tensor | None:
            nonlocal told
            if not told and not sound:
                own.fill_(float("nan"))
            result, told, first = mean(own), True, not told
            refused = first and not is_finite(result)
            return None if first and self._workers.any_in_the_node(refused) else result

        for batch, rows in self._in_pieces(piece_bytes):
            at = slice(rows[0], rows[-1] + 1)
            if batch.memory.kept:
                errors = batch.memory.tensor[at]
                result = averaged(errors.to(device=batch.device, dtype=batch.dtype, copy=True))
                if result is None:
                    return False
                batch.memory.store(result, rows, t=self.step, shared=True)
                # as large as a piece: not beside the next
                del errors, result
            for symbol in batch.compressor.private:
                result = averaged(batch.state[symbol][at].clone())
                if result is None:
                    return False
                batch.state[symbol][at] = result
                del result
        # a rank of the node may hold no row of any matrix
        return told or not self._workers.any_in_the_node(False)

    def _in_pieces(self, piece_bytes: int) -> Iterator[tuple[Batch, list[int]]]:
        """Cut the batches into rows that follow each other, of so many bytes of a
        computation; of every batch at least one.
        """
        for batch in self.batches:
            size = batch.m * batch.n * batch.dtype.itemsize
            together = max(1, piece_bytes // max(1, size))
            for start in range(0, len(batch.names), together):
                yield batch, list(range(start, min(start + together, len(batch.names))))

    @property
    def keeps_private_state(self) -> bool:
        """Whether something of the state is this worker's own: its errors, or a part of
        the compressor's state. The same on all ranks of a node.
        """
        return any(
            error_feedback.keeps_errors or compressor.private
            for compressor, error_feedback in (
                self.assignment.compressor_for(largest)
                for largest in self._largest
                if largest.batched
            )
        )

    @property
    def compresses(self) -> bool:
        """Whether a node gives anything to a compressor; the same on all its ranks."""
        return any(largest.batched for largest in self._largest)

    def describe(self) -> dict[str, Any]:
        """Return everything of the state that must be equal on all workers."""
        return {
            **self._described,
            "step": self.step,
            "restarts": self.restarts.describe(),
            "parameters": {
                slot.name: f"#{k} {slot.shape} {slot.dtype}" for k, slot in enumerate(self.slots)
            },
        }


def _digest(tensor: Tensor) -> str:
    """Return a short hash of the numbers, to be compared between workers."""
    return hashlib.sha256(repr(tensor.tolist()).encode()).hexdigest()[:16]
