"""M4, as reconstructed here: MARINA-P down, momentum and a MARINA-like uplink with
mini-batches up. Heterogeneous data.

This is OUR RECONSTRUCTION and not the authors' algorithm: M4 is known to us by the
abstract of its paper alone (Begunov and Tyurin, arXiv 2605.07795; see `inkheart`),
whose full text was not available.

    start      w_i = x_0;  v_i = mean of B0 gradients at x_0, sent whole;  y_i = v_i
    server     x+ = x - gamma y_bar;  y_bar, the mean of y_i, is all that it keeps
    downlink   as Inkheart SGD: coin p, grouped PermK(G)
    worker i   v_i+ = (1-a) v_i + a (mean of B stochastic gradients of f_i at w_i+)
    uplink     with probability q: v_i+ is sent whole, y_i+ = v_i+
               else: RandK_i(v_i+ - v_i) is sent, y_i+ = y_i + RandK_i(v_i+ - v_i)

Theorem (derived here; L_m = max_i L_i; omega is RandK's). With

    gamma = 1/(2L + 2 sqrt(X))
    X     = 4.5 L^2/a^2 + 15 (G-1) L_A^2/(p a^2) + 18 omega G L_m^2/(q n)
    Phi_0 = D + (1.5 gamma/a) sigma^2/(n B0) + 3 gamma omega a sigma^2/(q n B0)

it holds that

    mean over t < T of E ||grad f(x_t)||^2
        <=  2 Phi_0/(gamma T) + (sigma^2/(n B)) (3 a + 9 omega a^2/q)

Proof (sketch). y_bar - grad f(x) is the compression error U plus the momentum error P
plus mean grad f_i(w_i) - grad f(x), whose squares weigh 3 each. S is the mean of the
workers' own momentum errors, and V = mean ||w_i - x||^2 as in `inkheart`. Then

    P+ <= (1-a) P + (1/a) ||change of the mean gradient||^2 + a^2 sigma^2/(n B)
    S+ <= the same with L_m and sigma^2/B
    U+ <= (1-q) (U + (omega/n) a^2 (2 S + 2 L_m^2 mean ||w_i+ - w_i||^2 + sigma^2/B))
    E mean ||w_i+ - w_i||^2 <= (G + 2p) gamma^2 ||y_bar||^2 + 2 p V

The Lyapunov function weighs

    U by 3 gamma/(2q)
    P by 3 gamma/(2a)
    S by 3 gamma omega a/(q n)
    V by (gamma/p) (1.5 + 9/a^2) L_A^2 + 12 gamma omega L_m^2/(q n)

and the terms in ||y_bar||^2 sum to at most gamma^3 X <= gamma/4. Nothing is assumed of
how much the f_i differ, and the noise of the compression is damped by a^2. With
sigma = 0 and a = 1 it is MARINA-P with MARINA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from lowrank_comm.bidirectional.base import State, known
from lowrank_comm.bidirectional.marina_uplink import MarinaUplink
from lowrank_comm.bidirectional.problem import Problem
from lowrank_comm.bidirectional.transport import Context, Uplink
from lowrank_comm.options import Advice, Share


@dataclass(frozen=True)
class M4(MarinaUplink):
    """M4 (our reconstruction): momentum on the workers, differences through RandK,
    grouped PermK downlink.

    v_i+ = (1-a) v_i + a gradient_i
    y_i+ = v_i+ with probability q, else y_i + RandK_i(v_i+ - v_i)
    x+ = x - gamma y_bar+

    Args:
        gradient_weight: a in (0, 1], the weight of a new gradient in the momentum.

    The others are as in `Method` and `MarinaUplink`.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> M4(uplink_fraction=0.25).uplink_probability(d=64)
        0.25

    Source: reconstructed from the abstract of arXiv 2605.07795; theorem and proof in
    this file's text.
    """

    gradient_weight: Annotated[Share, Advice("at 0 no gradient would ever count")] = 0.3

    json_name = "m4"
    server_state = ("x", "y_bar")

    def estimate(
        self, state: State, gradients: Tensor, context: Context, up: Uplink
    ) -> tuple[Tensor | None, State]:
        """Update the momentum and send it by MARINA's uplink; the first step sends it
        whole.
        """
        a = self.gradient_weight
        last = state.get("v")
        v = gradients.clone() if last is None else (1 - a) * last + a * gradients
        change, y_bar = self.send(v, last, state.get("y_bar"), context, up)
        y = v if change is None else state["y"] + change
        return y_bar, known(v=v, y=y, y_bar=y_bar)

    def rejoin(self, server: State, context: Context) -> State:
        """Return a state with every worker at x and v_i = y_i = y_bar: a valid start,
        though not what the run would have gone on with.
        """
        state = super().rejoin(server, context)
        # before the first step
        if "y_bar" not in server:
            return state
        y_bar = server["y_bar"]
        rows = y_bar.expand_as(state["w"])
        mine = known(v=rows.clone(), y=rows.clone(), y_bar=y_bar if context.serves else None)
        return state | mine

    def step_size(self, problem: Problem, n: int, d: int) -> float:
        """Return the theorem's gamma.

        gamma = 1/(2L + 2 sqrt(X))
        X = 4.5 L^2/a^2 + 15 (G-1) L_A^2/(p a^2) + 18 omega G L_m^2/(q n)

        Args:
            problem: constants of the objective.
            n: workers.
            d: coordinates.
        """
        a, down = self.gradient_weight, self.downlink_omega(n)
        x = 4.5 * problem.smoothness**2 / a**2
        x += 15 * down * problem.l_a**2 / (self.probability(n) * a**2)
        x += (
            18
            * self.uplink.omega(d)
            * (down + 1)
            * problem.l_max**2
            / (self.uplink_probability(d) * n)
        )
        return 1 / (2 * problem.smoothness + 2 * math.sqrt(x))

    def initial_potential(self, problem: Problem, n: int, d: int, first_batch: int) -> float:
        """Return the theorem's Phi_0.

        Phi_0 = D + (1.5 gamma/a) sigma^2/(n B0) + 3 gamma omega a sigma^2/(q n B0)

        Args:
            problem, n, d: see `step_size`.
            first_batch: B0.
        """
        a = self.gradient_weight
        gamma = self.step_size(problem, n, d)
        noise = problem.variance / (n * first_batch)
        return problem.gap + gamma * noise * (
            1.5 / a + 3 * self.uplink.omega(d) * a / self.uplink_probability(d)
        )

    def bound(
        self, problem: Problem, n: int, d: int, batch: int, first_batch: int, steps: int
    ) -> float:
        """Return the theorem's bound of the mean over t < T of E ||grad f(x_t)||^2,
        with gamma = step_size.

        2 Phi_0/(gamma T) + (sigma^2/(n B)) (3 a + 9 omega a^2/q)

        Args:
            problem, n, d: see `step_size`.
            batch, first_batch: B and B0.
            steps: T.
        """
        a, omega = self.gradient_weight, self.uplink.omega(d)
        descent = (
            2
            * self.initial_potential(problem, n, d, first_batch)
            / (self.step_size(problem, n, d) * steps)
        )
        return descent + problem.variance / (n * batch) * (
            3 * a + 9 * omega * a**2 / self.uplink_probability(d)
        )


@dataclass(frozen=True)
class M4Plan:
    """What `plan` chose.

    Attributes:
        method: with its a.
        first_batch: B0.
        gamma: step size.
        steps: T after which the bound is eps.
    """

    method: M4
    first_batch: int
    gamma: float
    steps: int


def plan(problem: Problem, method: M4, n: int, d: int, batch: int, eps: float) -> M4Plan:
    """Choose a, B0, gamma and T of a method for a target.

    a = min { 1, n B eps/(12 sigma^2), sqrt(q n B eps/(36 omega sigma^2)) }
    B0 = ceil(B/a);  T = 4 Phi_0/(gamma eps)

    Args:
        problem: constants of the objective.
        method: whose G, p, K and q are kept.
        n: workers.
        d: coordinates.
        batch: B.
        eps: the mean squared gradient norm to be reached.

    Returns:
        The plan.

    Example:
        >>> problem, method = Problem(1.0, gap=1.0, variance=4.0), M4(downlink_groups=4)
        >>> chosen = plan(problem, method, n=16, d=64, batch=4, eps=0.05)
        >>> round(chosen.method.gradient_weight, 4), chosen.first_batch
        (0.043, 93)
    """
    a, omega, q = 1.0, method.uplink.omega(d), method.uplink_probability(d)
    if problem.variance > 0:
        a = min(a, n * batch * eps / (12 * problem.variance))
        if omega > 0:
            a = min(a, math.sqrt(q * n * batch * eps / (36 * omega * problem.variance)))
    chosen = replace(method, gradient_weight=a)
    first_batch, gamma = math.ceil(batch / a), chosen.step_size(problem, n, d)
    steps = math.ceil(4 * chosen.initial_potential(problem, n, d, first_batch) / (gamma * eps))
    return M4Plan(chosen, first_batch, gamma, steps)
