"""N data-parallel workers of one training run: simulated in one process, or the
processes that torchrun has started.

The protocol of a step is the same for both. For each worker of this process
(`local_workers`) the caller computes that worker's gradient into the parameters'
`.grad` and calls `collect()`. After the last one `step()` averages over all workers
through the compressor, clips by the norm of the average, and lets the base optimizer
step. A simulated run computes the N gradients one after another with one model; under
torchrun every process is one worker and a `CompressedOptimizer` averages. Both sum the
same numbers, so a run of either kind gives the same model up to the order of a sum.

`PeerWorkers` are simulated workers of a method that is not of this library (`peers`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_comm.communication.ledger import Ledger
from lowrank_comm.config import Section
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import all_finite
from lowrank_comm.optimizer.compressed import CompressedOptimizer
from lowrank_comm.simulation import Simulation

Item = TypeVar("Item")
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Sent:
    """What one worker handed to the collectives in a run.

    Attributes:
        bytes: kind -> bytes of a worker.
        uncompressed: bytes of the same steps without compression.
        vetoed: steps that were skipped because a gradient was not finite.
    """

    bytes: dict[str, int]
    uncompressed: int
    vetoed: int

    @classmethod
    def of(cls, ledger: Ledger) -> Sent:
        """Read a worker's ledger."""
        return cls(dict(ledger.bytes), ledger.uncompressed_bytes, ledger.vetoed)


class SimulatedWorkers:
    """N workers in this process.

    Args:
        parameters: name -> parameter of the one model.
        optimizer: the base, over these parameters.
        section: the compressor's settings.
        workers: N.
        clip: largest norm of the averaged gradient; None for any.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        section: Section,
        workers: int,
        clip: float | None,
    ) -> None:
        self.local_workers = range(workers)
        self._parameters, self._optimizer, self._clip = dict(parameters), optimizer, clip
        self._simulation = Simulation(
            self._parameters, section.make_compressor(), workers, **section.reducer_options()
        )
        self._gradients: list[dict[str, Tensor | None]] = []

    def collect(self) -> None:
        """Take the next worker's gradients out of the parameters."""
        self._gradients.append(
            {name: parameter.grad for name, parameter in self._parameters.items()}
        )
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self) -> bool:
        """Average, clip, step. Return False if a gradient was not finite and nothing
        has changed.
        """
        gradients, self._gradients = self._gradients, []
        mean = self._simulation.reduce(gradients)
        for name, parameter in self._parameters.items():
            parameter.grad = mean.get(name)
        if mean:
            if self._clip is not None:
                nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return bool(mean)

    def sent(self) -> Sent:
        """Return what worker 0 has sent so far."""
        return Sent.of(self._simulation.reducers[0].ledger)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of work that is shared out: all of it."""
        return items

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of values over the shares."""
        return values


class Peer(Protocol):
    """A method of others for N workers, with its own optimizer.

    Attributes:
        clip: whether what is averaged is clipped to the recipe's norm.
        sent: bytes that one worker has sent, by the ledger's kinds.
    """

    clip: bool
    sent: Counter[str]

    @property
    def optimizer(self) -> Optimizer:
        """Steps the parameters by what `average` returns."""

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return parameter name -> what the optimizer takes for its gradient.

        Args:
            gradients: parameter name -> gradient, for each worker.
        """


class PeerWorkers:
    """N workers of a peer in this process.

    Args:
        parameters: name -> parameter of the one model.
        peer: the method.
        workers: N.
        clip: largest norm of what the peer averages; None for any.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], peer: Peer, workers: int, clip: float | None
    ) -> None:
        self.local_workers = range(workers)
        self._parameters, self._peer = dict(parameters), peer
        self._clip = clip if peer.clip else None
        self._gradients: list[dict[str, Tensor]] = []
        self._steps = self._skipped = 0

    def collect(self) -> None:
        """Take the next worker's gradients out of the parameters."""
        self._gradients.append({name: p.grad for name, p in self._parameters.items()})  # type: ignore[misc]
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> bool:
        """Average, clip, step. Return False if a gradient was not finite and nothing
        has changed.
        """
        gradients, self._gradients = self._gradients, []
        self._steps += 1
        if not all(all_finite(list(each.values())) for each in gradients):
            self._skipped += 1
            return False
        for name, mean in self._peer.average(gradients).items():
            self._parameters[name].grad = mean
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
        self._peer.optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None
        return True

    def sent(self) -> Sent:
        """Return what one worker has sent so far."""
        whole = 4 * sum(parameter.numel() for parameter in self._parameters.values())
        return Sent(dict(self._peer.sent), whole * self._steps, self._skipped)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of work that is shared out: all of it."""
        return items

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of values over the shares."""
        return values


class ProcessWorkers:
    """This process is one of N workers. Arguments as of `SimulatedWorkers`, without N:
    the default process group's size.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        section: Section,
        clip: float | None,
    ) -> None:
        rank = dist.get_rank()
        self.local_workers = range(rank, rank + 1)
        self._optimizer = CompressedOptimizer(
            optimizer,
            section.make_compressor(),
            named_parameters=parameters.items(),
            max_grad_norm=clip,
            reduce_at="step",
            **section.reducer_options(),
        )

    def collect(self) -> None:
        """Do nothing: the gradients stay in the parameters."""

    def step(self) -> bool:
        """Average, clip, step. Return False if some worker's gradient was not finite
        and nothing has changed.
        """
        self._optimizer.step()
        self._optimizer.zero_grad()
        return not self._optimizer.step_was_skipped

    def sent(self) -> Sent:
        """Return what this worker has sent so far."""
        return Sent.of(self._optimizer.ledger)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of work that is shared out."""
        return items[self.local_workers[0] :: dist.get_world_size()]

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of values over the shares."""
        dist.all_reduce(values)
        return values


Workers = SimulatedWorkers | PeerWorkers | ProcessWorkers


def make_workers(
    model: nn.Module, optimizer: Optimizer, section: Section, workers: int, clip: float | None
) -> Workers:
    """Return the workers of a run: simulated, or this process and its peers where there
    is a process group of more than one.

    Raises:
        ConfigError: the settings ask for another number of workers than there are
            processes.
    """
    named = trained_parameters(model)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return SimulatedWorkers(named, optimizer, section, workers, clip)
    if world != workers:
        raise ConfigError(
            f"workers={workers}, but {world} processes were started; set workers: {world} in the"
            " preset."
        )
    return ProcessWorkers(named, optimizer, section, clip)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> parameter of all that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def process_rank() -> int:
    """Return this process's worker number; 0 where all are simulated in one."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_processes(device: str) -> torch.device:
    """Join the processes that torchrun has started, if any, and return this one's
    device.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    if device not in get_args(Device):
        raise ConfigError(f'device={device!r} is unknown; use "auto", "cpu" or "cuda".')
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda", but torch sees no GPU here; use "auto" or "cpu".')
    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cpu")
    if on_gpu:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return place


def averaged(sent: Sent, steps: int) -> dict[str, Any]:
    """Return plain figures of what a worker sent: totals, bytes a step, and how many
    times less than uncompressed.
    """
    kinds = Counter(sent.bytes)
    total = sum(kinds.values())
    return {
        "bytes": dict(kinds),
        "bytes_per_step": total / max(1, steps),
        "uncompressed_bytes_per_step": sent.uncompressed / max(1, steps),
        "ratio": sent.uncompressed / total if total else 1.0,
        "skipped_steps": sent.vetoed,
    }
