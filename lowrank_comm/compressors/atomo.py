"""ATOMO: each worker sends a few singular triples of its own, drawn at random and
weighted so that their expectation is its matrix.

Source: ATOMO (Wang, Sievert, Charles, Liu, Wright, Papailiopoulos; arXiv 1806.04090),
spectral form, whose text was not at hand; what follows is self-contained. With the thin
SVD of each worker's own Delta_i = sum of s_k u_k v_k^T, s descending:

    p        probabilities of the atoms, sum p = min(r, number of s_k > 0)
    chosen   atom k with probability p_k, privately, from (seed, name, t, worker)
    sent_i   = sum over the chosen k of (s_k / p_k) u_k v_k^T      r (m + n) elements
    applied  = mean of sent_i      an all-gather: the parts cannot be summed on the way

Water-filling minimises the variance E||sent_i - Delta_i||^2 = sum s_k^2 (1 / p_k - 1) =
omega ||Delta_i||^2 at this sum: p_k is proportional to s_k, but where that exceeds 1 it
is 1 and the rest is shared among the others.

How atoms are drawn. "systematic": with one uniform u and the cumulative sums c_k of p,
atom k is chosen where an integer lies in (c_{k-1} - u, c_k - u]. The marginals are p_k
and the count is always min(r, number of s_k > 0), so every worker sends r atoms (zeros
in the place of missing ones) and nothing more. "bernoulli" is the paper's independent
draw, whose count varies: the workers gather their counts first, and every matrix is
padded to the largest. Cutting a draw to r atoms instead would make it biased. The
variance is the same for both, since atoms are orthogonal to one another.

Half of the weight goes into u_k, half into v_k. ATOMO is not linear: what a worker
sends depends on its own Delta_i. It is unbiased and needs no error feedback; with it,
the residual of an omega above 1 would grow. `contractive=True` divides what a worker
sends by its own 1 + omega, which makes
E||sent_i - Delta_i||^2 = (1 - 1 / (1 + omega)) ||Delta_i||^2.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    LowRank,
    Result,
    State,
    Steps,
)
from lowrank_comm.compressors.requests import Gather, Read, Request
from lowrank_comm.numerics.linalg import columns_of, or_one, thin_svd


@dataclass(frozen=True)
class Atomo(Compressor):
    """Unbiased sampling of singular triples, each worker of its own.

    applied = mean over i of sum_{k chosen by worker i} (s_k / p_k) u_k v_k^T,
    P(k chosen) = p_k by water-filling

    Args:
        rank: r, atoms a worker sends in expectation; cut to min(m, n) matrix by
            matrix.
        sampling: "systematic" (exactly r atoms) or "bernoulli" (independent draws,
            padded to the largest count).
        contractive: divide what a worker sends by its own 1 + omega, for error
            feedback.

    Raises:
        ConfigError: a value is unknown.

    Example:
        >>> from lowrank_comm import Atomo
        >>> Atomo(rank=2).elements(m=100, n=50, r=2)
        300

    Source: arXiv 1806.04090.
    """

    sampling: Literal["systematic", "bernoulli"] = "systematic"
    contractive: bool = False  # type: ignore[misc]

    json_name = "atomo"
    linear = False
    gathers = True

    def elements(self, m: int, n: int, r: int) -> int:
        """Return the exact count for systematic sampling; for independent draws, its
        expectation before padding.
        """
        return r * (m + n)

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        matrices = delta.tensor
        u, s, v = thin_svd(matrices, min(matrices.shape[-2:]))
        p = probabilities(s, context.rank)
        weights = s.double() / or_one(p)
        if self.contractive:
            weights = weights * _shrinkage(s, p)
        if self.sampling == "systematic":
            chosen = systematic(p, s, context.uniform("atoms", (1,), p, private=True))
            counts = [context.rank] * len(p)
        else:
            chosen = context.uniform("atoms", tuple(p.shape[1:]), p, private=True) < p
            everyones = yield Gather(chosen.sum(-1).to(torch.int32), "counts")
            counts = [max(1, int(count)) for count in (yield Read(everyones.amax(dim=0)))]
        first = torch.sort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True).indices[
            :, : max(counts)
        ]
        # Of a matrix that is not finite no atom may be chosen, and its vectors may be
        # finite: s vetoes the step.
        kept = torch.where(chosen, weights, torch.zeros_like(weights)).gather(
            1, first
        ).sqrt() + 0 * s.sum(-1, keepdim=True)
        atoms = torch.cat([columns_of(u, first), columns_of(v, first)], dim=1) * kept[
            :, None, :
        ].to(matrices.dtype)
        everyone = yield from _gathered(atoms, counts)
        own, m = everyone[context.worker], matrices.shape[1]
        together = everyone.permute(1, 2, 0, 3).flatten(2)
        return Result(
            applied=LowRank(together[:, :m], together[:, m:] / len(everyone)),
            sent=LowRank(own[:, :m], own[:, m:]),
            state={},
        )


def probabilities(s: Tensor, r: int) -> Tensor:
    """Return the probabilities of the atoms by water-filling: 1 for the j largest, else
    proportional to s_k, with sum min(r, active).

    j is the least number with (r - j) s_{j+1} <= sum of s_k, k > j; for these
    p_k = (r - j) s_k / that sum.

    Args:
        s: (B, k) singular values, descending, not negative.
        r: atoms, r <= k.

    Returns:
        (B, k) float64; positive exactly where s is (but for underflow).
    """
    s = s.double()
    s = s / or_one(s[:, :1])
    places = torch.arange(s.shape[-1], device=s.device)
    left = (r - places).clamp_min(0).double()
    rest = s.flip(-1).cumsum(-1).flip(-1)
    # the first; there is one below r
    full = (left * s <= rest).to(torch.uint8).argmax(dim=-1, keepdim=True)
    shared, over = left.expand_as(s).gather(1, full), rest.gather(1, full)
    p = shared * s / or_one(over)
    return torch.where(places < full, torch.ones_like(p), p.clamp_max(1.0))


def systematic(p: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """Choose atoms by one uniform number: those whose stretch of the cumulative sum,
    less u, holds an integer.

    Args:
        p: (B, k) with an integer sum, see `probabilities`.
        s: (B, k) singular values.
        u: (B, 1) in [0, 1).

    Returns:
        (B, k) bool, round(sum p) of them true.
    """
    ends = p.cumsum(-1)
    total = ends[:, -1:].round()
    places = torch.arange(s.shape[-1], device=s.device)
    # from here on round-off must decide nothing
    last = (s > 0).sum(-1, keepdim=True) - 1
    ends = torch.where(places >= last, total, torch.minimum(ends, total))
    starts = torch.cat([torch.zeros_like(total), ends[:, :-1]], dim=-1)
    return torch.floor(ends - u) > torch.floor(starts - u)


def _shrinkage(s: Tensor, p: Tensor) -> Tensor:
    """Return 1 / (1 + omega) = sum s^2 / sum (s^2 / p) of each matrix, (B, 1)."""
    squares = s.double().square()
    grown = (squares / or_one(p)).sum(-1, keepdim=True)
    return squares.sum(-1, keepdim=True) / or_one(grown)


def _gathered(atoms: Tensor, counts: list[int]) -> Generator[Request, Any, Tensor]:
    """Gather every worker's atoms, (N, B, m + n, K). Of each matrix its own count of
    columns is sent; K is the largest.
    """
    if min(counts) == atoms.shape[-1]:
        everyone: Tensor = yield Gather(atoms)
        return everyone
    sent = [matrix[:, :count].reshape(-1) for matrix, count in zip(atoms, counts, strict=True)]
    flat = yield Gather(torch.cat(sent))
    everyone = atoms.new_zeros(len(flat), *atoms.shape)
    for row, (count, piece) in enumerate(
        zip(counts, flat.split([part.numel() for part in sent], dim=1), strict=True)
    ):
        everyone[:, row, :, :count] = piece.view(len(flat), atoms.shape[1], count)
    return everyone
