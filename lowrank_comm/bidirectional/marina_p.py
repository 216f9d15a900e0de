"""MARINA-P: the downlink of Inkheart SGD with a dense uplink.

    server     x+ = x - gamma mean of grad f_i(w_i)
    downlink   with probability p: w_i+ = x+;  else w_i+ = w_i + Q_i(x+ - x)

The theorem in `inkheart` holds with omega = 0, and then for heterogeneous data too:
homogeneity served there only to bound the variance that RandK adds. (The original's
constants are its authors'; those are not quoted here.)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowrank_comm.bidirectional.base import Context, Method, Request, Sent, State, Up
from lowrank_comm.bidirectional.inkheart import InkheartSGD
from lowrank_comm.bidirectional.problem import Problem
from lowrank_comm.bidirectional.randk import RandK


@dataclass(frozen=True)
class MarinaP(Method):
    """MARINA-P with grouped PermK: compressed from the server to the workers, dense
    from the workers to the server.

    x+ = x - gamma (1/n) sum of gradient_i at w_i
    w_i+ = x+ with probability p, else w_i + Q_i(x+ - x)

    `downlink_groups` and `sync_probability` are as in `Method`.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> MarinaP(downlink_groups=2).groups(n=4)
        2

    Source: MARINA-P of arXiv 2402.06412, with PermK in groups; the step-size rule is
    that of `inkheart`.
    """

    json_name: ClassVar[str] = "marina_p"

    def estimate(
        self, state: State, gradients: Tensor, context: Context
    ) -> Generator[Request, Any, tuple[Tensor | None, State]]:
        """The mean gradient."""
        sent: Sent = yield Up(gradients, RandK(1.0))
        return sent.mean, {}

    def _as_inkheart(self) -> InkheartSGD:
        return InkheartSGD(self.downlink_groups, self.sync_probability, uplink_fraction=1.0)

    def largest_step_size(self, problem: Problem, n: int, d: int) -> float:
        """The largest gamma that the theorem allows; see
        `InkheartSGD.largest_step_size`.
        """
        return self._as_inkheart().largest_step_size(problem, n, d)

    def step_size(self, problem: Problem, n: int, d: int, batch: int, steps: int) -> float:
        """Return the gamma with the least bound; see `InkheartSGD.step_size`."""
        return self._as_inkheart().step_size(problem, n, d, batch, steps)

    def bound(
        self, problem: Problem, n: int, d: int, batch: int, steps: int, gamma: float
    ) -> float:
        """Bound the mean squared gradient norm; see `InkheartSGD.bound`."""
        return self._as_inkheart().bound(problem, n, d, batch, steps, gamma)
