"""Error feedback as an axis of its own: what a worker does with the part of its gradient that a compressor did not send.

    form         compressed is                 all apply                       needs             what a worker keeps
    none         g                             mean C(g_i)                     unbiased C        nothing
    ef14         Delta = g + e                 mean C(Delta_i)                 contractive C     e <- Delta - C(Delta)
    ef21         g - y                         y_bar <- y_bar + mean C         contractive C     y <- y + C(g - y)
    ef21_sgdm    v - y, v <- (1-a) v + a g     y_bar <- y_bar + mean C         contractive C     v, and y <- y + C(v - y)

`ef14` is the papers' form (7a of arXiv 2509.11254), and lives in the reducer, where Delta is formed (`error_feedback`). The
others need no error memory: they are compressors around a compressor, and y and v are their state. Checkpoints keep these as
they keep errors: whole, and each worker's own as the mean, of which y_bar is the mean again.

EF21 with one y. Where C is linear and its subspace shared, mean C(g_i - y_i) = C(g_bar - y_bar), so that all workers may
keep the same y = y_bar: c_i = C(g_i - y). The trajectory is the same, and y is right for any worker at any world size. Where
C is not linear (ATOMO, quantised factors), each worker keeps its own y_i beside y_bar.

`rounds` = p repeats the compressor on what it left, R_0 = Delta, R_{k+1} = R_k - C_k(R_k), each round with draws and a
state of its own, and sends all parts: the rest is (1 - delta)^p of Delta. NEOLITHIC calls that fast compressed
communication. A restart that sends the whole matrix (GreedyLore's) leaves nothing to repeat, and serves all rounds.

Sources: Seide et al. 2014 (EF14); Richtarik, Sokolov, Fatkhullin, arXiv 2106.05203 (EF21); Fatkhullin, Tyurin, Richtarik,
arXiv 2305.15155 (EF21-SGDM); Huang et al., arXiv 2206.03665 (NEOLITHIC).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .compressors.base import Compressor, Context, Delta, LowRank, Result, State, Steps
from .error_feedback import ErrorFeedback
from .restart import Past, RestartSchedule


def with_feedback(compressor: Compressor, feedback: ErrorFeedback, linear: bool) -> Compressor:
    """The compressor as the reducer runs it: in rounds, and inside EF21, if these are asked for.

    Args:
        compressor: the scheme.
        feedback: with its form resolved.
        linear: whether the scheme is linear with all that is around it (codes on the wire are not).
    """
    scheme: Compressor = compressor
    if feedback.rounds > 1:
        scheme = Rounds(scheme, feedback.rounds)
    if feedback.form in ("ef21", "ef21_sgdm"):
        scheme = EF21(scheme, feedback.momentum if feedback.form == "ef21_sgdm" else None, shared=linear)
    return scheme


def dense(part: LowRank | Tensor) -> Tensor:
    """(B, m, n)."""
    return part.dense() if isinstance(part, LowRank) else part


class _Around(Compressor):
    """A compressor around another one, which says what it is unless told otherwise."""

    def __init__(self, inner: Compressor) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "rank", inner.rank)

    inner: Compressor

    @property
    def json_name(self) -> str:  # type: ignore[override]
        return self.inner.json_name

    @property
    def low_rank(self) -> bool:  # type: ignore[override]
        return self.inner.low_rank

    @property
    def gathers(self) -> bool:  # type: ignore[override]
        return self.inner.gathers

    def elements(self, m: int, n: int, r: int) -> int:
        return self.inner.elements(m, n, r)

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return self.inner.restart_elements(m, n, r)

    def turn(self, past: Past, restart: bool) -> int:
        return self.inner.turn(past, restart)

    def elements_in(self, m: int, n: int, r: int, turn: int, restart: bool) -> int:
        return self.inner.elements_in(m, n, r, turn, restart)

    def schedule(self, costs: dict[str, int]) -> RestartSchedule | None:
        return self.inner.schedule(costs)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        return self.inner.initial_state(context, m, n, like)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


class Rounds(_Around):
    """p rounds on what is left.

    C(Delta) = sum_k C_k(R_k),  R_0 = Delta,  R_{k+1} = R_k - C_k(R_k)
    """

    def __init__(self, inner: Compressor, rounds: int) -> None:
        super().__init__(inner)
        object.__setattr__(self, "rounds", rounds)

    rounds: int

    def elements(self, m: int, n: int, r: int) -> int:
        return self.rounds * self.inner.elements(m, n, r)

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return self._rounds_of(True) * self.inner.restart_elements(m, n, r)

    def elements_in(self, m: int, n: int, r: int, turn: int, restart: bool) -> int:
        return self._rounds_of(restart) * self.inner.elements_in(m, n, r, turn, restart)

    def _rounds_of(self, restart: bool) -> int:
        return 1 if restart and self.inner.whole_restarts else self.rounds

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        state: State = {}
        for k in range(self.rounds):
            state |= _of_round(k, self.inner.initial_state(replace(context, round=k), m, n, like))
        return state

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        parts: list[Result] = []
        state_after: State = {}
        rest, kept = delta.tensor, False
        for k in range(self._rounds_of(context.restart)):
            own = _own_of_round(k, state)
            result: Result = yield from self.inner.step(Delta(rest), own, replace(context, round=k))
            kept |= result.kept is not None
            rest = rest - dense(result.sent) if result.kept is None else result.kept
            state_after |= _of_round(k, result.state)
            parts.append(result)
        for k in range(len(parts), self.rounds):  # copies: what is handed out may be written into
            state_after |= _of_round(k, {symbol: tensor.clone() for symbol, tensor in parts[0].state.items()})
        applied, sent = _sum([part.applied for part in parts]), _sum([part.sent for part in parts])
        return Result(applied, sent, state_after, kept=rest if kept else None)


ROUND = "_round"
"""Between a symbol and the number of its round, from the second round (1) on; no compressor's own symbol has it."""


def _of_round(k: int, state: State) -> State:
    """The state of round k under the names that it has beside the others'."""
    return state if k == 0 else {f"{symbol}{ROUND}{k}": tensor for symbol, tensor in state.items()}


def _own_of_round(k: int, state: State) -> State:
    """Its inverse: what round k finds among the states of all rounds, under its own names."""
    if k == 0:
        return {symbol: tensor for symbol, tensor in state.items() if ROUND not in symbol}
    end = f"{ROUND}{k}"
    return {symbol.removesuffix(end): tensor for symbol, tensor in state.items() if symbol.endswith(end)}


def _sum(parts: list[LowRank | Tensor]) -> LowRank | Tensor:
    """The sum; of low-rank parts, in factors."""
    if all(isinstance(part, LowRank) for part in parts):
        low = [part for part in parts if isinstance(part, LowRank)]
        return LowRank(torch.cat([part.p for part in low], dim=-1), torch.cat([part.q for part in low], dim=-1))
    total = dense(parts[0])
    for part in parts[1:]:
        total = total + dense(part)
    return total


class EF21(_Around):
    """The compressor tracks the gradient: it is given the difference to an estimate y that all know.

    c_i = C(x_i - y_i);  y_i <- y_i + c_i;  y_bar <- y_bar + mean c_i = applied;  x_i = g_i, or v_i <- (1-a) v_i + a g_i

    Args:
        inner: a contractive compressor.
        momentum: a in (0, 1], or None for x_i = g_i.
        shared: one y for all workers, for a linear compressor.

    Source: EF21, arXiv 2106.05203; EF21-SGDM, arXiv 2305.15155, Algorithm 1, from y = 0 and v = the first gradient.
    """

    def __init__(self, inner: Compressor, momentum: float | None, shared: bool) -> None:
        super().__init__(inner)
        object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "shared", shared)

    momentum: float | None
    shared: bool
    symbols: ClassVar[tuple[str, ...]] = ("y", "y_mean", "v", "v_started")
    once: ClassVar[tuple[str, ...]] = ("v_started",)

    @property
    def private(self) -> tuple[str, ...]:  # type: ignore[override]
        return (() if self.shared else ("y",)) + (() if self.momentum is None else ("v",))

    @property
    def model_shaped(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("y",) + (() if self.shared else ("y_mean",)) + (() if self.momentum is None else ("v",))

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        rows = len(range(m)[context.rows])
        zeros = like.new_zeros(len(context.names), rows, n)
        own: State = {"y": zeros}
        if not self.shared:
            own["y_mean"] = zeros.clone()
        if self.momentum is not None:
            own |= {"v": zeros.clone(), "v_started": like.new_zeros(len(context.names), 1, 1)}
        return own | self.inner.initial_state(context, m, n, like)

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        own = {symbol: state[symbol] for symbol in self.symbols if symbol in state}
        inner = {symbol: tensor for symbol, tensor in state.items() if symbol not in own}
        after: State = {}
        x = delta.tensor
        if self.momentum is not None:
            started = own["v_started"] > 0
            x = torch.where(started, torch.lerp(own["v"], x, self.momentum), x)
            after |= {"v": x, "v_started": torch.ones_like(own["v_started"])}
        result: Result = yield from self.inner.step(Delta(x - own["y"]), inner, context)
        if self.shared:
            applied = sent = own["y"] + dense(result.applied)
            after["y"] = applied
        else:
            sent = own["y"] + dense(result.sent)
            applied = own["y_mean"] + dense(result.applied)
            after |= {"y": sent, "y_mean": applied}
        return Result(applied, sent, after | result.state)
