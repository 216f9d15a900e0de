"""Makes plans and step reports from what the reducer holds; computes norms only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batches import Batch, Slot
from .compressors.base import Compressor, LowRank, Result
from .diagnostics import Plan, PlanRow, StepReport
from .lockstep import Account
from .policy import Treatment


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
        sent = result.sent.q if isinstance(result.sent, LowRank) else _norm_of(result.sent)
        self.parts.append(_Part(batch, rows, sent, None if result.kept is None else _norm_of(delta)))

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
            )
        return self._made

    def _energy(self, batches: Sequence[Batch]) -> tuple[float | None, float | None]:
        """Captured share of this worker's Delta, and the norm of its error memory.

        What is sent is a projection of Delta, so ||Delta||^2 = ||sent||^2 + ||e||^2, unless what is kept is another thing
        than Delta - sent; and ||P Q_i^T|| = ||Q_i||.
        """
        if not batches:
            return None, None
        norm = sum(_norm(batch.memory.tensor) ** 2 for batch in batches) ** 0.5
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
    restart_every: int | None,
    idle_rules: tuple[str, ...],
) -> Plan:
    """The plan of a reducer; see `diagnostics.Plan`."""
    rows = tuple(
        PlanRow(
            slot.name,
            slot.shape,
            treatment.low_rank,
            treatment.rank,
            treatment.elements,
            compressor.restart_elements(treatment.m, treatment.n, treatment.rank)
            if treatment.low_rank
            else treatment.elements,
            slot.numel,
            slot.dtype.itemsize,
            (wire_dtype or slot.compute_dtype).itemsize,
            treatment.reason,
        )
        for slot, treatment in zip(slots, treatments, strict=True)
    )
    settings = ", ".join(f"{key}={value}" for key, value in compressor.describe().items() if key != "compressor")
    delta = sum(batch.memory.tensor.numel() * batch.dtype.itemsize for batch in batches)

    def packets(of_a_step: str) -> int:
        """Held at most: the buffer on the wire; if it is narrower, also the own part of it, and both again at full width."""
        total = 0
        for row, slot in zip(rows, slots, strict=True):
            elements, full = getattr(row, of_a_step), slot.compute_dtype.itemsize
            total += elements * (row.wire_bytes if row.wire_bytes >= full else 2 * (row.wire_bytes + full))
        return total

    return Plan(
        rows,
        f"{compressor.json_name} ({settings})",
        workers,
        restart_every,
        sum(batch.memory.tensor.nbytes for batch in batches),
        delta + packets("elements"),
        delta + packets("restart_elements"),
        idle_rules,
    )
