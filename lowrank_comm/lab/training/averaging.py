"""N workers that average gradients of a few matrices through a compressor: simulated
in this process, or gloo processes of their own.

An experiment writes its loop once, as a module-level function `loop(crew, *arguments)`.
The crew says which workers this process plays (all of them, or one) and makes the
averager that they share. `together` calls the loop once in this process, or once in
each of N processes; in the second case it checks that all processes return the same
value.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.communication.group import Group
from lowrank_comm.communication.ledger import Ledger
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.compressors.powersgd import PowerSGD
from lowrank_comm.config import Section
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.numerics.linalg import full_precision
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from lowrank_comm.simulation import Simulation

Backend = Literal["simulation", "gloo"]
Shapes = Mapping[str, Sequence[int]]
TIMEOUT = timedelta(minutes=2)
"""How long a collective may wait for a process that never comes."""


class Averager:
    """Averages the workers' gradients through the compressor of a section.

    Args:
        section: as in a configuration file; `min_compression_rate` is 0 unless it says
            otherwise, since the lab's matrices are small.
        shapes: parameter name -> shape.
        workers: N.
        rank: of the worker that this process plays; None if it plays all.
        dtype: of the parameters.
        initial_basis: parameter name -> Q to start from; for PowerSGD and PowerSGD+,
            others have none.
        wrap: returns the compressor to use in place of the section's, for controls.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        shapes: Shapes,
        workers: int,
        rank: int | None,
        dtype: torch.dtype,
        initial_basis: Mapping[str, Tensor] | None,
        wrap: Callable[[Compressor], Compressor] | None,
    ) -> None:
        parsed = parsed_section(section)
        compressor, options = parsed.make_compressor(), parsed.reducer_options()
        compressor = wrap(compressor) if wrap else compressor
        options["initial_basis"] = initial_basis if isinstance(compressor, PowerSGD) else None
        self._names = list(shapes)
        self.simulation: Simulation | None = None
        if rank is None:
            self.simulation = Simulation(shapes, compressor, workers, dtype=dtype, **options)
            self._reducer = self.simulation.reducers[0]
        else:
            slots = [
                ParamInfo(name, tuple(shape), dtype, torch.device("cpu"))
                for name, shape in shapes.items()
            ]
            self._reducer = Reducer(slots, compressor, Group(), **options)

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Average one step's gradients; a collective in gloo processes.

        Args:
            gradients: parameter name -> gradient, for each worker that this process
                plays. Nothing given is changed.

        Returns:
            What every worker applies.

        Raises:
            LowRankCommError: a gradient was not finite.
        """
        if self.simulation is not None:
            applied = self.simulation.reduce(gradients)
        else:
            with full_precision(self._reducer.device):
                outcome = self._reducer.reduce([gradients[0][name].clone() for name in self._names])
            applied = dict(zip(self._names, outcome.grads, strict=True)) if outcome.applied else {}
            if outcome.applied:
                self._reducer.commit()
        if not applied:
            raise LowRankCommError("a gradient is not finite; take a smaller learning rate.")
        return {name: mean for name, mean in applied.items() if mean is not None}

    @property
    def ledger(self) -> Ledger:
        """What one worker has sent."""
        return self._reducer.ledger


@dataclass(frozen=True)
class Crew:
    """N workers, and which of them this process plays: one (`rank`), or all of them."""

    size: int
    rank: int | None = None

    @property
    def local_workers(self) -> range:
        """Numbers of the workers that this process simulates."""
        return range(self.size) if self.rank is None else range(self.rank, self.rank + 1)

    def averager(
        self,
        section: Mapping[str, Any],
        shapes: Shapes,
        dtype: torch.dtype = torch.float64,
        initial_basis: Mapping[str, Tensor] | None = None,
        wrap: Callable[[Compressor], Compressor] | None = None,
    ) -> Averager:
        """Return an averager that these workers share; see `Averager`."""
        return Averager(section, shapes, self.size, self.rank, dtype, initial_basis, wrap)


def parsed_section(section: Mapping[str, Any]) -> Section:
    """Parse a preset's section; every matrix is compressed unless it says otherwise."""
    return Section.parse({"min_compression_rate": 0.0, **section})


def together(backend: Backend, workers: int, loop: Callable[..., Any], *arguments: Any) -> Any:
    """Run `loop(crew, *arguments)` by N workers and return its value.

    Args:
        backend: "simulation" (in this process) or "gloo" (N processes of this machine).
        workers: N.
        loop: a function of a module; its value is plain, and the same on all workers.
        arguments: of the loop; for "gloo" such as can be pickled.

    Raises:
        LowRankCommError: the processes have come to different values.
    """
    if backend == "simulation":
        return loop(Crew(workers), *arguments)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        store = str(Path(folder) / "store")
        futures = [
            pool.submit(_one_process, rank, workers, store, loop, arguments)
            for rank in range(workers)
        ]
        return agreed([future.result() for future in futures])


def agreed(values: Sequence[Any]) -> Any:
    """Return the value that all processes have come to.

    Raises:
        LowRankCommError: their values differ.
    """
    if any(value != values[0] for value in values[1:]):
        raise LowRankCommError(
            "the processes have come to different results; the compressor is not consistent."
        )
    return values[0]


def _one_process(
    rank: int, workers: int, store: str, loop: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # a machine's own name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, workers), rank=rank, world_size=workers, timeout=TIMEOUT
    )
    try:
        return loop(Crew(workers, rank), *arguments)
    finally:
        dist.destroy_process_group()


def silent(share: float, text: str) -> None:
    """Show no progress; for processes without a display."""
