"""Inkheart SGD, as reconstructed here: RandK up, grouped PermK down, plain SGD in
between.

This is OUR RECONSTRUCTION and not the authors' algorithm. Inkheart SGD is known to us
by the abstract of its paper alone (Grigory Begunov and Alexander Tyurin, "Scalable
Distributed Stochastic Optimization via Bidirectional Compression: Beyond Pessimistic
Limits", arXiv 2605.07795), whose full text was not available. What the abstract says
holds of it: both the communication and the noise term of the time to an eps-stationary
point fall with n, under a structural assumption (`Problem.structure` here, a guess at
the paper's).

    worker i   a_i = mean of B stochastic gradients at w_i;  sends RandK_i(a_i)
    server     g = mean of messages;  x+ = x - gamma g
    downlink   with probability p: w_i+ = x+;  else w_i+ = w_i + Q_i(x+ - x)

The mean of w_i is x at all times.

Theorem (derived here; homogeneous data, f_i = f). Let omega be RandK's, G - 1 the
downlink's, p the coin's probability, and V = mean ||w_i - x||^2. If gamma is at most
each of these, where those with a zero in the denominator drop,

    (1)  1/(2L)
    (2)  n/(12 L omega)
    (3)  sqrt(p/(8 (G-1)))/L_A
    (4)  L p/(2 (G-1) L_A^2)
    (5)  sqrt(n p/(8 omega (G-1)))/L

then

    mean over t < T of E ||grad f(x_t)||^2
        <=  4 D/(gamma T) + 6 L gamma (omega + 1) sigma^2/(n B)

Proof. E g = q, the mean of grad f(w_i), and

    Var g <= (1/n) (omega mean ||grad f(w_i)||^2 + (omega + 1) sigma^2/B)
    ||grad f(w_i)||^2 <= 2 ||grad f(x)||^2 + 2 L^2 ||w_i - x||^2

Smoothness with condition (1) gives

    f+ <= f - (gamma/2) ||grad f||^2 - (gamma/4) ||q||^2
          + (gamma/2) ||q - grad f||^2 + (L gamma^2/2) Var g

Since the mean of w_i is x, and since Q_i is unbiased and independent of the rest,

    ||q - grad f||^2 <= L_A^2 V
    E V+ = (1-p) (V + (G-1) gamma^2 E ||g||^2)

Add c V with

    c = gamma L_A^2/p + 2 L^3 gamma^2 omega/(n p)

Conditions (3) to (5) close the terms in V. They also keep c (G-1) gamma <= 1/4, which
absorbs ||q||^2, and the factor of Var g below (3/2) L gamma^2. Condition (2) absorbs
omega ||grad f||^2/n into a gamma/4. Sum over t.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from torch import Tensor

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.problem import Problem
from lowrank_comm.bidirectional.randk import Fraction, Mask, RandK
from lowrank_comm.bidirectional.transport import Context, Uplink


class OneUplink(Method):
    """A method whose server steps along the mean of C_i(gradient_i at w_i), with the
    step sizes of this file's theorem.

    Attributes:
        uplink: C.
    """

    @property
    @abc.abstractmethod
    def uplink(self) -> RandK: ...

    def estimate(
        self, state: State, gradients: Tensor, context: Context, up: Uplink
    ) -> tuple[Tensor | None, State]:
        """Send C_i(gradient_i); the estimate is the mean over all workers."""
        return up(gradients, self.uplink).mean, {}

    def largest_step_size(self, problem: Problem, n: int, d: int) -> float:
        """Return the largest gamma that the theorem allows.

        Args:
            problem: constants of the objective.
            n: workers.
            d: coordinates.
        """
        smooth, l_a, p = problem.smoothness, problem.l_a, self.probability(n)
        omega, down = self.uplink.omega(d), self.downlink_omega(n)
        conditions = [1 / (2 * smooth)]
        if omega > 0:
            conditions.append(n / (12 * smooth * omega))
        if down > 0 and l_a > 0:
            conditions.append(math.sqrt(p / (8 * down)) / l_a)
            conditions.append(smooth * p / (2 * down * l_a**2))
        if down > 0 and omega > 0:
            conditions.append(math.sqrt(n * p / (8 * omega * down)) / smooth)
        return min(conditions)

    def step_size(self, problem: Problem, n: int, d: int, batch: int, steps: int) -> float:
        """Return the gamma that makes the theorem's bound smallest.

        gamma = min { largest_step_size, sqrt(2 D n B/(3 L (omega+1) sigma^2 T)) }

        Args:
            problem, n, d: see `largest_step_size`.
            batch: B, stochastic gradients that a worker averages.
            steps: T.
        """
        largest = self.largest_step_size(problem, n, d)
        noise = (self.uplink.omega(d) + 1) * problem.variance
        if noise == 0:
            return largest
        return min(
            largest,
            math.sqrt(2 * problem.gap * n * batch / (3 * problem.smoothness * noise * steps)),
        )

    def bound(
        self, problem: Problem, n: int, d: int, batch: int, steps: int, gamma: float
    ) -> float:
        """Return the theorem's bound of the mean over t < T of E ||grad f(x_t)||^2, for
        gamma <= largest_step_size.

        4 D/(gamma T) + 6 L gamma (omega+1) sigma^2/(n B)
        """
        noise = (self.uplink.omega(d) + 1) * problem.variance / (n * batch)
        return 4 * problem.gap / (gamma * steps) + 6 * problem.smoothness * gamma * noise


@dataclass(frozen=True)
class InkheartSGD(OneUplink):
    """Inkheart SGD (our reconstruction): RandK uplink, grouped PermK downlink, no
    memory but each worker's point.

    g = (1/n) sum RandK_i(gradient_i at w_i);  x+ = x - gamma g
    w_i+ = x+ with probability p, else w_i + Q_i(x+ - x)

    Args:
        uplink_fraction: K/d in (0, 1]; omega = d/K - 1.
        mask: how RandK draws its coordinates, "window" or "independent"; see `randk`.

    `downlink_groups` and `sync_probability` are as in `Method`.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> InkheartSGD(downlink_groups=4, uplink_fraction=0.5).probability(n=8)
        0.25

    Source: reconstructed from the abstract of arXiv 2605.07795; theorem and proof in
    this file's text.
    """

    uplink_fraction: Fraction = 0.25
    mask: Mask = "window"

    json_name = "inkheart"

    @property
    def uplink(self) -> RandK:
        """The compressor of the uplink."""
        return RandK(self.uplink_fraction, self.mask)


@dataclass(frozen=True)
class InkheartPlan:
    """What `plan` chose.

    Attributes:
        method: with K/d, G and p.
        batch: B.
        gamma: step size.
        steps: T after which the bound is eps.
        seconds: of T steps on the clock: T (h B + kappa (K + expected downlink)).
    """

    method: InkheartSGD
    batch: int
    gamma: float
    steps: int
    seconds: float


def plan(problem: Problem, n: int, d: int, h: float, kappa: float, eps: float) -> InkheartPlan:
    """Choose K, G, B, gamma and T for a clock: K and B by the orders of magnitude of
    the theory, G by its bound.

    1 + omega = clip(sqrt(kappa d n eps/(h sigma^2)), 1, min(n, d))
    B = ceil(sigma^2 (1+omega)/(n eps))
    G = the divisor of n with the fewest seconds;  p = 1/G;  gamma and T from the bound

    With L_A = 0 the order of the time is

    (L D/eps) (h + 2 sqrt(h sigma^2 kappa d/(n eps)) + 2 kappa d/G)

    so that the noise and the communication fall with n. With a large L_A the bound of
    gamma falls faster with G than the downlink gets cheaper, and G = 1 is left. In
    practice larger G and gamma are faster; tune them upwards from here.

    Args:
        problem: constants of the objective.
        n: workers.
        d: coordinates.
        h: seconds for one stochastic gradient.
        kappa: seconds for one coordinate on a link.
        eps: the mean squared gradient norm to be reached.

    Returns:
        The plan.

    Example:
        >>> problem = Problem(1.0, gap=1.0, variance=4.0, structure=0.0)
        >>> chosen = plan(problem, n=64, d=128, h=1.0, kappa=1.5, eps=0.01)
        >>> chosen.method.downlink_groups, chosen.method.uplink_fraction < 1
        (16, True)
    """
    ratio = kappa * d * n * eps / (h * problem.variance) if problem.variance * h > 0 else math.inf
    compression = min(max(math.sqrt(ratio), 1.0), float(min(n, d)))
    kept = max(1, min(d, round(d / compression)))
    omega = d / kept - 1
    batch = max(1, math.ceil(problem.variance * (1 + omega) / (n * eps)))
    noise = (1 + omega) * problem.variance / (n * batch)

    def with_groups(groups: int) -> InkheartPlan:
        method = InkheartSGD(downlink_groups=groups, uplink_fraction=kept / d)
        gamma = method.largest_step_size(problem, n, d)
        if noise > 0:
            # the noise takes half of eps
            gamma = min(gamma, eps / (12 * problem.smoothness * noise))
        steps = max(
            1, math.ceil(4 * problem.gap / (gamma * (eps - 6 * problem.smoothness * gamma * noise)))
        )
        p = method.probability(n)
        down = d if groups == 1 else p * d + (1 - p) * math.ceil(d / groups)
        return InkheartPlan(
            method, batch, gamma, steps, steps * (h * batch + kappa * (kept + down))
        )

    return min((with_groups(g) for g in range(1, n + 1) if n % g == 0), key=lambda one: one.seconds)
