"""Several rounds of one compressor in a step: each round sends what the rounds before
it left.

R_0 = Delta, R_{k+1} = R_k - C_k(R_k), each round with draws and a state of its own, and
all parts are sent: the rest after p rounds is (1 - delta)^p of Delta. NEOLITHIC (Huang
et al., arXiv 2206.03665) calls that fast compressed communication. A restart that sends
the whole matrix (GreedyLore's) leaves nothing to repeat, and serves all rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Compressor, Context, Delta, LowRank, Result, State, Steps
from lowrank_comm.compressors.known_means import step_on_mean
from lowrank_comm.compressors.requests import Request


def dense(part: LowRank | Tensor) -> Tensor:
    """Return a part of a `Result` as (B, m, n)."""
    return part.dense() if isinstance(part, LowRank) else part


class Around:
    """Stands in for a compressor, and has all of its attributes but those that a
    subclass has itself.
    """

    # what is sent is no projection of Delta
    projects = False

    def __init__(self, inner: Compressor) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Rounds(Around):
    """Compresses in p rounds, each what the rounds before it left.

    C(Delta) = sum_k C_k(R_k),  R_0 = Delta,  R_{k+1} = R_k - C_k(R_k)
    """

    def __init__(self, inner: Compressor, rounds: int) -> None:
        super().__init__(inner)
        self.rounds = rounds

    def elements(self, m: int, n: int, r: int) -> int:
        return self.rounds * self.inner.elements(m, n, r)

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return self._rounds_of(True) * self.inner.restart_elements(m, n, r)

    def elements_in(self, m: int, n: int, r: int, variant: int, restart: bool) -> int:
        return self._rounds_of(restart) * self.inner.elements_in(m, n, r, variant, restart)

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
            assert result.sent is not None
            kept |= result.kept is not None
            rest = rest - dense(result.sent) if result.kept is None else result.kept
            state_after |= _of_round(k, result.state)
            parts.append(result)
        # copies: what is handed out may be written into
        for k in range(len(parts), self.rounds):
            state_after |= _of_round(
                k, {symbol: tensor.clone() for symbol, tensor in parts[0].state.items()}
            )
        applied = _sum([part.applied for part in parts])
        sent = _sum([part.sent for part in parts if part.sent is not None])
        return Result(applied, sent, state_after, kept=rest if kept else None)

    def follow(
        self, mean: Tensor, own: Tensor, state: State, context: Context
    ) -> Generator[Request, Any, State]:
        if not self.inner.follows_means:
            return {}
        return (yield from step_on_mean(self.step(Delta(mean), state, context))).state


ROUND = "_round"
"""Between a symbol of the state and the number of its round, from the second round (1)
on; no compressor's own symbol has it.
"""


def _of_round(k: int, state: State) -> State:
    """Rename the state of round k, so that it fits beside the other rounds'."""
    return state if k == 0 else {f"{symbol}{ROUND}{k}": tensor for symbol, tensor in state.items()}


def _own_of_round(k: int, state: State) -> State:
    """Find the state of round k among those of all rounds, under its own names."""
    if k == 0:
        return {symbol: tensor for symbol, tensor in state.items() if ROUND not in symbol}
    end = f"{ROUND}{k}"
    return {
        symbol.removesuffix(end): tensor for symbol, tensor in state.items() if symbol.endswith(end)
    }


def _sum(parts: list[LowRank | Tensor]) -> LowRank | Tensor:
    """Sum the parts; low-rank ones in factors."""
    low = [part for part in parts if isinstance(part, LowRank)]
    if len(low) == len(parts):
        return LowRank(
            torch.cat([part.p for part in low], dim=-1), torch.cat([part.q for part in low], dim=-1)
        )
    return functools.reduce(torch.add, map(dense, parts))
