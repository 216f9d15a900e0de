"""The constants of an objective that the step-size rules need."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_comm.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """Constants of f = (1/n) sum of f_i on R^d.

    ||(1/n) sum (grad f_i(x + u_i)) - grad f(x)||^2 <= (L_A^2/n) sum ||u_i||^2
    for all x and all u_i that sum to 0

    Args:
        smoothness: L, of f.
        gap: D = f(x_0) - inf f.
        variance: sigma^2 of one stochastic gradient, E ||noise||^2 <= sigma^2.
        structure: L_A of the inequality above; None for the largest L_i, with which it
            always holds. It is 0 for quadratics with one common Hessian. This is the
            structural assumption: the smaller L_A, the more the downlink may compress.
        worst_smoothness: max_i L_i; None for L.

    Raises:
        ConfigError: a constant that is negative, or L = 0.
    """

    smoothness: float
    gap: float
    variance: float
    structure: float | None = None
    worst_smoothness: float | None = None

    def __post_init__(self) -> None:
        if not self.smoothness > 0:
            raise ConfigError(
                f"Problem: smoothness={self.smoothness!r} must be above 0; it is the Lipschitz"
                " constant L of grad f."
            )
        for key in ("gap", "variance", "structure", "worst_smoothness"):
            value = getattr(self, key)
            if value is not None and not value >= 0:
                raise ConfigError(f"Problem: {key}={value!r} must be at least 0.")

    @property
    def l_max(self) -> float:
        """The largest smoothness constant of a worker's objective, max_i L_i."""
        return self.smoothness if self.worst_smoothness is None else self.worst_smoothness

    @property
    def l_a(self) -> float:
        """The structure constant L_A; the largest L_i where none is given."""
        return self.l_max if self.structure is None else self.structure
