"""A worker's own gradient in the form that the compressors take: a batch of one."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Delta


class Gradient(Delta):
    """A whole gradient. It is widened on its way into each product, so that no wide
    copy of it stays.

    Args:
        gradient: (m, n), in any floating dtype.
        dtype: of the computation.
    """

    def __init__(self, gradient: Tensor, dtype: torch.dtype) -> None:
        super().__init__(gradient.unsqueeze(0))
        self._dtype = dtype

    @property
    def tensor(self) -> Tensor:
        """The gradient, (m, n), in the dtype of the computation."""
        return self._tensor.to(self._dtype)


class Coordinates(Delta):
    """A gradient of which only R, its coordinates in the present subspace, was kept;
    for steps without a refresh.

    Args:
        r: (l, r), this worker's own.
        shape: (m, n) of the gradient.
    """

    def __init__(self, r: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(r.new_zeros(()).expand(1, *shape))
        self._r = r.unsqueeze(0)

    @property
    def tensor(self) -> Tensor:
        """Not available: the whole gradient was not kept."""
        raise AssertionError("a step that needs whole gradients was given coordinates")

    def times(self, q: Tensor) -> Tensor:
        """Return R itself: q is the basis that R was made with."""
        return self._r

    def transposed_times(self, p: Tensor) -> Tensor:
        """Return R itself, as in `times`."""
        return self._r
