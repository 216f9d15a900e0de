"""The uplink of M3 and M4: a coin decides whether a worker's vector is sent whole, or
RandK of how it changed.

    with probability q: x_i+ is sent whole,  y_i+ = x_i+
    else:               RandK_i(x_i+ - x_i) is sent,  y_i+ = y_i + RandK_i(x_i+ - x_i)

All workers share the coin. The server needs the mean of y_i only. What x_i is, the
method says: the gradient at the worker's point in M3, the momentum in M4.

Source: MARINA (Gorbunov, Burlachenko, Li, Richtarik; arXiv 2102.07845).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from lowrank_comm.bidirectional.base import Method
from lowrank_comm.bidirectional.randk import Fraction, Mask, RandK
from lowrank_comm.bidirectional.transport import Context, Uplink
from lowrank_comm.options import Advice, Share


@dataclass(frozen=True)
class MarinaUplink(Method):
    """A method whose workers send as MARINA does.

    Args:
        uplink_fraction: K/d in (0, 1]; omega = d/K - 1.
        uplink_sync_probability: q in (0, 1]; null for K/d, with which a step sends at
            most 2 K coordinates in the mean.
        mask: how RandK draws its coordinates, "window" or "independent".

    Raises:
        ConfigError: a value that cannot work.
    """

    uplink_fraction: Fraction = 0.25
    uplink_sync_probability: Annotated[
        Share | None, Advice("without dense rounds the compression error stays")
    ] = None
    mask: Mask = "window"

    @property
    def uplink(self) -> RandK:
        """The compressor of the uplink's ordinary steps."""
        return RandK(self.uplink_fraction, self.mask)

    def uplink_probability(self, d: int) -> float:
        """Return q for d coordinates."""
        return (
            self.uplink.kept(d) / d
            if self.uplink_sync_probability is None
            else self.uplink_sync_probability
        )

    def send(
        self,
        vectors: Tensor,
        last: Tensor | None,
        mean: Tensor | None,
        context: Context,
        up: Uplink,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make one step of the uplink.

        Args:
            vectors: x_i+ of the workers here.
            last: x_i, or None in the first step, which sends everything.
            mean: of y_i, where the server is; None elsewhere, and in the first step.
            context: of the step.
            up: sends to the server.

        Returns:
            (what is added to y_i, or None where y_i+ = x_i+; the mean of y_i+, None
            where there is no server).
        """
        if last is None or context.coin("uplink coin", self.uplink_probability(context.d)):
            return None, up(vectors, RandK(1.0)).mean
        sent = up(vectors - last, self.uplink)
        return sent.own, None if sent.mean is None or mean is None else mean + sent.mean
