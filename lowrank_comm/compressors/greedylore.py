"""GreedyLore: a basis that is refreshed every tau steps, from which each step takes
the r columns that capture most of the gradient.

Source: GreedyLore (Chen, He, Li, Jia, Yuan; arXiv 2507.08784): the semi-lazy update of
the subspace and the approximate global top-r. Only the abstract was at hand; the
algorithm is built as `greedy_basis` and this text say. With U on the short side, here
that of the columns (m >= n, s = n, l = m):

    t mod tau == 0:
        D = mean of Delta_i                    the whole matrix is sent: m n elements
        U = right singular vectors of D        s x c, computed on one worker: s c
        applied = D,  sent_i = Delta_i         the error memory is empty afterwards
    else:
        V = U[:, J], J by scores               probes * c elements
        F = mean of Delta_i V                  l r elements
        applied = F V^T,  sent_i = Delta_i V V^T

A refresh applies the gradient and the error together: an error memory that is cleared
without having been sent loses what was in it.

With the whole basis, c = s, each step captures at least r / s of the energy in
expectation, refresh or not, and however old the basis is: its columns span everything,
and the choice is better than a uniformly random one. A capped basis (`basis`; see
`greedy_basis` for what it saves) keeps that bound for what it spans only; the rest
waits for the refresh. The error is bounded all the same, since the refresh empties it:
E||mean error||^2 <= tau^2 G^2, without any delta. That is why the cap is the default:
the bound does not need the whole basis, and a matrix of 4096 x 4096 would pay 64 MiB
and a decomposition of that size for it.

`explore=k` makes the last k of the c columns random ones from the complement of U,
drawn in each step from (seed, name, t), for no bytes: then every step captures at least
(r / c) k / (s - c + k) of all there is, in expectation, and what the basis has missed
goes out sooner if it is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    Result,
    State,
    Steps,
)
from lowrank_comm.compressors.greedy_basis import (
    CAP,
    Columns,
    basis_columns,
    check_basis,
    find_basis,
    greedy_choice,
    initial_basis,
    score_elements,
)
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.compressors.subspaces import basis_on_rows, project
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import PositiveInt


@dataclass(frozen=True)
class GreedyLore(Compressor):
    """Projection on the approximately best r columns of a basis that is refreshed every
    tau steps.

    applied = mean(Delta_i) V V^T, V = the r columns of U with the largest averaged
    scores; at a refresh, mean(Delta_i)

    Args:
        rank: r; cut to min(m, n) matrix by matrix.
        restart_every: tau in steps; the first step (t = 0) is a refresh.
        probes: Gaussian probes a column, averaged over the workers before they are
            squared. One is the paper's; four capture most of what the exact top-r
            would.
        basis: columns c of the basis, s = min(m, n): a number, or "full" for s; null
            for min(s, 32 r).
        explore: how many of the c columns are drawn again from the complement of the
            others in each step, at no bytes; less than c. Without effect where c = s.
        stagger: spread the refreshes of the matrices over the period (all refresh at t
            = 0).

    Raises:
        ConfigError: a value is out of range, or options contradict one another.

    Example:
        >>> from lowrank_comm import GreedyLore
        >>> greedy = GreedyLore(rank=4, restart_every=200)
        >>> greedy.elements(m=1000, n=500, r=4)
        4128
        >>> greedy.restart_elements(m=1000, n=500, r=4)
        564000

    Source: arXiv 2507.08784.
    """

    restart_every: PositiveInt = 200
    probes: PositiveInt = 1
    basis: Columns = None
    explore: Annotated[int, Field(ge=0)] = 0
    stagger: bool = False

    json_name = "greedylore"
    whole_restarts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis("GreedyLore", self.basis, self.rank)
        if self.explore and self.basis == "full":
            raise ConfigError(
                f'GreedyLore: explore={self.explore} has no effect with basis="full", which has no'
                " complement; leave one of the two out."
            )
        columns = CAP * self.rank if self.basis is None else self.basis
        if isinstance(columns, int) and self.explore >= columns:
            raise ConfigError(
                f"GreedyLore: explore={self.explore} leaves no column of the basis of {columns};"
                f" use less than {columns}."
            )

    def elements(self, m: int, n: int, r: int) -> int:
        columns = basis_columns(self.basis, min(m, n), r)
        return r * max(m, n) + score_elements(columns, r, self.probes)

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return m * n + min(m, n) * self._kept_columns(min(m, n), r)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        s = min(m, n)
        return {"U": initial_basis(context, s, self._kept_columns(s, context.rank), like)}

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        u = state["U"]
        if context.restart:
            d, own = yield Mean(delta.tensor, "restart")
            u = yield from find_basis(d, context, u.shape[-1])
            return Result(applied=d, sent=own, state={"U": u})
        missing = basis_columns(self.basis, u.shape[1], context.rank) - u.shape[-1]
        candidates = _with_complement(u, context, missing)
        v = yield from greedy_choice(delta, candidates, context, self.probes)
        applied, sent = yield from project(delta, v, basis_on_rows(*delta.shape[-2:]))
        return Result(applied, sent, {"U": u})

    def _kept_columns(self, s: int, r: int) -> int:
        """Count the columns of the basis that come from the refresh."""
        columns = basis_columns(self.basis, s, r)
        return columns if columns == s else max(1, columns - self.explore)


def _with_complement(u: Tensor, context: Context, count: int) -> Tensor:
    """Append `count` random orthonormal columns from the complement of U."""
    if count == 0:
        return u
    more = context.draw("explore", (u.shape[1], count), u)
    # twice, since once leaves round-off behind
    for _ in range(2):
        more, _ = torch.linalg.qr(more - u @ (u.mT @ more))
    return torch.cat([u, more], dim=-1)
