"""What a reducer keeps between steps: treatments, batches with their error memory and
bases, the step, the ledger.

Everything is keyed by parameter name. `reducer` has the steps that change it;
checkpoints, a change of the parameters and the consolidation of the error memory change
it here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup, Ledger, check_same
from lowrank_comm.communication.agreement import raise_if_different
from lowrank_comm.communication.flat_buffers import WIRE_DTYPES
from lowrank_comm.communication.group import LENGTH_BYTES
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, ConfigMismatchError, LowRankCommError
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.assignment import CompressorAssignment
from lowrank_comm.reduction.batches import Batch, build_batches
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import Plan, make_plan
from lowrank_comm.reduction.policy import Rule, Treatment
from lowrank_comm.reduction.report import PassRecord, StepReport
from lowrank_comm.reduction.restarts import Restarts

_log = logging.getLogger("lowrank_comm")


@dataclass(frozen=True)
class Bucket:
    """Parameters whose pass may start together.

    Attributes:
        slots: their places, ascending.
        batches: of the compressed ones.
        dense: places of the others.
    """

    slots: list[int]
    batches: list[Batch]
    dense: list[int]


class CompressionState:
    """The state of a `Reducer`; see there for the arguments."""

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
        if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
            raise ConfigError(
                f"wire_dtype={wire_dtype!r} is unknown; use null or one of"
                f" {', '.join(WIRE_DTYPES)}."
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(
                f"seed must be an integer of 64 bits, got {seed!r}; write for example seed=0."
            )
        for slot in slots:
            if not slot.dtype.is_floating_point:
                raise ConfigError(
                    f"{slot.name}: parameters of {slot.dtype} cannot be averaged here; use a real"
                    " floating dtype."
                )
        self.slots, self.compressor, self.group, self.seed = list(slots), compressor, group, seed
        names = [slot.name for slot in self.slots]
        twice = (
            sorted({name for name in names if names.count(name) > 1})
            if len(set(names)) < len(names)
            else []
        )
        if twice:
            raise ConfigError(
                f"parameter names must be unique, but {twice[0]!r} occurs twice; give each its own"
                " name."
            )
        self.step = 0
        # Of whoever uses the reducer, compared too: given False between workers, True
        # between the ranks of a node.
        self.further_settings: Callable[[bool], dict[str, Any]] | None = None
        self.ledger = Ledger()
        self._wire_name, self._wire_dtype = wire_dtype, WIRE_DTYPES.get(wire_dtype or "")
        self.intra_node = intra_node or IntraNodeGroup()
        self.assignment = CompressorAssignment(
            compressor,
            min_compression_rate,
            rules,
            error_feedback,
            quantization,
            self.intra_node,
            seed,
        )
        self.treatments: list[Treatment] = [
            self.assignment.treat(slot, self.intra_node.rank) for slot in self.slots
        ]
        low = {
            slot.name: t for slot, t in zip(self.slots, self.treatments, strict=True) if t.low_rank
        }
        self._check_initial_basis(initial_basis or {}, low)
        self._bucket_bytes = bucket_bytes
        self.buckets = [
            self._bucket(indices, initial_basis or {}) for indices in self._cut(bucket_bytes)
        ]
        self._batches = [batch for bucket in self.buckets for batch in bucket.batches]
        self._initial_basis = {
            name: _digest(basis) for name, basis in (initial_basis or {}).items()
        }
        self._place = {
            name: (batch, row) for batch in self._batches for row, name in enumerate(batch.names)
        }
        self.restarts = self._restarts()
        self.device = self.slots[0].device if self.slots else torch.device("cpu")
        self._agreed = False
        self._worker: tuple[int, int] | None = None
        self._consolidated_at: int | None = None
        # another one after each: what was gathered then is of then
        self.consolidation = object()
        # buckets that have been started; see `reducer`
        self._flights: list[Any] = []
        # a pass that waits for commit or rollback; see `reducer`
        self._pending: Any = None
        self._last: PassRecord | None = None

    def _check_initial_basis(
        self, initial_basis: Mapping[str, Tensor], low: Mapping[str, Treatment]
    ) -> None:
        for name in initial_basis:
            if name not in low:
                raise ConfigError(
                    f"initial_basis names {name!r}, which is not a compressed parameter; remove it."
                )

    def _cut(self, bucket_bytes: int | None) -> list[list[int]]:
        """Slots in buckets, each of which may start on its way when its last gradient
        is there: the last parameters first, as backward makes gradients. One bucket of
        all where nothing starts early.
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
            self.assignment.of,
            self.seed,
            self.group.rank,
            initial_basis,
            self.intra_node,
            indices,
        )
        return Bucket(indices, batches, [k for k in indices if not self.treatments[k].batched])

    def _restarts(self) -> Restarts:
        """By the largest block of each matrix: all ranks of a node restart it in the
        same steps, also those with fewer rows of it or none.
        """
        largest = {slot.name: self.assignment.treat(slot, 0) for slot in self.slots}
        scheme = self.assignment.scheme
        costs = {
            name: scheme.restart_elements(t.m, t.n, t.rank)
            for name, t in largest.items()
            if t.low_rank
        }
        return Restarts(scheme.schedule(costs), costs)

    def error_memory(self) -> dict[str, Tensor]:
        """Parameter name -> this worker's error, a live view in the parameter's shape;
        what keeps none is absent.
        """
        return {
            name: batch.memory.view(row, self.slots[batch.slots[row]].shape)
            for batch in self._batches
            if batch.memory.kept
            for row, name in enumerate(batch.names)
        }

    def blocks(self) -> list[tuple[ParamInfo, Treatment, dict[str, Tensor]]]:
        """Of every parameter that is given to a compressor in this node: the slot, the
        treatment of its largest block, which decides that, and by symbol what this rank
        keeps in its shape: the error, a live view, where one is kept, and the
        compressor's `parameter_shaped_state` state as it is now. Tensors are empty
        where other ranks of the node hold all rows.
        """
        memory, blocks = self.error_memory(), []
        for slot in self.slots:
            largest = self.assignment.treat(slot, 0)
            if not largest.batched:
                continue
            compressor, error_feedback = self.assignment.of(largest)
            held = self.bases_of(slot.name) | (
                {"error": memory[slot.name]} if slot.name in memory else {}
            )
            symbols = (
                ("error",) if error_feedback.keeps_errors else ()
            ) + compressor.parameter_shaped_state
            if not held:
                held = {
                    symbol: torch.zeros(slot.shape, dtype=slot.compute_dtype, device=slot.device)
                    for symbol in symbols
                }
            blocks.append((slot, largest, {symbol: held[symbol] for symbol in symbols}))
        return blocks

    def scheme_of(self, name: str) -> Compressor | None:
        """What serves one parameter, with all that is around it; None where it is not
        compressed on this rank.
        """
        return self._place[name][0].compressor if name in self._place else None

    def bases_of(self, name: str) -> dict[str, Tensor]:
        """State of the compressor of one parameter, live, in the parameter's shape what
        is `parameter_shaped_state`; {} where the parameter is not compressed on this
        rank.
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
        """Parameter name -> state of the compressor by its symbol (Q), as in
        `bases_of`, a copy as it is now.
        """
        return {
            name: {symbol: tensor.clone() for symbol, tensor in self.bases_of(name).items()}
            for batch in self._batches
            for name in batch.names
        }

    @torch.no_grad()
    def set_state(self, name: str, error: Tensor | None, state: Mapping[str, Tensor]) -> None:
        """Overwrite the error memory and the basis of one parameter, as read from a
        checkpoint.
        """
        self._settle_last_report()
        self._consolidated_at = None
        batch, row = self._place[name]
        if error is not None and batch.memory.kept:
            memory = batch.memory.tensor
            memory[row] = error.to(memory).view(batch.m, batch.n)
        for symbol, value in state.items():
            here = batch.state[symbol]
            here[row] = value.to(here).reshape(here[row].shape)

    @torch.no_grad()
    def reset(self, names: Sequence[str] | None = None) -> None:
        """Back to the state before the first step: zero errors and initial bases, of
        all parameters and the step counter, or of the named parameters only.
        """
        if names is None:
            self._pending, names = None, list(self._place)
            self.continue_at(0)
        self.restarts.start_anew(names, self.step)
        self._agreed = False
        initial: dict[int, dict[str, Tensor]] = {}
        for name in names:
            batch, row = self._place[name]
            state = initial.get(id(batch)) or initial.setdefault(id(batch), batch.initial_state())
            self.set_state(
                name,
                torch.zeros(batch.m, batch.n),
                {symbol: value[row] for symbol, value in state.items()},
            )

    def continue_at(self, step: int, unsteady: Mapping[str, Sequence[int]] | None = None) -> None:
        """The next pass is t = step, as read from a checkpoint. unsteady: see
        `Restarts.go_on`.
        """
        self.step, self._agreed, self._consolidated_at = step, False, None
        self.restarts.go_on(step, unsteady or {})

    @property
    def consolidated(self) -> bool:
        """Whether the error memory is the mean of all workers' errors since the last
        step.
        """
        return self._consolidated_at == self.step

    def mark_consolidated(self) -> None:
        """The error memory is the mean of all workers' errors, as that of a checkpoint
        which holds the mean.
        """
        self._consolidated_at, self.consolidation = self.step, object()

    def take_over(self, old: CompressionState) -> None:
        """Go on with the state of a reducer of fewer parameters, on all workers alike."""
        memory, before = old.error_memory(), {slot.name for slot in old.slots}
        self.continue_at(old.step, old.restarts.unsteady())
        self.restarts.start_anew({slot.name for slot in self.slots} - before, old.step)
        for name, state in old.bases().items():
            self.set_state(name, memory.get(name), state)
        old._settle_last_report()
        self.ledger, self._worker, self._last = old.ledger, old._worker, old._last
        self.intra_node.bytes = old.intra_node.bytes
        if old.consolidated:
            self.mark_consolidated()

    def _settle_last_report(self) -> None:
        """Before the error memory is changed by anything but a step: the last report's
        norms are of the memory as it is.
        """
        if self._last is not None:
            self._last.report(self._batches)

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
        self._settle_last_report()
        self.ensure_agreed()
        if self.group.size > 1:
            self._average_errors()
        self.mark_consolidated()

    def _average_errors(self) -> None:
        rounded = [
            batch.compressor.json_name for batch in self._batches if not batch.compressor.linear
        ]
        if self.keeps_private_state and (rounded or not self.assignment.linear):
            which = dict.fromkeys(
                [] if self.assignment.linear else [self.compressor.json_name]
            ) | dict.fromkeys(rounded)
            words = "%s: not linear; the workers' mean %s is a valid start, not an exact one"
            _log.warning(words, ", ".join(which), self.assignment.error_feedback.memory)
        for batch in self._batches:
            if batch.memory.kept:
                mean = self._mean(
                    batch.memory.tensor.to(device=batch.device, dtype=batch.dtype, copy=True)
                )
                batch.memory.store(mean, t=self.step, shared=True)
            for symbol in batch.compressor.private:
                batch.state[symbol] = self._mean(batch.state[symbol].clone())

    def _mean(self, tensor: Tensor) -> Tensor:
        self.ledger.collectives += self.group.sum_([tensor])
        self.ledger.bytes["consolidation"] += tensor.nbytes
        return tensor.div_(self.group.size)

    @property
    def keeps_private_state(self) -> bool:
        """Whether something of the state is this worker's own: its errors, or a part of
        the compressor's state.
        """
        return any(batch.memory.kept or batch.compressor.private for batch in self._batches)

    def ensure_agreed(self) -> None:
        """`agree`, unless that was done since the state was last changed from outside."""
        if not self._agreed:
            self.agree()

    def agree(self) -> None:
        """Compare settings, parameters and step with the other workers. A collective.

        Before the first pass, and before the next one after a state was loaded or
        parameters were added, which all workers must do alike: workers that loaded
        different steps would restart at different times, and wait for each other.
        """
        everything = self.describe() | (
            self.further_settings(False) if self.further_settings else {}
        )
        error = ""
        try:
            self.ledger.bytes["fingerprint"] += check_same(everything, self.group, self.device)
        except ConfigMismatchError as mismatch:
            # the other ranks of this node wait to be told
            error = str(mismatch)
        if self.intra_node.size > 1:
            shared = {key: value for key, value in self.describe().items() if key != "parameters"}
            shared |= self.further_settings(True) if self.further_settings else {}
            mine = {
                "error": error,
                "settings": shared,
                "parameters": [(slot.name, slot.whole) for slot in self.slots],
            }
            words = json.dumps(mine, default=repr).encode()
            told = [json.loads(part) for part in self.node.gather_bytes(words, self.device)]
            self.intra_node.bytes["fingerprint"] += len(words) + LENGTH_BYTES
            error = next((one.pop("error") for one in told if one["error"]), "")
            if not error:
                raise_if_different(told)
        if error:
            raise ConfigMismatchError(error)
        self._agreed = True

    @property
    def node(self) -> Group:
        """The ranks of this node, for words."""
        return Group(self.intra_node.process_group)

    def all_gather_text(self, words: str) -> list[str]:
        """The words of every rank of every node, the writer's (see `is_writer`) first;
        a collective.
        """
        told = [part.decode() for part in self.group.gather_bytes(words.encode(), self.device)]
        if self.intra_node.size == 1:
            return told
        by_block = [
            json.loads(part)
            for part in self.node.gather_bytes(json.dumps(told).encode(), self.device)
        ]
        return [block[k] for k in range(self.group.size) for block in by_block]

    @property
    def here(self) -> tuple[int, int]:
        """This rank's number among all ranks of all nodes, and how many there are."""
        return (
            self.group.rank * self.intra_node.size + self.intra_node.rank,
            self.group.size * self.intra_node.size,
        )

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes what all share."""
        return self.here[0] == 0

    def describe(self) -> dict[str, Any]:
        """Everything that must be equal on all workers."""
        return {
            **self.assignment.describe(),
            "seed": self.seed,
            "wire_dtype": self._wire_name,
            "initial_basis": self._initial_basis,
            "step": self.step,
            "restarts": self.restarts.describe(),
            "shards": (
                f"{self.intra_node.size} ranks, {self.intra_node.scope}"
                if self.intra_node.size > 1
                else None
            ),
            "bucket_bytes": self._bucket_bytes,
            "parameters": {
                slot.name: f"#{k} {slot.shape} {slot.dtype}" for k, slot in enumerate(self.slots)
            },
        }

    # ---------------------------------------------------------------- reports

    @property
    def plan(self) -> Plan:
        """What goes low-rank, how many bytes that is, and what it costs in memory."""
        schedule = self.restarts.schedule
        idle = self.assignment.policy.idle_rules([slot.name for slot in self.slots])
        return make_plan(
            self.slots,
            self.treatments,
            self.assignment.scheme,
            self._batches,
            self.group.size,
            self._wire_dtype,
            self.assignment.quantization,
            schedule.restart_every if schedule else None,
            idle,
            [self.assignment.of_the_node(slot) for slot in self.slots],
            self.intra_node,
        )

    @property
    def last_report(self) -> StepReport | None:
        """The last pass; None before the first. Norms cost one read of the error
        memory, when this is first read.
        """
        return self._last.report(self._batches) if self._last else None

    @property
    def has_passed(self) -> bool:
        """Whether a pass has been made, vetoed or not."""
        return self._worker is not None

    @property
    def worker(self) -> tuple[int, int]:
        """(rank, world size) of the last pass, which the error memory is of, also when
        the process group is gone by now.
        """
        return self._worker or self.here


def _digest(tensor: Tensor) -> str:
    """A short hash of the numbers, to be compared between workers."""
    return hashlib.sha256(repr(tensor.tolist()).encode()).hexdigest()[:16]
