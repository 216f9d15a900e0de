"""Makes plans and step reports from what the reducer holds; computes norms only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batches import Batch, Slot
from .compressors.base import Compressor, LowRank
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
        sent: norms of this worker's contributions, or small factors of the same norm, once committed.
    """

    step: int
    applied: bool
    account: Account
    uncompressed_bytes: int
    restarts: int
    sent: list[Tensor] = field(default_factory=list)
    _made: StepReport | None = None

    def enter_sent(self, sent: LowRank | Tensor) -> None:
        """Keep what its norm is computed from later; of a whole matrix the norm only, since it is as large as a gradient."""
        self.sent.append(sent.q if isinstance(sent, LowRank) else torch.linalg.vector_norm(sent, dtype=torch.float64))

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

        What is sent is a projection of Delta, so ||Delta||^2 = ||sent||^2 + ||e||^2, and ||P Q_i^T|| = ||Q_i||.
        """
        if not batches:
            return None, None
        kept = sum(_norm(batch.memory.tensor) ** 2 for batch in batches)
        if not self.applied or not self.sent:
            return None, kept**0.5
        sent = sum(_norm(part) ** 2 for part in self.sent)
        return (sent / (sent + kept) if sent + kept > 0 else None), kept**0.5


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def make_plan(
    slots: Sequence[Slot],
    treatments: Sequence[Treatment],
    compressor: Compressor,
    batches: Sequence[Batch],
    workers: int,
    wire_dtype: torch.dtype | None,
    restart_every: int | None,
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
    return Plan(
        rows,
        f"{compressor.json_name} ({settings})",
        workers,
        restart_every,
        sum(batch.memory.tensor.nbytes for batch in batches),
        sum(batch.memory.tensor.numel() * batch.dtype.itemsize for batch in batches),
    )
