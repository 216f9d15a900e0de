"""A bidirectional method: messages between workers and a server, and what is computed
in between.

The server holds x, worker i a point w_i of its own; all are vectors of d numbers. Every
step has one order:

    workers   gradients at their own points, given to the method
    uplink    `Transport.up`: the server gets mean_i C_i(v_i)
    server    `Transport.serve`: x+ = a step of any optimizer on x, along the method's
              estimate
    downlink  `Transport.down`: Q_i(x+ - x) for this party's workers,
              or, on a shared coin, `Transport.broadcast`: x+ for all

A *party* is what runs in one place: `W` workers, numbered in `Context.workers`, and
perhaps the server. Over a process group a party is one rank with one worker, and rank 0
is the server too; the simulation is a single party of all n workers and the server, so
that the same lines of a method work on (n, d) tensors there. On a party without the
server, its tensors (x, the estimate, the change) are None. A method never sees a
process, nor which kind of party it runs in.

Rules that make this correct:
- A coin, a permutation, a subset of coordinates is drawn from (seed, t, purpose[,
  worker]), so no index is ever sent.
- There is one uplink in a step. With it every worker tells whether its numbers are
  finite; if they are not, the server does not move, the step ends on all parties, and
  the state is the one from before.
- The state is never changed in place: a step returns the next one.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lowrank_comm.bidirectional.permk import PermK
from lowrank_comm.bidirectional.transport import Context, Transport, Uplink, Vetoed
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import Advice, PositiveInt, Share, check_options

State = dict[str, Tensor]
"""x and others of the server: (d,), where the party has the server; w and others of the
workers: (W, d).
"""


def known(**tensors: Tensor | None) -> State:
    """Return those that this party has: without the server, some are None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class Method(abc.ABC):
    """A bidirectional method. It is immutable: its driver keeps the state.

    With probability p the server sends x+ whole, and w_i+ = x+; otherwise w_i+ = w_i +
    Q_i(x+ - x), where Q_i is grouped PermK with G blocks.

    Args:
        downlink_groups: G, 1 for a dense downlink; null for the largest divisor of n
            that is at most 8.
        sync_probability: p in (0, 1]; null for 1/G, with which a step sends at most 2
            d/G coordinates in the mean.

    Class attributes:
        json_name: name in configuration files.
        server_state: names of what the server alone holds, x first.

    Raises:
        ConfigError: a value that cannot work.
    """

    downlink_groups: Annotated[PositiveInt | None, Advice("write for example 4, or None")] = None
    sync_probability: Annotated[Share | None, Advice("without dense rounds points drift")] = None

    json_name: ClassVar[str]
    server_state: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        check_options(self, f"{type(self).__name__}: ")

    def groups(self, n: int) -> int:
        """Return G for n workers.

        Raises:
            ConfigError: G is larger than n.
        """
        if self.downlink_groups is None:
            return max(g for g in range(1, min(n, 8) + 1) if n % g == 0)
        if self.downlink_groups > n:
            raise ConfigError(
                f"{type(self).__name__}: downlink_groups={self.downlink_groups} is more than the"
                f" {n} worker(s) there are, and some block would reach nobody; use downlink_groups"
                f" of at most {n}, or None."
            )
        return self.downlink_groups

    def probability(self, n: int) -> float:
        """Return p for n workers."""
        return 1.0 / self.groups(n) if self.sync_probability is None else self.sync_probability

    def downlink_omega(self, n: int) -> float:
        """Return omega of Q_i, which is G - 1 where G divides n."""
        return PermK(self.groups(n)).omega(n)

    def start(self, x: Tensor, context: Context) -> State:
        """Return the state before the first step, with every worker at x, (d,)."""
        server = {"x": x.clone()} if context.serves else {}
        return {**server, "w": x.expand(len(context.workers), -1).clone()}

    def rejoin(self, server: State, context: Context) -> State:
        """Return a valid state from what the server holds, for any number of workers:
        every worker is at x.

        Args:
            server: the tensors named by `server_state`, on every party.
            context: of the party.
        """
        return self.start(server["x"], context)

    def points(self, state: State) -> Tensor:
        """Return where this party's workers compute their next gradients, (W, d)."""
        return state["w"]

    @abc.abstractmethod
    def estimate(
        self, state: State, gradients: Tensor, context: Context, up: Uplink
    ) -> tuple[Tensor | None, State]:
        """Send up what follows from gradients at `points`, (W, d); return the server's
        estimate, (d,), and the part of the state that changes by it.
        """

    def moved(self, state: State) -> State:
        """Return the state with everything that depends on w_i updated, after w_i has
        changed.
        """
        return state

    def step(
        self,
        state: State,
        gradients: Tensor,
        context: Context,
        transport: Transport,
        descend: Callable[[Tensor], Tensor],
    ) -> State | None:
        """Make one step of this party; see the module's text.

        Args:
            state: of this party.
            gradients: at `points(state)`, (W, d).
            context: of the step.
            transport: carries the messages.
            descend: the server's optimizer: estimate (d,) -> x+ (d,); called where the
                server is, in steps that are not vetoed.

        Returns:
            The next state; None, if the step was vetoed on all parties.
        """
        finite = bool(torch.isfinite(gradients).all())
        up = functools.partial(transport.up, context, finite)
        estimate, remembered = self.estimate(state, gradients, context, up)
        try:
            x_next = transport.serve(estimate, descend, gradients[0])
        except Vetoed:
            return None
        if context.coin("downlink coin", self.probability(context.n)):
            whole = transport.broadcast(x_next, gradients[0])
            w = whole.expand_as(state["w"]).clone()
        else:
            change = None if x_next is None else x_next - state["x"]
            blocks = PermK(self.groups(context.n)).draw(
                context.seed, context.t, context.n, context.d
            )
            w = state["w"] + transport.down(context, change, blocks, gradients[0])
        return self.moved({**state, **remembered, **known(x=x_next), "w": w})

    def describe(self) -> dict[str, Any]:
        """Return plain settings by name, which the workers compare at first."""
        return {"compressor": self.json_name} | asdict(self)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings, in constructor and configuration files."""
        return [option.name for option in fields(cls)]
