"""GoLore: as GaLore, but with a random subspace, so that noise in the gradient cannot
decide which directions are kept.

Source: GoLore (He, Li, Hu et al.; arXiv 2410.11289), "Subspace optimization for large
language models with convergence guarantees".

    t mod tau == 0:  P = orth(N(0, 1)^{s x r}) from (seed, name, t)      no bytes
    every step:      R = mean of Delta_i P,  applied = R P^T             as GaLore's

P is the same on all workers without communication, and is kept until the next refresh:
within a period it is a function of (seed, name, t // tau).

The hybrid. The paper's practical rule is GaLore first, while the gradient stands out of
the noise, and random subspaces later, given as a part of the whole run; an optimizer
does not know how long that is, so `galore_until` is in steps. A refresh at t <
galore_until takes singular vectors; the last such subspace is kept until the first
refresh after.

The scaled form. E P P^T = (r / s) I, so (s / r) R P^T is an unbiased estimate of the
mean of Delta, with omega = s / r - 1. It is not contractive: its residual may be longer
than Delta, so it cannot have error feedback. Divided by 1 + omega = s / r it is the
projection itself, which can: that is `scaled=False`. The published optimizer does not
scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from lowrank_comm.compressors.base import Context, Delta, State, Steps
from lowrank_comm.compressors.galore import GaLore, projected, refreshed
from lowrank_comm.compressors.subspaces import basis_side, random_basis
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import Advice


@dataclass(frozen=True)
class GoLore(GaLore):
    """Gradients in coordinates of a random subspace, drawn every tau steps.

    applied = mean(Delta_i) P P^T (or P P^T mean(Delta_i)),
    P = orth(Gaussian) from (seed, name, t // tau)

    Args:
        galore_until: in steps; refreshes before it are GaLore's (the paper's hybrid).
        scaled: apply (s / r) times that, which is unbiased; not with error feedback,
            and not with `galore_until`.

    `rank`, `restart_every`, `side` and `apply_full` (of the refreshes before
    `galore_until`) are as in `GaLore`.

    Raises:
        ConfigError: a value is out of range, or options contradict one another.

    Example:
        >>> from lowrank_comm import GoLore
        >>> golore = GoLore(rank=4, restart_every=200)
        >>> golore.elements(m=100, n=50, r=4), golore.restart_elements(m=100, n=50, r=4)
        (400, 400)

    Source: arXiv 2410.11289.
    """

    galore_until: Annotated[
        int,
        Field(ge=0),
        Advice("it is a number of steps, 0 for none, for example galore_until=1000"),
    ] = 0
    scaled: bool = False

    json_name = "golore"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaled and self.galore_until:
            raise ConfigError(
                "GoLore: scaled=True is unbiased for random subspaces only, and"
                f" galore_until={self.galore_until} has singular vectors first, whose projection it"
                " would blow up; leave one of the two out."
            )
        if self.apply_full and not self.galore_until:
            raise ConfigError(
                "GoLore: apply_full=True needs the mean of Delta on the wire, which a refresh with"
                " a random subspace does not send; leave it out, or give galore_until."
            )

    @property
    def contractive(self) -> bool:  # type: ignore[override]
        """True for the projection, by 1 - r / s in expectation over P; scaled, it is
        not.
        """
        return not self.scaled

    @property
    def row_blocks(self) -> bool:  # type: ignore[override]
        """True where the basis is drawn, for which no whole matrix is needed; a
        decomposition needs one.
        """
        return self.galore_until == 0

    @property
    def averages_restarts(self) -> bool:  # type: ignore[override]
        """True where there are GaLore's refreshes; with a drawn subspace, a refresh is
        an ordinary step on the wire.
        """
        return self.galore_until > 0

    def restart_elements(self, m: int, n: int, r: int) -> int:
        """Count the elements of GaLore's refreshes, where there are such; the others
        send what an ordinary step sends.
        """
        return super().restart_elements(m, n, r) if self.galore_until else self.elements(m, n, r)

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        on_rows, s = basis_side(delta, context, self.side)
        if context.restart and context.t < self.galore_until:
            return refreshed(delta, context, on_rows, self.apply_full)
        p = state["P"]
        if context.restart:
            p = random_basis(context, "random P", s, context.rank, p)
        return projected(delta, p, context, on_rows, self.scaled)
