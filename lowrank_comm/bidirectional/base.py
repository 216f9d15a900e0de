"""A bidirectional method: a generator that asks for messages between workers and a
server, and computes in between.

The server holds x, worker i a point w_i of its own; all are vectors of d numbers. Every
step has one order:

    workers   gradients at their own points, given to the method
    uplink    Up(vectors, compressor) -> Sent: the server gets mean_i C_i(v_i)
    server    Descend(estimate) -> x+: a step of any optimizer on x
    downlink  Down(change, blocks) -> Q_i(x+ - x) for this party's workers,
              or, on a shared coin, Broadcast(x+) -> x+

A *party* is what runs in one place: `W` workers, numbered in `Context.workers`, and
perhaps the server. Over a process group a party is one rank with one worker, and rank 0
is the server too; the simulation is a single party of all n workers and the server, so
that the same lines of a method work on (n, d) tensors there. On a party without the
server, its tensors (x, the estimate, the change) are None. A method never sees a
process, nor which kind of party it runs in.

Rules that make this correct:
- A coin, a permutation, a subset of coordinates is drawn from (seed, t, purpose[,
  worker]), so no index is ever sent.
- There is one `Up` in a step. With it every worker tells whether its numbers are
  finite; if they are not, the step ends there on all parties, the server has not moved,
  and the state is the one from before.
- The state is never changed in place: a step returns the next one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lowrank_comm.bidirectional.permk import Blocks, PermK
from lowrank_comm.bidirectional.randk import RandK
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.randomness import stream
from lowrank_comm.options import Advice, PositiveInt, Share, check_options

State = dict[str, Tensor]
"""x and others of the server: (d,), where the party has the server; w and others of the
workers: (W, d).
"""


@dataclass(frozen=True)
class Up:
    """Request: workers send C_i(vectors_i) to the server. The answer is `Sent`.

    Attributes:
        vectors: (W, d).
        compressor: C.
    """

    vectors: Tensor
    compressor: RandK


@dataclass(frozen=True)
class Sent:
    """Answer to `Up`.

    Attributes:
        own: C_i(v_i) of this party's workers, (W, d).
        mean: mean of C_i(v_i) over all n workers, (d,); None where there is no server.
    """

    own: Tensor
    mean: Tensor | None


@dataclass(frozen=True)
class Descend:
    """Request: the server's optimizer steps from x along the estimate of the gradient.
    The answer is x+, or None on a party without the server.

    Attributes:
        estimate: (d,); None without the server.
    """

    estimate: Tensor | None


@dataclass(frozen=True)
class Down:
    """Request: the server sends Q_i(change) to worker i. The answer is Q_i(change) of
    this party's workers, (W, d).

    Attributes:
        change: (d,); None on a party without the server.
        blocks: the draw that defines Q_i.
    """

    change: Tensor | None
    blocks: Blocks


@dataclass(frozen=True)
class Broadcast:
    """Request: the server sends a vector whole to all workers. The answer is that
    vector.

    Attributes:
        vector: (d,); None on a party without the server.
    """

    vector: Tensor | None


Request = Up | Descend | Down | Broadcast
Steps = Generator[Request, Any, State]


@dataclass(frozen=True)
class Context:
    """What a method knows beside its numbers.

    Attributes:
        seed: of the run, equal everywhere.
        t: step, from 0.
        n: number of workers in all.
        d: length of the vectors.
        workers: numbers of this party's workers, in the order of the rows of its (W, d)
            tensors.
        serves: whether the server is here.
        device: of the vectors.
    """

    seed: int
    t: int
    n: int
    d: int
    workers: tuple[int, ...]
    serves: bool
    device: torch.device

    def coin(self, purpose: str, p: float) -> bool:
        """Return True with probability p; the same on all parties."""
        if p >= 1.0:
            return True
        drawn = stream(self.seed, "bidirectional", self.t, purpose)
        return bool(torch.rand((), generator=drawn, dtype=torch.float32, device="cpu") < p)


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
        state = {"w": x.expand(len(context.workers), -1).clone()}
        return {"x": x.clone(), **state} if context.serves else state

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
        self, state: State, gradients: Tensor, context: Context
    ) -> Generator[Request, Any, tuple[Tensor | None, State]]:
        """Run the uplink for gradients at `points`, (W, d); return the server's
        estimate, (d,), and the part of the state that changes by it.
        """

    def moved(self, state: State) -> State:
        """Return the state with everything that depends on w_i updated, after w_i has
        changed.
        """
        return state

    def step(self, state: State, gradients: Tensor, context: Context) -> Steps:
        """Make one step; see the module's text.

        Args:
            state: of this party.
            gradients: at `points(state)`, (W, d).
            context: of the step.

        Returns:
            The next state.
        """
        estimate, remembered = yield from self.estimate(state, gradients, context)
        x = state.get("x")
        x_next: Tensor | None = yield Descend(estimate)
        if context.coin("downlink coin", self.probability(context.n)):
            whole: Tensor = yield Broadcast(x_next)
            w = whole.expand_as(state["w"]).clone()
        else:
            change = None if x is None or x_next is None else x_next - x
            blocks = PermK(self.groups(context.n)).draw(
                context.seed, context.t, context.n, context.d
            )
            received: Tensor = yield Down(change, blocks)
            w = state["w"] + received
        server = {} if x_next is None else {"x": x_next}
        return self.moved({**state, **remembered, **server, "w": w})

    def describe(self) -> dict[str, Any]:
        """Return plain settings by name, which the workers compare at first."""
        return {"compressor": self.json_name} | asdict(self)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings, in constructor and configuration files."""
        return [option.name for option in fields(cls)]


class Transport(abc.ABC):
    """Carries the messages of a step between parties."""

    @abc.abstractmethod
    def up(self, request: Up, context: Context, finite: bool) -> Sent | None:
        """Answer `Up`; None on all parties, if some worker's numbers or the mean are
        not finite.
        """

    @abc.abstractmethod
    def down(self, request: Down, context: Context, like: Tensor) -> Tensor:
        """Answer `Down`; `like` has dtype and device of the vectors."""

    @abc.abstractmethod
    def broadcast(self, vector: Tensor | None, like: Tensor) -> Tensor:
        """Send the server's vector to every party; `like` has its shape and dtype."""


def drive(
    method: Method,
    state: State,
    gradients: Tensor,
    context: Context,
    transport: Transport,
    descend: Callable[[Tensor], Tensor],
) -> State | None:
    """Carry out one step of this party.

    Args:
        method: the method whose step it is.
        state: of this party.
        gradients: at `method.points(state)`, (W, d).
        context: of the step.
        transport: answers requests.
        descend: the server's optimizer: estimate (d,) -> x+ (d,); called where the
            server is, in steps that are not vetoed.

    Returns:
        The next state; None, if the step was vetoed on all parties.
    """
    finite = bool(torch.isfinite(gradients).all())
    steps = method.step(state, gradients, context)
    answer: Any = None
    try:
        while True:
            request = steps.send(answer)
            if isinstance(request, Up):
                answer = transport.up(request, context, finite)
                if answer is None:
                    steps.close()
                    return None
            elif isinstance(request, Descend):
                answer = None if request.estimate is None else descend(request.estimate)
            elif isinstance(request, Down):
                answer = transport.down(request, context, gradients[0])
            else:
                answer = transport.broadcast(request.vector, gradients[0])
    except StopIteration as end:
        result: State = end.value
        return result
