"""EF21, and where each form of error feedback is carried out: what a worker does with
the part of its gradient that a compressor did not send.

    form       compressed                  applied                  needs C      kept
    none       g                           mean C(g_i)              unbiased     -
    ef14       Delta = g + e               mean C(Delta_i)          contractive  e
    ef21       g - y                       y_bar <- y_bar + mean C  contractive  y
    ef21_sgdm  v - y, v <- (1-a) v + a g   y_bar <- y_bar + mean C  contractive  y, v

    ef14:                 e <- Delta - C(Delta)
    ef21 and ef21_sgdm:   y <- y + C(what is compressed)

`ef14` is the papers' form (7a of arXiv 2509.11254); the reducer carries it out, where
Delta is formed (see `memory`). The others need no error memory: they are compressors
around a compressor, and y and v are their state. Checkpoints keep these as they keep
errors: whole, and each worker's own as the mean, of which y_bar is the mean again.

EF21 with one y. Where C is linear and its subspace shared, mean C(g_i - y_i) = C(g_bar
- y_bar), so that all workers may keep the same y = y_bar: c_i = C(g_i - y). The
trajectory is the same, and y is right for any worker at any world size. Where C is not
linear (ATOMO, quantized factors), each worker keeps its own y_i beside y_bar.

Sources: Seide et al. 2014 (EF14); Richtarik, Sokolov, Fatkhullin, arXiv 2106.05203
(EF21); Fatkhullin, Tyurin, Richtarik, arXiv 2305.15155 (EF21-SGDM).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Compressor, Context, Delta, Result, State, Steps
from lowrank_comm.compressors.requests import Request
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.error_feedback.rounds import Around, Rounds, dense


def with_feedback(compressor: Compressor, feedback: ErrorFeedback, linear: bool) -> Compressor:
    """Return the compressor as the reducer runs it: in rounds, and inside EF21, if
    these are asked for.

    Args:
        compressor: the compressor alone.
        feedback: with its form resolved.
        linear: whether the compressor is linear with all that is around it
            (quantization is not).
    """
    scheme: Any = compressor
    if feedback.rounds > 1:
        scheme = Rounds(scheme, feedback.rounds)
    if feedback.form in ("ef21", "ef21_sgdm"):
        scheme = EF21(
            scheme, feedback.momentum if feedback.form == "ef21_sgdm" else None, shared=linear
        )
    return scheme  # type: ignore[no-any-return]


class EF21(Around):
    """The compressor tracks the gradient: it is given the difference to an estimate y
    that all workers know.

    c_i = C(x_i - y_i),  y_i <- y_i + c_i,  y_bar <- y_bar + mean c_i = applied,
    x_i = g_i, or v_i <- (1-a) v_i + a g_i

    Args:
        inner: a contractive compressor.
        momentum: a in (0, 1], or None for x_i = g_i.
        shared: one y for all workers, for a linear compressor.

    Source: EF21, arXiv 2106.05203; EF21-SGDM, arXiv 2305.15155, Algorithm 1, from y = 0
    and v = the first gradient.
    """

    def __init__(self, inner: Compressor, momentum: float | None, shared: bool) -> None:
        super().__init__(inner)
        self.momentum, self.shared = momentum, shared
        v = () if momentum is None else ("v",)
        self.private = v if shared else ("y", *v)
        self.parameter_shaped_state = ("y", *v) if shared else ("y", "y_mean", *v)

    symbols: ClassVar[tuple[str, ...]] = ("y", "y_mean", "v", "v_started")
    replicated_state = ("v_started",)
    tracks = True

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
        inner = {symbol: tensor for symbol, tensor in state.items() if symbol not in self.symbols}
        after: State = {}
        x = delta.tensor
        if self.momentum is not None:
            started = state["v_started"] > 0
            x = torch.where(started, torch.lerp(state["v"], x, self.momentum), x)
            after |= {"v": x, "v_started": torch.ones_like(state["v_started"])}
        result: Result = yield from self.inner.step(Delta(x - state["y"]), inner, context)
        assert result.sent is not None
        if self.shared:
            applied = sent = state["y"] + dense(result.applied)
            after["y"] = applied
        else:
            sent = state["y"] + dense(result.sent)
            applied = state["y_mean"] + dense(result.applied)
            after |= {"y": sent, "y_mean": applied}
        return Result(applied, sent, after | result.state)

    def follow(
        self, mean: Tensor, own: Tensor, state: State, context: Context
    ) -> Generator[Request, Any, State]:
        """After an average of whole matrices the estimates are what they estimate: y_i
        <- x_i, y_bar <- mean of x_i, where v is an average over time of what y_bar
        follows too. The inner compressor follows the change of y_bar.
        """
        inner = {symbol: tensor for symbol, tensor in state.items() if symbol not in self.symbols}
        known = state["y"] if self.shared else state["y_mean"]
        x, x_mean, after = own.clone(), mean.clone(), dict[str, Tensor]()
        if self.momentum is not None:
            started = state["v_started"] > 0
            x = torch.where(started, torch.lerp(state["v"], x, self.momentum), x)
            x_mean = torch.where(started, torch.lerp(known, x_mean, self.momentum), x_mean)
            after = {"v": x, "v_started": torch.ones_like(state["v_started"])}
        after |= {"y": x_mean} if self.shared else {"y": x.clone(), "y_mean": x_mean}
        change = x_mean - known
        return after | (yield from self.inner.follow(change, change, inner, context))
