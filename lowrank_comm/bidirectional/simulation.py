"""n workers and the server in one process, on (n, d) tensors: the same methods, with
the ledger and the simulated clock.
"""

from __future__ import annotations

from torch import Tensor

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.ledger import Clock, LinkLedger
from lowrank_comm.bidirectional.transport import Context, Transport
from lowrank_comm.errors import ConfigError


class BidirectionalSimulation:
    """A method with n workers in this process; the server steps by plain SGD.

    Args:
        method: e.g. `InkheartSGD(downlink_groups=8)`.
        x: (d,) starting point, whose dtype and device are used throughout.
        workers: n.
        gamma: step size.
        seed: of the draws.
        clock: counts simulated seconds; None for one with h = 1, kappa = 0.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> import torch
        >>> from lowrank_comm.bidirectional import BidirectionalSimulation, MarinaP
        >>> method = MarinaP(downlink_groups=2)
        >>> x = torch.ones(6)
        >>> simulation = BidirectionalSimulation(method, x, workers=4, gamma=0.5)
        >>> for _ in range(40):
        ...     _ = simulation.step(simulation.points)  # gradients of ||x||^2/2
        >>> bool(simulation.x.norm() < 1e-3)
        True
    """

    def __init__(
        self,
        method: Method,
        x: Tensor,
        workers: int,
        *,
        gamma: float,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers={workers} must be at least 1.")
        if not gamma > 0:
            raise ConfigError(f"gamma={gamma} must be above 0.")
        method.groups(workers)
        self.method, self.gamma, self.seed, self.t = method, gamma, seed, 0
        self.n, self.clock, self.ledger = workers, clock or Clock(), LinkLedger()
        self._transport, self._d = Transport(self.ledger), x.numel()
        self.state: State = method.start(x, self._context())

    def _context(self) -> Context:
        return Context(self.seed, self.t, self.n, self._d, tuple(range(self.n)))

    @property
    def x(self) -> Tensor:
        """The server's point, (d,)."""
        return self.state["x"]

    @property
    def points(self) -> Tensor:
        """Where each worker computes its next gradient, (n, d)."""
        return self.method.points(self.state)

    def step(self, gradients: Tensor, batch: int = 1) -> bool:
        """Make one step of all workers and the server.

        Args:
            gradients: (n, d), worker i's at `points[i]`.
            batch: how many stochastic gradients each of them averages, for the clock.

        Returns:
            False if some number was not finite; nothing has changed then but ledger and
            clock.
        """
        before = self.ledger.up + self.ledger.down
        state = self.method.step(
            self.state, gradients, self._context(), self._transport, self._descend
        )
        self.clock.step(batch, self.ledger.up + self.ledger.down - before)
        self.ledger.close(state is not None)
        if state is None:
            return False
        self.state, self.t = state, self.t + 1
        return True

    def _descend(self, estimate: Tensor) -> Tensor:
        return self.state["x"] - self.gamma * estimate
