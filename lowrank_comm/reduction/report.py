"""The report of a step, and the record of a pass that it is made from; norms are
computed only when they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.ledger import PassStats, ratio_of
from lowrank_comm.compressors.base import LowRank, Result
from lowrank_comm.numerics.linalg import norm
from lowrank_comm.reduction.batches import Batch


@dataclass
class StepReport:
    """One pass of the reducer on this worker.

    Attributes:
        step: t, from 0; a vetoed pass repeats the t of the next one.
        applied: False if some worker's gradient was not finite: nothing was changed
            anywhere.
        bytes: kind -> bytes handed to collectives (kinds: see `communication.ledger`).
        collectives: how many collectives that took.
        uncompressed_bytes: what an uncompressed all-reduce of the gradients would have
            carried, in their own dtypes.
        restarts: matrices that restarted.
        captured_energy: ||sent||^2 / ||Delta||^2 over this worker's compressed
            matrices, in [0, 1]; None without any.
        error_norm: Frobenius norm of this worker's whole error memory after the step;
            None without any.
        seconds: host seconds in "compress", "communicate", "decompress", "commit". On
            CUDA, kernels run later than the host; these are then the times to launch
            them, and waiting shows up where the host waits.
        inside_bytes: kind -> bytes handed to collectives between the ranks of a node,
            where there are two levels; what an engine sends there by itself (FSDP's
            reduce-scatter) is not in it.
        surplus_bytes: what gathers carry beyond an all-reduce of the same payload; see
            `communication.ledger`.
    """

    step: int
    applied: bool
    bytes: dict[str, int]
    collectives: int
    uncompressed_bytes: int
    restarts: int
    captured_energy: float | None
    error_norm: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    inside_bytes: dict[str, int] = field(default_factory=dict)
    surplus_bytes: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over bytes sent in this step, with gathers' surplus."""
        return ratio_of(self.uncompressed_bytes, self.total_bytes, self.surplus_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON lines."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass
class PassRecord:
    """The last pass of a reducer.

    Attributes:
        step: t of the pass.
        applied: not vetoed, and not rolled back.
        stats: bytes, collectives and seconds.
        uncompressed_bytes: of all gradients.
        restarts: matrices that restarted.
        parts: what was sent and kept, by batch, once committed.
    """

    step: int
    applied: bool
    stats: PassStats
    uncompressed_bytes: int
    restarts: int
    parts: list[_Part] = field(default_factory=list)
    _made: StepReport | None = None

    def enter(self, batch: Batch, rows: list[int] | None, delta: Tensor, result: Result) -> None:
        """Keep what norms are computed from, in case they are read: small factors, or
        the norm itself of what is large.
        """
        # what is applied is an estimate, of which only the change was sent
        if batch.compressor.tracks:
            return
        if result.norms is not None:
            self.parts.append(_Part(batch, rows, *result.norms))
            return
        projects = batch.compressor.projects and batch.context.m == batch.m
        assert result.sent is not None
        if not isinstance(result.sent, LowRank):
            sent = norm(result.sent)
        else:
            sent = result.sent.q if projects else _norm_of_product(result.sent)
        follows = projects and result.kept is None and batch.memory.kept
        self.parts.append(_Part(batch, rows, sent, None if follows else norm(delta)))

    def report(self, batches: Sequence[Batch]) -> StepReport:
        """Return the report, made once."""
        if (
            self._made is None
            or self._made.applied != self.applied
            or len(self._made.seconds) != len(self.stats.seconds)
        ):
            captured, kept = self._energy(batches)
            self._made = StepReport(
                self.step,
                self.applied,
                dict(self.stats.bytes),
                self.stats.collectives,
                self.uncompressed_bytes,
                self.restarts if self.applied else 0,
                captured,
                kept,
                dict(self.stats.seconds),
                dict(self.stats.inside),
                self.stats.surplus,
            )
        return self._made

    def _energy(self, batches: Sequence[Batch]) -> tuple[float | None, float | None]:
        """Return the captured share of this worker's Delta, and the norm of its error
        memory.

        What is sent by the PowerSGD family is a projection of Delta, so ||Delta||^2 =
        ||sent||^2 + ||e||^2, unless what is kept is another thing than Delta - sent;
        and ||P Q_i^T|| = ||Q_i||. Of a block of rows of a whole matrix's projection
        neither holds, nor of other schemes: there the norms are formed when the step is
        committed.
        """
        kept = [norm(batch.memory.tensor) for batch in batches if batch.memory.kept]
        parts = self.parts if self.applied else []
        squares = iter(
            _squares([*kept, *(part.sent_norm for part in parts), *(p.rest_norm for p in parts)])
        )
        left = sum(itertools.islice(squares, len(kept))) ** 0.5 if kept else None
        if not parts:
            return None, left
        sent = list(itertools.islice(squares, len(parts)))
        given = sum(
            rest + (own if part.follows else 0.0)
            for part, own, rest in zip(parts, sent, squares, strict=True)
        )
        return (sum(sent) / given if given > 0 else None), left


@dataclass
class _Part:
    """What one worker sent of some matrices of a batch (all, if rows is None), and
    ||Delta|| where it does not follow.
    """

    batch: Batch
    rows: list[int] | None
    sent: Tensor
    delta_norm: Tensor | None

    @property
    def follows(self) -> bool:
        """Whether ||Delta||^2 = ||sent||^2 + ||e||^2."""
        return self.delta_norm is None

    @property
    def sent_norm(self) -> Tensor:
        """||sent||."""
        return norm(self.sent)

    @property
    def rest_norm(self) -> Tensor:
        """||Delta||, or ||e|| where the former follows."""
        if self.delta_norm is not None:
            return self.delta_norm
        memory = self.batch.memory.tensor
        return norm(memory if self.rows is None else memory[self.rows])


def _norm_of_product(sent: LowRank) -> Tensor:
    """Return ||P Q^T|| of all matrices, without forming them: tr(P^T P Q^T Q)."""
    p, q = sent.p.double(), sent.q.double()
    return ((p.mT @ p) * (q.mT @ q)).sum().clamp(min=0).sqrt()


def _squares(norms: Sequence[Tensor]) -> list[float]:
    """Return the squares of norms; the host waits once for each device."""
    values = [0.0] * len(norms)
    for device in {one.device for one in norms}:
        here = [k for k, one in enumerate(norms) if one.device == device]
        read = torch.stack([norms[k] for k in here]).square().tolist()
        for k, value in zip(here, read, strict=True):
            values[k] = value
    return values
