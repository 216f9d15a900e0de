"""N workers in one process: the same compressors, reducer and packets as over a process
group, without processes.

Every worker has a reducer of its own; a step runs their passes side by side and answers
each buffer by the sum over the workers. Tests hold every engine against this, and the
lab trains with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.agreement import raise_if_different
from lowrank_comm.communication.collectives import Exchange, among
from lowrank_comm.communication.driver import complete
from lowrank_comm.communication.group import PretendedGroup
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.reducer import Outcome, Reducer
from lowrank_comm.reduction.report import StepReport


class _Done:
    """A collective that has been carried out."""

    def wait(self) -> None:
        pass


class _Table:
    """Holds what simulated workers exchange; it is carried out once all have laid
    theirs down.

    Attributes:
        laid: in the phase that runs; None where no step does.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.laid: list[Sequence[Exchange]] | None = None

    def lay(self, exchanges: Sequence[Exchange]) -> list[_Done]:
        if self.laid is None:
            raise LowRankCommError(
                "a simulated worker cannot communicate by itself; call Simulation's methods."
            )
        self.laid.append(exchanges)
        if len(self.laid) == self.workers:
            for exchange in zip(*self.laid, strict=True):
                among(exchange)
            self.laid = []
        return [_Done() for _ in exchanges]


class _SimulatedGroup(PretendedGroup):
    """One of N workers that share a process and a table."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__(table.workers, rank)
        self._table = table

    def start(self, exchanges: Sequence[Exchange]) -> list[Any]:
        return self._table.lay(exchanges)


class Simulation:
    """Compressed averaging of gradients over N workers in this process.

    Args:
        shapes: parameter name -> shape, or a tensor whose shape and dtype are taken.
        compressor: of all workers.
        workers: N >= 1.
        dtype: of parameters given by shape.
        options: further keyword arguments of `Reducer`: min_compression_rate, rules,
            error_feedback, wire_dtype, seed, initial_basis.

    Example:
        >>> import torch
        >>> from lowrank_comm import PowerSGD
        >>> from lowrank_comm.simulation import Simulation
        >>> simulation = Simulation(
        ...     {"w": (8, 6)}, PowerSGD(rank=2), workers=2, min_compression_rate=0
        ... )
        >>> ones, zeros = torch.ones(8, 6), torch.zeros(8, 6)
        >>> mean = simulation.reduce([{"w": ones}, {"w": zeros}])["w"]
        >>> bool(torch.allclose(mean, (ones + zeros) / 2))
        True
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int] | Tensor],
        compressor: Compressor,
        workers: int,
        *,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        cpu = torch.device("cpu")
        slots = [
            (
                ParamInfo(name, tuple(s.shape), s.dtype, s.device)
                if isinstance(s, Tensor)
                else ParamInfo(name, tuple(s), dtype, cpu)
            )
            for name, s in shapes.items()
        ]
        self._table = _Table(workers)
        self.reducers = [
            Reducer(slots, compressor, _SimulatedGroup(rank, self._table), **options)
            for rank in range(workers)
        ]
        raise_if_different([reducer.describe() for reducer in self.reducers])

    def reduce(self, gradients: Sequence[Mapping[str, Tensor | None]]) -> dict[str, Tensor | None]:
        """Make one step, and return what every worker applies. Nothing given is
        changed.

        Args:
            gradients: one mapping for each worker; absent or None means that the worker
                has no gradient.

        Returns:
            Parameter name -> averaged, decompressed gradient, None where no worker had
            one; {} for a vetoed step.

        Raises:
            LowRankCommError: workers applied different numbers (a defect of a
                compressor).
        """
        self._table.laid = []
        try:
            with torch.no_grad(), full_precision(self.reducers[0].device):
                outcomes = self._run(gradients)
        finally:
            self._table.laid = None
        if not outcomes[0].applied:
            return {}
        for reducer in self.reducers:
            reducer.commit()
        names = [slot.name for slot in self.reducers[0].slots]
        for name, first, *others in zip(names, *(one.grads for one in outcomes), strict=True):
            if not all(_same_bits(first, other) for other in others):
                raise LowRankCommError(
                    f"{name}: workers applied different numbers; the compressor is not consistent."
                )
        # in the dtype in which the first worker gave it
        given = [gradients[0].get(name) for name in names]
        return {
            name: mean if mean is None or grad is None else mean.to(grad.dtype)
            for name, mean, grad in zip(names, outcomes[0].grads, given, strict=True)
        }

    def _run(self, gradients: Sequence[Mapping[str, Tensor | None]]) -> list[Outcome]:
        if len(gradients) != len(self.reducers):
            raise LowRankCommError(
                f"got gradients of {len(gradients)} workers, the simulation has"
                f" {len(self.reducers)}."
            )
        copies = [
            [
                None if (g := given.get(slot.name)) is None else g.detach().clone()
                for slot in reducer.slots
            ]
            for reducer, given in zip(self.reducers, gradients, strict=True)
        ]
        # The workers' passes run side by side: each flight lays its exchanges on the
        # table, and that of the last worker carries them out.
        passes = [
            [
                reducer.launch(number, grads, 1.0)
                for reducer, grads in zip(self.reducers, copies, strict=True)
            ]
            for number in range(len(self.reducers[0].state.buckets))
        ]
        complete([one.flight for of_a_bucket in passes for one in of_a_bucket])
        return [
            reducer.finish(grads, [of_a_bucket[k] for of_a_bucket in passes])
            for k, (reducer, grads) in enumerate(zip(self.reducers, copies, strict=True))
        ]

    def error_memory(self, worker: int) -> dict[str, Tensor]:
        """Return parameter name -> error of one worker, live views."""
        return self.reducers[worker].state.error_memory()

    @property
    def last_reports(self) -> list[StepReport | None]:
        """Report of the last step, one for each worker."""
        return [reducer.last_report for reducer in self.reducers]


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
