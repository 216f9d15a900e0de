"""M3: MARINA-P down, MARINA up, and momentum between the points where the workers are
told to be and where they compute.

    server     x+ = x - gamma g_bar
    downlink   with probability p: w_i+ = x+;  else w_i+ = w_i + Q_i(x+ - x)
    worker i   z_i+ = (1-beta) z_i + beta w_i+
    uplink     with probability q: grad f_i(z_i+) is sent whole, g_i+ = grad f_i(z_i+)
               else: RandK_i(grad f_i(z_i+) - grad f_i(z_i)) is sent and added to g_i

The server keeps only g_bar, the mean of g_i. M3 is made for exact gradients:
grad f_i(z_i) is that of the last step. With stochastic ones, RandK multiplies the noise
of both by omega and nothing damps it; use `m4` there. No step-size rule is given: the
original's constants are its authors', and those are not quoted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from lowrank_comm.bidirectional.base import State, known
from lowrank_comm.bidirectional.marina_uplink import MarinaUplink
from lowrank_comm.bidirectional.transport import Context, Uplink
from lowrank_comm.options import Advice, Share


@dataclass(frozen=True)
class M3(MarinaUplink):
    """M3 with grouped PermK and RandK.

    z_i+ = (1-beta) z_i + beta w_i+;  h_i+ = grad f_i(z_i+)
    g_i+ = h_i+ with probability q, else g_i + RandK_i(h_i+ - h_i)

    Args:
        model_weight: beta in (0, 1], the weight of a new w_i in z_i.

    The others are as in `Method` and `MarinaUplink`.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> M3(uplink_fraction=0.5).uplink_probability(d=8)
        0.5

    Source: M3 of arXiv 2402.06412, with PermK in groups.
    """

    model_weight: Annotated[Share, Advice("at 0 no worker would ever move")] = 0.5

    json_name = "m3"

    def start(self, x: Tensor, context: Context) -> State:
        """Return the state before the first step: z_i = w_i = x."""
        state = super().start(x, context)
        return {**state, "z": state["w"].clone()}

    def points(self, state: State) -> Tensor:
        """Return z_i, where the workers compute their next gradients, (W, d)."""
        return state["z"]

    def estimate(
        self, state: State, gradients: Tensor, context: Context, up: Uplink
    ) -> tuple[Tensor | None, State]:
        """Send the gradients by MARINA's uplink; the first step sends them whole."""
        last, g_bar = state.get("last"), state.get("g_bar")
        _, g_bar = self.send(gradients, last, g_bar, context, up)
        return g_bar, known(last=gradients.clone(), g_bar=g_bar)

    def moved(self, state: State) -> State:
        """Return the state with z_i moved towards the new w_i."""
        return {**state, "z": (1 - self.model_weight) * state["z"] + self.model_weight * state["w"]}
