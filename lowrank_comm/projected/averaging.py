"""One averaging of projected gradients over the workers.

It runs the same generators as compression (`GaLore`, `GoLore`) in lock-step, with the
same packets and the same veto. Two things differ: R and P of applied = R P^T are
returned as factors instead of being multiplied out, and there is no error memory. In a
step without a refresh a worker sends R (l x r), the gradients that are not projected,
one finite flag and the mask of missing gradients, all in one collective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_comm.communication import Group, Ledger
from lowrank_comm.communication.driver import Flight, complete
from lowrank_comm.communication.flat_buffers import wire_dtype_called
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Context, Delta, LowRank
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.projected.deltas import Coordinates, Gradient
from lowrank_comm.projected.projection import Projection, computation_dtype
from lowrank_comm.reduction.lockstep import lockstep
from lowrank_comm.reduction.passes import Pass, Presence, Steps, Wire


@dataclass(frozen=True)
class Entry:
    """One parameter in a step.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter.
        group: its parameter group.
        rank: r of the projection, or None where the gradient is not projected.
        basis: P (s, r) so far; None without projection, and before the first refresh.
        coordinates: R (l, r) of this worker, where its gradient was not kept.
        refreshed_at: step of the last refresh; -1 before the first, None where it is
            not known.
        unusable: whether this worker's gradient cannot be averaged; it vetoes the step.
    """

    name: str
    parameter: Tensor
    group: dict[str, Any]
    rank: int | None
    basis: Tensor | None = None
    coordinates: Tensor | None = None
    refreshed_at: int | None = None
    unusable: bool = False

    @property
    def has_gradient(self) -> bool:
        """Whether this worker has a gradient for the parameter."""
        return self.parameter.grad is not None or self.coordinates is not None

    @property
    def gradient(self) -> Tensor:
        """This worker's gradient: zero without one, NaN in the place of what cannot be
        averaged.
        """
        grad = self.parameter.grad
        if self.unusable or grad is None:
            number = self.parameter.detach().new_full((), math.nan if self.unusable else 0.0)
            return number.expand(self.parameter.shape)
        return grad


@dataclass(frozen=True)
class Averaged:
    """What all workers agreed on for one parameter.

    Attributes:
        gradient: R (l, r), the mean gradient in coordinates of the subspace; without
            projection the mean gradient itself.
        basis: P (s, r), or None without projection.
        refreshed: whether P is a new one.
    """

    gradient: Tensor
    basis: Tensor | None = None
    refreshed: bool = False


class Averaging:
    """Averages gradients over the workers in coordinates of a subspace.

    Args:
        projection: the subspaces.
        process_group: the workers, None for the default group.
        wire_dtype: on the wire, or None for the wider of float32 and the parameter's.

    Attributes:
        workers: the workers that take part.
        ledger: bytes handed to collectives.

    Raises:
        ConfigError: the wire's dtype is not possible, or the group is not one.
    """

    def __init__(self, projection: Projection, process_group: Any, wire_dtype: str | None) -> None:
        self.projection = projection
        self.workers = Workers(Group(process_group))
        self.wire_name = wire_dtype
        self.ledger = Ledger()
        self._wire = Wire(self.workers, wire_dtype_called(wire_dtype))

    def average(self, entries: Sequence[Entry], t: int) -> list[Averaged | None] | None:
        """Average all gradients; a collective, to be called by every worker.

        Args:
            entries: the parameters, in the same order on all workers.
            t: step, from 0.

        Returns:
            One for each entry, None where no worker had a gradient; or None, on all
            workers, if some worker's numbers were not finite.
        """
        low = [entry for entry in entries if entry.rank is not None]
        dense = [entry for entry in entries if entry.rank is None]
        contexts = [self._context(entry, t) for entry in low]
        group = self.workers.group
        one = Pass(
            [
                functools.partial(self._steps, k, entry, context)
                for k, (entry, context) in enumerate(zip(low, contexts, strict=True))
            ],
            [_whole_gradient(entry) for entry in dense],
            [entry.has_gradient for entry in low + dense],
            self._wire,
            group.rank,
            group.size,
        )
        with full_precision(self.workers.device):
            agreed = complete([Flight(lockstep(one), group.start)])[0]
        full = sum(entry.parameter.numel() * entry.parameter.itemsize for entry in entries)
        self.ledger.enter(one.stats, full, agreed is not None)
        if agreed is None:
            return None
        averaged: dict[str, Averaged] = {}
        present = dict(zip([entry.name for entry in low + dense], agreed.present, strict=True))
        for entry, result, context in zip(low, agreed.results, contexts, strict=True):
            # no result: no worker has the gradient that a deferred refresh waits for
            if result is not None and present[entry.name]:
                assert isinstance(result.applied, LowRank)
                p, q = result.applied.p[0], result.applied.q[0]
                gradient, basis = (q, p) if self.projection.on_rows(entry.parameter) else (p, q)
                averaged[entry.name] = Averaged(gradient, basis, context.restart)
                self.ledger.restarts += context.restart
        for entry, mean in zip(dense, agreed.dense, strict=True):
            if present[entry.name]:
                averaged[entry.name] = Averaged(mean)
        return [averaged.get(entry.name) for entry in entries]

    def _steps(self, number: int, entry: Entry, context: Context) -> Steps:
        """Run the compressor's generator for an entry. Where a refresh is deferred,
        first wait for the packet that tells which gradients exist.
        """
        if self.projection.deferred(entry.refreshed_at, context.t):
            present = yield Presence()
            if not present[number]:
                return None
        basis, parameter = entry.basis, entry.parameter
        if basis is None and context.restart:
            # its dtype and device count only
            basis = parameter.new_empty(0, dtype=computation_dtype(parameter))
        elif basis is None:
            basis = self.projection.initial_basis(entry.name, parameter, context.rank)
        state = {"P": basis.unsqueeze(0)}
        return (yield from self.projection.compressor.step(_delta(entry), state, context))

    def _context(self, entry: Entry, t: int) -> Context:
        assert entry.rank is not None
        return Context(
            (entry.name,),
            t,
            self.projection.seed,
            entry.rank,
            restart=self.projection.refreshes(entry.refreshed_at, t),
            m=entry.parameter.shape[0],
            worker=self.workers.group.rank,
            workers=self.workers.group.size,
            wire_rounds=self._wire.rounds(computation_dtype(entry.parameter)),
        )


def _whole_gradient(entry: Entry) -> Tensor:
    """Return this worker's gradient, widened for the computation."""
    return entry.gradient.to(computation_dtype(entry.parameter)).contiguous()


def _delta(entry: Entry) -> Delta:
    """Return this worker's gradient for the compressor."""
    m, n = entry.parameter.shape
    if entry.coordinates is not None:
        return Coordinates(entry.coordinates, (m, n))
    return Gradient(entry.gradient, computation_dtype(entry.parameter))
