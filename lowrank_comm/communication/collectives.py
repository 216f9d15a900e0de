"""What a phase asks of the group: sums, gathers, and personal exchanges, described
without saying who carries them out.

A process group carries them out as collectives (`group`), the simulation of N workers
in one process as copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AllGather:
    """Row w of `everyone` (N, k) becomes worker w's `own` (k,)."""

    own: Tensor
    everyone: Tensor


@dataclass(frozen=True)
class AllToAll:
    """Row w of `received` (N, k) becomes the row of worker w's `given` (N, k) that is
    for this worker.
    """

    given: Tensor
    received: Tensor


# a tensor is to be summed over the workers, in place
Exchange = Tensor | AllGather | AllToAll


def alone(exchange: Exchange) -> None:
    """Carry out an exchange of one worker with itself."""
    if not isinstance(exchange, Tensor):
        among([exchange])


def among(workers: Sequence[Exchange]) -> None:
    """Carry out one exchange of N workers that live in one process.

    Args:
        workers: the same request of each of them, in their order.
    """
    first = workers[0]
    if isinstance(first, Tensor):
        buffers = [one for one in workers if isinstance(one, Tensor)]
        total = torch.stack(buffers).sum(dim=0)
        for buffer in buffers:
            buffer.copy_(total)
    elif isinstance(first, AllGather):
        gathers = [one for one in workers if isinstance(one, AllGather)]
        everyone = torch.stack([one.own for one in gathers])
        for gather in gathers:
            gather.everyone.copy_(everyone)
    else:
        swaps = [one for one in workers if isinstance(one, AllToAll)]
        for k, swap in enumerate(swaps):
            swap.received.copy_(torch.stack([other.given[k] for other in swaps]))
