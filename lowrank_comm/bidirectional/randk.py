"""RandK: of d coordinates, K are sent, scaled up so that the mean is right. The
uplink's compressor.

Worker and server both draw the K coordinates from (seed, t, worker), so a message is K
numbers and no indices. There are two ways to draw, and per coordinate they are the
same: a coordinate is kept with probability K/d, independently for each worker.

    independent   K of d without replacement, for each worker by itself
    window        one permutation a step, shared by all workers; worker i keeps the K
                  neighbours on its circle that begin at a private, uniform place
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowrank_comm.numerics.randomness import stream
from lowrank_comm.options import Advice, Share, check_options

Mask = Literal["window", "independent"]
Fraction = Annotated[Share, Advice("1 sends everything; write for example 0.25")]


@dataclass(frozen=True)
class RandK:
    """Unbiased sparsification of vectors.

    C(v) = (d/K) v on K random coordinates, 0 elsewhere
    E C(v) = v;  E ||C(v) - v||^2 = omega ||v||^2;  omega = d/K - 1

    Args:
        fraction: K/d in (0, 1]; K is rounded to an integer of at least 1. 1 sends v
            itself.
        mask: "window" or "independent"; see the module's text.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> import torch
        >>> randk = RandK(0.5)
        >>> indices = randk.indices(seed=0, t=0, n=1, workers=[0], d=4)
        >>> message = randk.compress(torch.ones(1, 4), indices)
        >>> randk.decompress(message, indices, 4).sum().item()
        4.0

    Source: Rand-K as in arXiv 2102.07845 (MARINA).
    """

    fraction: Fraction = 1.0
    mask: Mask = "window"

    def __post_init__(self) -> None:
        check_options(self, "RandK: ")

    def kept(self, d: int) -> int:
        """Return K, the number of coordinates that are sent of d."""
        return max(1, min(d, round(self.fraction * d)))

    def omega(self, d: int) -> float:
        """Return omega = d/K - 1, the variance of C relative to ||v||^2."""
        return d / self.kept(d) - 1.0

    def indices(self, seed: int, t: int, n: int, workers: Sequence[int], d: int) -> Tensor | None:
        """Draw the coordinates that these of n workers keep at step t.

        Returns:
            (W, K) int64 on the CPU; None where all are kept.
        """
        k = self.kept(d)
        if k == d:
            return None
        if self.mask == "independent":
            draws = [
                torch.randperm(d, generator=stream(seed, f"worker {i}", t, "RandK"), device="cpu")[
                    :k
                ]
                for i in workers
            ]
            return torch.stack(draws)
        permutation = torch.randperm(
            d, generator=stream(seed, "bidirectional", t, "RandK permutation"), device="cpu"
        )
        offsets = torch.randint(
            d, (n,), generator=stream(seed, "bidirectional", t, "RandK offsets"), device="cpu"
        )
        own = offsets if len(workers) == n else offsets[list(workers)]
        return permutation[(own[:, None] + torch.arange(k, device="cpu")) % d]

    def compress(self, vectors: Tensor, indices: Tensor | None) -> Tensor:
        """Return the messages: (W, d) -> (W, K)."""
        if indices is None:
            return vectors
        return vectors.gather(1, indices.to(vectors.device)) * (vectors.shape[1] / indices.shape[1])

    def decompress(self, values: Tensor, indices: Tensor | None, d: int) -> Tensor:
        """Return C_i(v_i) from the messages: (W, K) -> (W, d)."""
        if indices is None:
            return values
        return values.new_zeros(len(values), d).scatter_(1, indices.to(values.device), values)

    def mean(self, values: Tensor, indices: Tensor | None, d: int) -> Tensor:
        """Return the mean of C_i(v_i) from all n workers' messages: (n, K) -> (d,)."""
        if indices is None:
            return values.mean(dim=0)
        total = values.new_zeros(d).index_add_(
            0, indices.flatten().to(values.device), values.flatten()
        )
        return total / len(values)
