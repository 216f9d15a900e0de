"""The projection of a parameter's gradients: on which side of the matrix its basis P
is, and at which steps P is refreshed.

The definitions of P are those of the compressors `GaLore` and `GoLore`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Context
from lowrank_comm.compressors.galore import GaLore, Side
from lowrank_comm.compressors.golore import GoLore
from lowrank_comm.compressors.subspaces import basis_on_rows, basis_rows
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import Seed, check

Name = Literal["galore", "golore"]


class Projection:
    """The subspaces of a run.

    Args:
        owner: the optimizer, for messages.
        name: "galore" or "golore".
        restart_every, galore_until, side, seed: see `ProjectedAdamW`.

    Attributes:
        compressor: defines P and when it is refreshed.

    Raises:
        ConfigError: a value that cannot work.
    """

    def __init__(
        self, owner: str, name: Name, restart_every: int, galore_until: int, side: Side, seed: int
    ) -> None:
        check(f"{owner}: projection", name, Name)
        self.compressor: GaLore
        if name == "golore":
            self.compressor = GoLore(
                restart_every=restart_every, side=side, galore_until=galore_until
            )
        elif galore_until:
            raise ConfigError(
                f'{owner}: galore_until={galore_until!r} is for projection="golore", whose'
                " refreshes before that step are GaLore's; leave it out, or choose that."
            )
        else:
            self.compressor = GaLore(restart_every=restart_every, side=side)
        check("seed", seed, Seed, 0)
        self.side, self.seed = side, seed

    def on_rows(self, parameter: Tensor) -> bool:
        """Return whether P is on the side of the rows. The update is P R^T then, and
        R P^T otherwise.
        """
        m, n = parameter.shape
        return basis_on_rows(m, n, self.side)

    def length(self, parameter: Tensor) -> int:
        """Return s, the number of rows of P."""
        m, n = parameter.shape
        return basis_rows(m, n, self.side)

    def project(self, gradient: Tensor, basis: Tensor) -> Tensor:
        """Return R (l, r), coordinates of a gradient (m, n) in the basis P (s, r)."""
        return (gradient.mT if self.on_rows(gradient) else gradient) @ basis

    def initial_basis(self, name: str, parameter: Tensor, rank: int) -> Tensor:
        """Draw a random P (s, r), for use until the first refresh."""
        m, n = parameter.shape
        like = torch.empty(0, dtype=computation_dtype(parameter), device=parameter.device)
        context = Context((name,), -1, self.seed, rank, m=m)
        return self.compressor.initial_state(context, m, n, like)["P"][0]

    def deferred(self, refreshed_at: int | None, t: int) -> bool:
        """Return whether a refresh that was due before step t still waits for a
        gradient, since no worker had one in that step.
        """
        scheduled = t - t % self.compressor.restart_every
        return refreshed_at is not None and refreshed_at < scheduled < t

    def refreshes(self, refreshed_at: int | None, t: int) -> bool:
        """Return whether a parameter's P is refreshed at step t, if any worker has a
        gradient for it.
        """
        return t % self.compressor.restart_every == 0 or self.deferred(refreshed_at, t)


def rank_of(parameter: Tensor, group: Mapping[str, Any]) -> int | None:
    """Return r of a parameter's projection; None if it is not projected."""
    rank: int | None = group["rank"]
    if rank is None or parameter.dim() != 2 or rank >= min(parameter.shape):
        return None
    return rank


def computation_dtype(parameter: Tensor) -> torch.dtype:
    """Return the wider of float32 and the parameter's dtype."""
    return torch.promote_types(parameter.dtype, torch.float32)
