"""The plan: what a step will send, how many bytes that is, and what it costs in memory,
before the first step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowrank_comm.communication.workers import Workers
from lowrank_comm.numerics.quantization import FORMATS
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.policy import Treatment
from lowrank_comm.reduction.rehearsal import Needs, Rehearsal
from lowrank_comm.reduction.state import CompressionState

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float) -> str:
    """Return bytes in decimal units, e.g. 1.2 MB."""
    power = 0
    while abs(count) >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.{2 if power else 0}f} {_UNITS[power]}"


@dataclass(frozen=True)
class PlanRow:
    """One parameter of the plan: its treatment, its rank, what an ordinary step and one
    with a restart send, and why.

    `uncompressed_bytes`: of its gradient, in its own dtype. `warmup_bytes`: what a step
    of the warm-up sends. `plain_bytes`: what an ordinary step would send if nothing
    were quantized or sent row by row. `restart`: the rule by which it restarts, where
    there are several, and what decides that; of the largest block, where a node holds
    it in blocks.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    rank: int
    elements: int
    uncompressed_bytes: int
    bytes: float
    restart_bytes: float
    warmup_bytes: float
    plain_bytes: float
    restart: tuple[str, str]
    reason: str

    @property
    def low_rank(self) -> bool:
        """Whether the run's compressor compresses it."""
        return self.scheme == "low_rank"


@dataclass(frozen=True)
class Plan:
    """What is going to happen, computed before the first step from names and shapes
    alone.

    Attributes:
        rows: one for each parameter.
        compressor: its settings as text.
        workers: number of workers.
        restart_every: tau, or None.
        warmup_steps: k of the warm-up, whose bytes are in no average; 0 without one.
        error_bytes: of the error memory on this rank, and of what EF21 keeps in its
            place.
        errors_on_host: whether it lies in the host's memory, in the place of the
            device's.
        rehearsal: finds `needs`, when somebody first asks: in a few seconds for an LLM.
        staggered_bytes: the most that a step after the first sends, where restarts are
            staggered; else None.
        idle_rules: patterns that match no parameter.
        notes: further lines from the engine.
        engine: what runs the model.
        ranks_in_a_node: F, of which one worker consists; the rows are of whole
            parameters, bytes are those of a node.
        shard_scope: "shard" or "matrix", where F > 1.
    """

    rows: tuple[PlanRow, ...]
    compressor: str
    workers: int
    restart_every: int | None
    warmup_steps: int
    error_bytes: int
    errors_on_host: bool
    rehearsal: Rehearsal = field(repr=False, compare=False)
    staggered_bytes: float | None = None
    idle_rules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    engine: str = ""
    ranks_in_a_node: int = 1
    shard_scope: str = "shard"

    @property
    def needs(self) -> Needs:
        """What this rank holds at most beside the error memory, in an ordinary step, in
        one that restarts all matrices, in a save and in a load. See `rehearsal`.
        """
        return self.rehearsal.needs

    @property
    def step_bytes(self) -> float:
        """Payload of an ordinary step."""
        return _sent(self.rows)

    @property
    def average_bytes(self) -> float:
        """Payload of a step on average over a whole period, restarts included."""
        if not self.restart_every:
            return self.step_bytes
        return self.step_bytes + (self.restart_bytes - self.step_bytes) / self.restart_every

    @property
    def restart_bytes(self) -> float:
        """Payload of a step that restarts all matrices, as the first does."""
        return sum(row.restart_bytes for row in self.rows)

    @property
    def warmup_bytes(self) -> float:
        """Payload of a step of the warm-up."""
        return sum(row.warmup_bytes for row in self.rows)

    @property
    def uncompressed_bytes(self) -> int:
        """What an uncompressed all-reduce of the gradients carries, in their own
        dtypes.
        """
        return _uncompressed(self.rows)

    def __str__(self) -> str:
        low, many = [row for row in self.rows if row.low_rank], self.ranks_in_a_node > 1
        dense = [row for row in self.rows if row.scheme == "dense"]
        other = [row for row in self.rows if row.scheme not in ("low_rank", "dense")]
        sent_low, full_low = _sent(low), _uncompressed(low)
        sent_dense, full = _sent(dense), self.uncompressed_bytes
        plain = sum(row.plain_bytes for row in self.rows)
        coded = ""
        if plain > self.step_bytes:
            coded = f"; without codes it would be {human_bytes(plain)}{_times(full, plain)}"
        restarts = ""
        if self.restart_every and self.average_bytes:
            restarts = (
                f"; {human_bytes(self.average_bytes)} on average with restarts every"
                f" {self.restart_every} steps{_times(full, self.average_bytes)}"
            )
        lines = [
            f"lowrank_comm: {self.compressor} over {self._who()}"
            + (f", {self.engine}" if self.engine else ""),
            f"  low-rank: {counted(len(low), 'matrix', 'matrices')}, {human_bytes(full_low)} of"
            f" gradients -> {human_bytes(sent_low)} a step{_times(full_low, sent_low)}",
            f"  dense:    {counted(len(dense), 'parameter')}, {human_bytes(sent_dense)} a step",
            *self._of_other_schemes(other),
            f"  whole model: {human_bytes(full)} -> {human_bytes(self.step_bytes)} an ordinary"
            f" step{_times(full, self.step_bytes)}{restarts}{coded}",
            *self._of_warmup(),
            self._of_memory(),
        ]
        lines += [*self._of_restarts(low), *self._cap(dense)]
        cut = sum("cut to" in row.reason for row in low)
        if cut:
            lines.append(f"  rank: cut to min(m, n) for {cut} of the matrices")
        if many:
            what = (
                "each block of rows is compressed alone"
                if self.shard_scope == "shard"
                else "whole matrices, in blocks"
            )
            lines.append(
                f'  bytes are those of a node, between nodes; shard_scope="{self.shard_scope}":'
                f" {what}"
            )
        if self.workers == 1:
            who = "node" if many else "worker"
            lines.append(
                f"  one {who}: gradients are compressed all the same, and what is called sent would"
                " be sent"
            )
        lines += [f"  rule {pattern!r} matches no parameter" for pattern in self.idle_rules]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _of_other_schemes(self, rows: Sequence[PlanRow]) -> list[str]:
        """Return the lines about what is sent quantized, or row by row."""
        lines = []
        for scheme in dict.fromkeys(row.scheme for row in rows):
            own = [row for row in rows if row.scheme == scheme]
            full, sent = human_bytes(_uncompressed(own)), human_bytes(_sent(own))
            at_most = "at most " if scheme == "row_sparse" else ""
            lines.append(
                f"  {scheme}: {counted(len(own), 'parameter')}, {full} of gradients ->"
                f" {at_most}{sent} a step"
            )
        return lines

    def _of_warmup(self) -> list[str]:
        """Return the line about the warm-up."""
        if not self.warmup_steps:
            return []
        sent = self.warmup_bytes
        return [
            f"  warm-up:  {counted(self.warmup_steps, 'step')} first, which average everything:"
            f" {human_bytes(sent)} a step{_times(self.uncompressed_bytes, sent)}"
        ]

    def _of_restarts(self, low: Sequence[PlanRow]) -> list[str]:
        """Return the line about restarts: which rule was chosen for how many matrices
        and why, and what such a step sends.
        """
        if not self.restart_every or not low:
            return []
        rules = [
            f"{rule} for {counted(number, 'matrix', 'matrices')} {why}".rstrip()
            for (rule, why), number in sorted(Counter(row.restart for row in low).items())
            if rule
        ]
        sent, full = self.restart_bytes, self.uncompressed_bytes
        size = f"{human_bytes(sent)} in a step that restarts all matrices{_times(full, sent)}"
        if self.staggered_bytes is not None:
            most = self.staggered_bytes
            size = (
                f"{human_bytes(sent)} in the first step{_times(full, sent)}, later at most"
                f" {human_bytes(most)} a step{_times(full, most)}"
            )
        return [f"  restarts: {'; '.join(filter(None, (', '.join(rules), size)))}"]

    def _of_memory(self) -> str:
        """Return the line about memory."""
        who = "rank" if self.ranks_in_a_node > 1 else "worker"
        where = " (on the host)" if self.errors_on_host else ""
        kept = f"  memory on this {who}: error memory {human_bytes(self.error_bytes)}{where}"
        try:
            needs = self.needs
        # a compressor that reads numbers otherwise than by a request
        except Exception as error:
            return f"{kept}; what a step needs beside is not known: {error!r}"
        most = needs.most
        phases = [
            f"{human_bytes(needs.between)} between steps",
            f"at most {human_bytes(needs.step)} in an ordinary step",
        ]
        if self.restart_every:
            phases.append(f"{human_bytes(needs.restart)} in one that restarts all matrices")
        if self.warmup_steps:
            phases.append(f"{human_bytes(needs.warmup)} in one of the warm-up")
        phases += [f"{human_bytes(needs.save)} in a save", f"{human_bytes(needs.load)} in a load"]
        total = f"in all {human_bytes(self.error_bytes + most)} of this library's"
        if self.errors_on_host:
            total = f"on the device {human_bytes(most)} of this library's"
        return f"{kept}; beside it {', '.join(phases)}; {total}"

    def _who(self) -> str:
        if self.ranks_in_a_node == 1:
            return counted(self.workers, "worker")
        return f"{counted(self.workers, 'node')} of {self.ranks_in_a_node} ranks"

    @property
    def nothing_compressed(self) -> str:
        """A line that says that nothing is compressed, and why the largest parameters
        are not; empty if something is.
        """
        if not self.rows or any(row.scheme != "dense" for row in self.rows):
            return ""
        return f"nothing is compressed; the largest: {_largest(self.rows)}"

    def _cap(self, dense: Sequence[PlanRow]) -> list[str]:
        """Return the dense parameters that set the ceiling of the ratio, if they are
        more than a fifth of what is sent.
        """
        share = _sent(dense) / self.step_bytes if self.step_bytes else 0.0
        if share < 0.2:
            return []
        if self.nothing_compressed:
            return [f"  {self.nothing_compressed}"]
        names = _largest(dense)
        return [f"  the ratio is capped by what stays dense, {share:.0%} of the bytes: {names}"]


def _largest(rows: Sequence[PlanRow]) -> str:
    """Name the largest parameters, and say what decides their treatment."""
    largest = sorted(rows, key=lambda row: -row.elements)[:3]
    return ", ".join(f"{row.name} ({row.reason})" for row in largest)


def _sent(rows: Sequence[PlanRow]) -> float:
    return sum(row.bytes for row in rows)


def _uncompressed(rows: Sequence[PlanRow]) -> int:
    return sum(row.uncompressed_bytes for row in rows)


def _times(full: float, sent: float) -> str:
    return f" ({full / sent:.1f}x)" if sent else ""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, e.g. "1 worker", "2 workers"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def make_plan(
    state: CompressionState,
    workers: Workers,
    wire_dtype: torch.dtype | None,
    rehearsal: Rehearsal,
) -> Plan:
    """Return the plan of a reducer.

    Args:
        state: its parameters, with what they keep.
        workers: who takes part.
        wire_dtype: on the wire, or None for the computation's.
        rehearsal: of its steps.
    """
    slots, batches = state.slots, state.batches
    assignment = state.assignment
    compressor, formats = assignment.low_rank_compressor, assignment.quantization.formats
    intra_node, count = workers.intra_node, workers.group.size
    # of all blocks of a parameter in this node; `treatments` are of this rank's block
    of_the_node = [assignment.of_the_node(slot) for slot in slots]
    schedule, warmup = state.restarts.schedule, state.warmup

    def in_a_restart(treatment: Treatment) -> int:
        if not treatment.low_rank:
            return treatment.elements
        return compressor.restart_elements(treatment.m, treatment.n, treatment.rank)

    def row(slot: ParamInfo, parts: Sequence[Treatment]) -> PlanRow:
        largest, shape = parts[0], slot.whole or slot.shape
        elements = sum(part.elements for part in parts)
        restart = sum(in_a_restart(part) for part in parts)
        wire = (wire_dtype or slot.compute_dtype).itemsize
        codes = FORMATS.get(largest.scheme)
        sent, in_restart = float(elements * wire), float(restart * wire)
        plain = sent
        if codes is not None:
            sent = in_restart = float(sum(codes.bytes(part.elements) for part in parts))
        elif largest.low_rank:
            # see `communication.ledger`
            gathered = count / 2 if compressor.gathers and count > 1 else 1.0
            factors = formats.get("factors")
            of_restarts = formats.get("restart")
            # nearly: P and Q fill blocks of their own
            sent = (factors.bytes(elements) if factors else sent) * gathered
            in_restart = (of_restarts.bytes(restart) if of_restarts else in_restart) * gathered
            plain *= gathered
        in_warmup = sent
        if largest.batched and assignment.compressor_for(largest)[0].warms_up:
            size = (warmup.dtype or wire_dtype or slot.compute_dtype).itemsize
            in_warmup = float(sum(warmup.bytes(part.m * part.n, size) for part in parts))
        return PlanRow(
            slot.name,
            shape,
            largest.scheme,
            largest.rank,
            elements,
            math.prod(shape) * slot.dtype.itemsize,
            sent,
            in_restart,
            in_warmup,
            plain,
            compressor.restart_rule(largest.m, largest.n) if largest.low_rank else ("", ""),
            largest.reason,
        )

    rows = tuple(row(slot, parts) for slot, parts in zip(slots, of_the_node, strict=True))
    settings = ", ".join(
        f"{key}={value}"
        for key, value in compressor.describe().items()
        if key != "compressor" and value is not None
    )
    staggered = None
    if schedule and schedule.offsets:
        extra = dict.fromkeys(schedule.offsets.values(), 0.0)
        for one in rows:
            if one.low_rank:
                extra[schedule.offsets[one.name]] += one.restart_bytes - one.bytes
        staggered = _sent(rows) + max(extra.values())

    return Plan(
        rows,
        f"{compressor.json_name} ({settings})",
        count,
        schedule.restart_every if schedule else None,
        warmup.length,
        state.error_bytes,
        any(batch.memory.kept and batch.memory.on_host for batch in batches),
        rehearsal,
        staggered,
        assignment.policy.idle_rules([slot.name for slot in slots]),
        ranks_in_a_node=intra_node.size,
        shard_scope=intra_node.scope,
    )
