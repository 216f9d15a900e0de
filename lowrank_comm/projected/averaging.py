"""One averaging of projected gradients: the generators of `compressors` in lock-step,
and nothing decoded.

The same definitions of P as in compression (`GaLore`, `GoLore`), the same packets and
the same veto; but what a generator ends with, R and P of applied = R P^T, is handed on
in factors, and there is no error memory. In a step without a refresh a worker sends R
(l x r), what travels dense, one finite flag and the mask of missing gradients, all in
one collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup, Ledger
from lowrank_comm.communication.flat_buffers import wire_dtype_called
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Context, Delta, LowRank
from lowrank_comm.compressors.galore import GaLore
from lowrank_comm.compressors.subspaces import basis_on_rows
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.reduction.lockstep import Agreed, Passing, PassStats, Presence, lockstep


class Gradient(Delta):
    """A gradient as the one matrix of a batch, widened on its way into each product, so
    that no wide copy of it stays.

    Args:
        gradient: (m, n), in any floating dtype.
        dtype: of the computation.
    """

    def __init__(self, gradient: Tensor, dtype: torch.dtype) -> None:
        super().__init__(gradient.unsqueeze(0))
        self._dtype = dtype

    @property
    def tensor(self) -> Tensor:
        """The matrix, widened."""
        return self._tensor.to(self._dtype)


class Coordinates(Delta):
    """A gradient of which only R, its coordinates in the present subspace, was kept:
    for steps without a refresh.

    Args:
        r: (l, r), this worker's own.
        shape: (m, n) of the gradient.
    """

    def __init__(self, r: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(r.new_zeros(()).expand(1, *shape))
        self._r = r.unsqueeze(0)

    @property
    def tensor(self) -> Tensor:
        """Not there."""
        raise AssertionError("a step that needs whole gradients was given coordinates")

    def times(self, q: Tensor) -> Tensor:
        """R itself: q is the basis that it was made with."""
        return self._r

    def transposed_times(self, p: Tensor) -> Tensor:
        """As `times`."""
        return self._r


@dataclass(frozen=True)
class Entry:
    """One parameter in a step.

    Attributes:
        name: in the model.
        parameter: itself.
        rank: r of the projection, or None where the gradient travels dense.
        basis: P (s, r) so far; None where dense, and before the first refresh.
        coordinates: R (l, r) of this worker, where its gradient was not kept.
        refreshed_at: step of the last refresh; -1 before the first, None where it is
            not known.
    """

    name: str
    parameter: Tensor
    rank: int | None
    basis: Tensor | None = None
    coordinates: Tensor | None = None
    refreshed_at: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: the wider of float32 and the parameter's."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def has_gradient(self) -> bool:
        """Whether this worker has one."""
        return self.parameter.grad is not None or self.coordinates is not None


@dataclass(frozen=True)
class Averaged:
    """What all workers agreed on for one parameter.

    Attributes:
        gradient: R (l, r), the mean gradient in coordinates of the subspace; the mean
            gradient itself where it is dense.
        basis: P (s, r), or None where it is dense.
        refreshed: whether P is a new one.
    """

    gradient: Tensor
    basis: Tensor | None = None
    refreshed: bool = False


class Averaging:
    """Averages gradients over the workers in coordinates of a subspace.

    Args:
        compressor: says what the subspace is, and when it is found anew.
        process_group: the workers, None for the default group.
        seed: of random subspaces.
        wire_dtype: on the wire, or None for the wider of float32 and the parameter's.

    Attributes:
        workers: who takes part.
        ledger: bytes handed to collectives.

    Raises:
        ConfigError: the wire's dtype or the seed is not possible, or the group is not
            one.
    """

    def __init__(
        self, compressor: GaLore, process_group: Any, seed: int, wire_dtype: str | None
    ) -> None:
        self._wire_dtype = wire_dtype_called(wire_dtype)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed must be an integer, got {seed!r}; write for example seed=0.")
        self.compressor = compressor
        self.workers = Workers(Group(process_group))
        self.seed = seed
        self.wire_name = wire_dtype
        self.ledger = Ledger()
        self._schedule = compressor.schedule({})

    def deferred(self, refreshed_at: int | None, t: int) -> bool:
        """Whether a refresh before step t fell on a step in which nobody had a
        gradient, and waits for one.
        """
        scheduled = t - t % self.compressor.restart_every
        return refreshed_at is not None and refreshed_at < scheduled < t

    def refreshes(self, name: str, refreshed_at: int | None, t: int) -> bool:
        """Whether a parameter's subspace is found anew at step t, if somebody has a
        gradient for it.
        """
        return self._schedule.due(name, t) or self.deferred(refreshed_at, t)

    def on_rows(self, parameter: Tensor) -> bool:
        """Whether P is on the side of the rows, hence the update P R^T and not R P^T."""
        m, n = parameter.shape
        return basis_on_rows(m, n, self.compressor.side)

    def length(self, parameter: Tensor) -> int:
        """s, the rows of P."""
        m, n = parameter.shape
        return m if self.on_rows(parameter) else n

    def initial_basis(self, entry: Entry, rank: int) -> Tensor:
        """A random P (s, r), until the first refresh."""
        m, n = entry.parameter.shape
        like = torch.empty(0, dtype=entry.dtype, device=entry.parameter.device)
        return self.compressor.initial_state(
            Context((entry.name,), -1, self.seed, rank, m=m), m, n, like
        )["P"][0]

    def average(self, entries: Sequence[Entry], t: int) -> list[Averaged | None] | None:
        """One pass; a collective, to be called by every worker.

        Args:
            entries: the parameters, in the same order on all workers.
            t: step, from 0.

        Returns:
            One for each entry, None where no worker had a gradient; or None, on all
            workers, if some worker's numbers were not finite.
        """
        stats = PassStats()
        low = [entry for entry in entries if entry.rank is not None]
        dense = [entry for entry in entries if entry.rank is None]
        contexts = [self._context(entry, t) for entry in low]
        with full_precision(self.workers.device):
            passing = lockstep(
                [
                    self._steps(k, entry, context)
                    for k, (entry, context) in enumerate(zip(low, contexts, strict=True))
                ],
                [self._dense(entry) for entry in dense],
                [entry.has_gradient for entry in low + dense],
                workers=self.workers.group.size,
                rank=self.workers.group.rank,
                wire_dtype=self._wire_dtype,
                device=self.workers.device,
                stats=stats,
                intra_node=IntraNodeGroup(),
            )
            agreed = self._carry_out(passing)
        full = sum(entry.parameter.numel() * entry.parameter.itemsize for entry in entries)
        self.ledger.enter(stats.bytes, stats.collectives, full, agreed is not None)
        self.ledger.clock(stats.seconds)
        if agreed is None:
            return None
        answers: dict[str, Averaged] = {}
        for entry, result, context in zip(low, agreed.results, contexts, strict=True):
            # nobody has the gradient that a refresh waits for
            if result is None:
                continue
            assert isinstance(result.applied, LowRank)
            p, q = result.applied.p[0], result.applied.q[0]
            gradient, basis = (q, p) if self.on_rows(entry.parameter) else (p, q)
            answers[entry.name] = Averaged(gradient, basis, context.restart)
        for entry, mean in zip(dense, agreed.dense, strict=True):
            answers[entry.name] = Averaged(mean)
        there = {
            entry.name
            for entry, present in zip(low + dense, agreed.present, strict=True)
            if present
        }
        self.ledger.restarts += sum(
            context.restart
            for entry, context in zip(low, contexts, strict=True)
            if entry.name in there
        )
        return [answers[entry.name] if entry.name in there else None for entry in entries]

    def _steps(self, number: int, entry: Entry, context: Context) -> Passing:
        """The compressor's generator; one with a deferred refresh first waits for the
        packet that tells who has a gradient.
        """
        if self.deferred(entry.refreshed_at, context.t) and not (yield Presence())[number]:
            return None
        return (
            yield from self.compressor.step(
                self._delta(entry), {"P": self._basis(entry, context)}, context
            )
        )

    def _context(self, entry: Entry, t: int) -> Context:
        assert entry.rank is not None
        return Context(
            (entry.name,),
            t,
            self.seed,
            entry.rank,
            restart=self.refreshes(entry.name, entry.refreshed_at, t),
            m=entry.parameter.shape[0],
            worker=self.workers.group.rank,
            workers=self.workers.group.size,
            wire_rounds=self._wire_dtype is not None
            and self._wire_dtype.itemsize < entry.dtype.itemsize,
        )

    def _delta(self, entry: Entry) -> Delta:
        m, n = entry.parameter.shape
        if entry.coordinates is not None:
            return Coordinates(entry.coordinates, (m, n))
        gradient = entry.parameter.grad
        return Gradient(
            entry.parameter.new_zeros(()).expand(m, n) if gradient is None else gradient,
            entry.dtype,
        )

    def _basis(self, entry: Entry, context: Context) -> Tensor:
        """P (1, s, r) for the generator, which makes its own where the subspace is
        found anew.
        """
        if entry.basis is not None:
            return entry.basis.unsqueeze(0)
        if context.restart:
            device, length = entry.parameter.device, self.length(entry.parameter)
            return torch.zeros(1, length, context.rank, dtype=entry.dtype, device=device)
        return self.initial_basis(entry, context.rank).unsqueeze(0)

    def _dense(self, entry: Entry) -> Tensor:
        gradient = entry.parameter.grad
        return (torch.zeros_like(entry.parameter) if gradient is None else gradient).to(entry.dtype)

    def _carry_out(self, passing: Any) -> Agreed | None:
        """Drive the pass over the process group."""
        exchanges = next(passing)
        while True:
            works = self.workers.group.start(exchanges)
            for work in works:
                work.wait()
            try:
                exchanges = passing.send(len(works))
            except StopIteration as end:
                agreed: Agreed | None = end.value
                return agreed
