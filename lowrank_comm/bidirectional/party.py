"""One rank's part of a bidirectional run over processes: its point w_i and, on rank 0,
the server with x.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.distributed import ProcessGroupTransport
from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.bidirectional.saved import FORMAT, Agreed
from lowrank_comm.bidirectional.transport import Context
from lowrank_comm.bidirectional.vectors import FlatParameters
from lowrank_comm.communication.agreement import fingerprint, options_of
from lowrank_comm.communication.workers import Workers
from lowrank_comm.numerics.linalg import full_precision

_log = logging.getLogger("lowrank_comm")


class Party:
    """A worker, and on rank 0 the server too.

    Args:
        method: of the run.
        seed: of the draws, equal on all workers.
        flat: the parameters, whose values are x and every w_i at the start.
        workers: of the run.
        ledger: where the traffic is entered.

    Attributes:
        t: step.
        state: of the method, for this party.

    Raises:
        ConfigError: the method cannot have so many workers.
    """

    def __init__(
        self, method: Method, seed: int, flat: FlatParameters, workers: Workers, ledger: LinkLedger
    ) -> None:
        method.groups(workers.world_size)
        workers.device = flat.device
        self.method, self.seed, self.t = method, seed, 0
        self.flat, self.workers, self.ledger = flat, workers, ledger
        self._transport = ProcessGroupTransport(workers.group, ledger)
        self._loaded = False
        self.state: State = method.start(flat.read(), self._context())

    @property
    def is_server(self) -> bool:
        """Whether this rank holds x."""
        return self.workers.group.rank == 0

    def _context(self) -> Context:
        group = self.workers.group
        return Context(self.seed, self.t, group.size, self.flat.d, (group.rank,))

    def agree(self, base: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Compare settings and parameters with the other workers; a collective.

        Args:
            base: name of the optimizer that steps on x.
            groups: its parameter groups, whose options count until a state is loaded,
                which rank 0 alone has the use of.

        Raises:
            ConfigMismatchError: on every worker, if any two differ.
        """
        description: dict[str, Any] = {
            "method": self.method.describe(),
            "seed": self.seed,
            "optimizer": base,
            "parameters": self.flat.shapes,
            "step": self.t,
        }
        if not self._loaded:
            description["param_groups"] = options_of(groups)
            same = (
                "values of the parameters (seed all workers alike, or broadcast the parameters from"
                " rank 0)"
            )
            description[same] = fingerprint(self.flat.parameters)
        self.ledger.bytes["start"] += self.workers.agree(description)

    def exchange(self, gradients: Tensor, descend: Callable[[Tensor], Tensor]) -> State | None:
        """Run uplink, the server's step, and downlink; a collective.

        Args:
            gradients: at w_i, (d,).
            descend: the server's step, estimate (d,) -> x+ (d,).

        Returns:
            The next state; None if the step was vetoed.
        """
        with full_precision(self.flat.device):
            state = self.method.step(
                self.state, gradients[None], self._context(), self._transport, descend
            )
        self.ledger.close(state is not None)
        return state

    def move_to(self, state: State) -> None:
        """Take the next state over; the parameters become the new w_i."""
        self.state, self.t = state, self.t + 1
        self._write_point()

    def _write_point(self) -> None:
        self.flat.write(self.method.points(self.state)[0])

    def server_vector(self) -> Tensor:
        """Return x, (d,), on every rank; a collective."""
        own = self.state["w"][0]
        if self.workers.group.size == 1 or self.t == 0:
            return self.state.get("x", own)
        x = self.state.get("x", torch.empty_like(own))
        return self._transport.from_server(x.to(self.flat.device), "asked")

    def saved(self) -> dict[str, Any]:
        """Return what a state dict holds of this party; see `saved`."""
        return {
            "format": FORMAT,
            "method": self.method.json_name,
            "seed": self.seed,
            "t": self.t,
            "rank": self.workers.group.rank,
            "n": self.workers.group.size,
            "shapes": self.flat.shapes,
            "tensors": dict(self.state),
        }

    def restore(self, agreed: Agreed | None) -> None:
        """Go on from what was loaded, None for a plain optimizer's state; w_i goes into
        the parameters. A collective.
        """
        self.workers.agreed = False
        self._loaded = agreed is not None
        if agreed is None:
            self.t = 0
            self.state = self.method.start(self.flat.read(), self._context())
            return
        self.t, self.seed = agreed.t, agreed.seed
        tensors = {name: tensor.to(self.flat.device) for name, tensor in agreed.tensors.items()}
        self.state = tensors if agreed.exact else self._rejoined(tensors, agreed.server_state)
        self._write_point()

    def _rejoined(self, tensors: State, names: list[str]) -> State:
        """Return the state that follows from what rank 0 holds; a collective."""
        like = torch.empty(self.flat.d, dtype=self.flat.dtype, device=self.flat.device)
        server = {
            name: self._transport.from_server(tensors[name] if self.is_server else like, "start")
            for name in names
        }
        if self.is_server:
            _log.warning(
                "the workers start from the server's x: the state was not saved by these very"
                " workers"
            )
        return self.method.rejoin(server, self._context())
