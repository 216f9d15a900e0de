"""Identity: no compression. Every parameter is all-reduced uncompressed, in the same
fused buffer; the baseline of every comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_comm.compressors.base import Compressor, Context, Delta, Result, State, Steps
from lowrank_comm.compressors.requests import Mean


@dataclass(frozen=True)
class Identity(Compressor):
    """The exact mean of the gradients.

    applied = mean(Delta_i),  sent_i = Delta_i

    Args:
        rank: accepted so that one configuration fits every compressor; it has no
            effect.

    Example:
        >>> from lowrank_comm import Identity
        >>> Identity().elements(m=10, n=5, r=4)
        50
    """

    json_name = "identity"
    low_rank = False
    row_blocks = True

    def elements(self, m: int, n: int, r: int) -> int:
        return m * n

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        mean, own = yield Mean(delta.tensor, "dense")
        return Result(applied=mean, sent=own, state={})
