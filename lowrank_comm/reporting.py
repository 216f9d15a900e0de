"""Makes plans and step reports from what the reducer holds; computes norms only when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batches import Batch, Slot
from .communication import Shards
from .compressors.base import Compressor, LowRank, Result
from .diagnostics import Plan, PlanRow, StepReport
from .feedback import EF21
from .lockstep import Account
from .policy import Treatment
from .quantization import FORMATS, Quantization


@dataclass
class LastPass:
    """The last pass of a reducer.

    Attributes:
        step: t of the pass.
        applied: not vetoed, and not rolled back.
        account: bytes, collectives and seconds.
        uncompressed_bytes: of all gradients.
        restarts: matrices that restarted.
        parts: what was sent and kept, by batch, once committed.
    """

    step: int
    applied: bool
    account: Account
    uncompressed_bytes: int
    restarts: int
    parts: list[_Part] = field(default_factory=list)
    _made: StepReport | None = None

    def enter(self, batch: Batch, rows: list[int] | None, delta: Tensor, result: Result) -> None:
        """Keep what norms are computed from, if somebody asks: small factors, or the norm itself of what is large."""
        if batch.tracks:  # what is applied is an estimate, of which only the change was sent
            return
        if isinstance(result.sent, LowRank):
            sent = result.sent.q if batch.projects and batch.context.m == batch.m else _norm_of_product(result.sent)
        else:
            sent = _norm_of(result.sent)
        follows = result.kept is None and batch.context.m == batch.m and batch.memory.kept and batch.projects
        self.parts.append(_Part(batch, rows, sent, None if follows else _norm_of(delta)))

    def report(self, batches: Sequence[Batch]) -> StepReport:
        """The report, made once."""
        if self._made is None or self._made.applied != self.applied or len(self._made.seconds) != len(self.account.seconds):
            captured, norm = self._energy(batches)
            self._made = StepReport(
                self.step,
                self.applied,
                dict(self.account.bytes),
                self.account.collectives,
                self.uncompressed_bytes,
                self.restarts if self.applied else 0,
                captured,
                norm,
                dict(self.account.seconds),
                dict(self.account.inside),
                self.account.surplus,
            )
        return self._made

    def _energy(self, batches: Sequence[Batch]) -> tuple[float | None, float | None]:
        """Captured share of this worker's Delta, and the norm of its error memory.

        What is sent by the PowerSGD family is a projection of Delta, so ||Delta||^2 = ||sent||^2 + ||e||^2, unless what is
        kept is another thing than Delta - sent; and ||P Q_i^T|| = ||Q_i||. Of a block of rows of a whole matrix's
        projection neither holds, nor of other schemes: there the norms are formed when the step is committed.
        """
        kept = [batch for batch in batches if batch.memory.kept]
        if not batches:
            return None, None
        norm = sum(_norm(batch.memory.tensor) ** 2 for batch in kept) ** 0.5 if kept else None
        if not self.applied or not self.parts:
            return None, norm
        sent = sum(_norm(part.sent) ** 2 for part in self.parts)
        given = sum(part.given_squared() for part in self.parts)
        return (sent / given if given > 0 else None), norm


@dataclass
class _Part:
    """What one worker sent of some matrices of a batch (all, if rows is None), and ||Delta|| where it does not follow."""

    batch: Batch
    rows: list[int] | None
    sent: Tensor
    delta_norm: Tensor | None

    def given_squared(self) -> float:
        """||Delta||^2."""
        if self.delta_norm is not None:
            return float(self.delta_norm) ** 2
        memory = self.batch.memory.tensor
        return _norm(self.sent) ** 2 + _norm(memory if self.rows is None else memory[self.rows]) ** 2


def _norm_of_product(sent: LowRank) -> Tensor:
    """||P Q^T|| of all matrices, without forming them: tr(P^T P Q^T Q)."""
    p, q = sent.p.double(), sent.q.double()
    return ((p.mT @ p) * (q.mT @ q)).sum().clamp(min=0).sqrt()


def _norm(tensor: Tensor) -> float:
    return float(_norm_of(tensor))


def _norm_of(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def make_plan(
    slots: Sequence[Slot],
    treatments: Sequence[Treatment],
    compressor: Compressor,
    batches: Sequence[Batch],
    workers: int,
    wire_dtype: torch.dtype | None,
    quantization: Quantization,
    restart_every: int | None,
    idle_rules: tuple[str, ...],
    of_the_node: Sequence[Sequence[Treatment]],
    shards: Shards,
) -> Plan:
    """The plan of a reducer; see `diagnostics.Plan`. treatments: of what this rank holds; of_the_node: of all blocks."""

    def in_a_restart(treatment: Treatment) -> int:
        if not treatment.low_rank:
            return treatment.elements
        return compressor.restart_elements(treatment.m, treatment.n, treatment.rank)

    def row(slot: Slot, parts: Sequence[Treatment]) -> PlanRow:
        largest, shape = parts[0], slot.whole or slot.shape
        elements, restart = sum(part.elements for part in parts), sum(in_a_restart(part) for part in parts)
        wire = (wire_dtype or slot.compute_dtype).itemsize
        codes = FORMATS.get(largest.scheme)
        sent, in_restart = float(elements * wire), float(restart * wire)
        plain = sent
        if codes is not None:
            sent = in_restart = float(sum(codes.bytes(part.elements) for part in parts))
        elif largest.low_rank:
            gathered = workers / 2 if compressor.gathers and workers > 1 else 1.0  # see `communication.ledger`
            factors, of_restarts = quantization.format_of("factors"), quantization.format_of("restart")
            sent = (factors.bytes(elements) if factors else sent) * gathered  # nearly: P and Q fill blocks of their own
            in_restart = (of_restarts.bytes(restart) if of_restarts else in_restart) * gathered
            plain *= gathered
        return PlanRow(
            slot.name,
            shape,
            largest.scheme,
            largest.rank,
            elements,
            restart,
            math.prod(shape),
            slot.dtype.itemsize,
            wire,
            sent,
            in_restart,
            plain,
            largest.reason,
        )

    rows = tuple(row(slot, parts) for slot, parts in zip(slots, of_the_node, strict=True))
    described = {key: value for key, value in compressor.describe().items() if key != "compressor" and value is not None}
    settings = ", ".join(f"{key}={value}" for key, value in described.items())
    delta = sum(batch.memory.tensor.numel() * batch.dtype.itemsize for batch in batches)

    kept = sum(batch.memory.tensor.nbytes for batch in batches if batch.memory.kept)
    estimates = (t for batch in batches if batch.tracks for symbol, t in batch.state.items() if symbol in EF21.symbols)

    def packets(restart: bool) -> int:
        """Held at most: the buffer on the wire; if it is narrower, also the own part of it, and both again at full width."""
        total = 0
        for row, slot, treatment in zip(rows, slots, treatments, strict=True):
            elements, full = in_a_restart(treatment) if restart else treatment.elements, slot.compute_dtype.itemsize
            total += elements * (row.wire_bytes if row.wire_bytes >= full else 2 * (row.wire_bytes + full))
        return total // shards.size if shards.whole_matrices else total

    return Plan(
        rows,
        f"{compressor.json_name} ({settings})",
        workers,
        restart_every,
        kept + sum(tensor.nbytes for tensor in estimates),
        delta + packets(False),
        delta + packets(True),
        idle_rules,
        ranks_in_a_node=shards.size,
        shard_scope=shards.scope,
    )
