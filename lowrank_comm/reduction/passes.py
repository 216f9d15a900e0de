"""What goes into a pass of the lock-step protocol, and what comes out of it; see
`lockstep`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.ledger import PassStats
from lowrank_comm.communication.quantized_mean import Noise
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Result
from lowrank_comm.compressors.requests import Request
from lowrank_comm.numerics.quantization import Format, Quantization
from lowrank_comm.reduction.intra_node_requests import IntraNodeRequests
from lowrank_comm.reduction.warmup import KIND, Warmup

PIECE_BYTES = 25_000_000
"""Of whole matrices that are on their way at once, unless told otherwise."""


@dataclass(frozen=True)
class Presence:
    """A request of the reducer's own, for steps that depend on it: for each parameter,
    whether any worker has a gradient. That is known when the first packet has come
    back, so a generator that asks takes no part in that packet, but in those that
    follow.
    """


Steps = Generator[Request | Presence, Any, Result | None]


@dataclass
class Room:
    """Room for whole matrices on their way, shared by the passes of a run. Pieces take
    it in one order on all workers.

    Attributes:
        bytes: how many may be on their way at once; a piece larger than that travels
            alone.
        taken: by pieces that are on their way.
    """

    bytes: int
    taken: int = 0

    def take(self, piece: int) -> bool:
        """Take room for a piece; return whether there was any."""
        if self.taken and self.taken + piece > self.bytes:
            return False
        self.taken += piece
        return True

    def free(self, piece: int) -> None:
        """Give back a piece's room."""
        self.taken -= piece


class Wire:
    """How passes communicate: what is the same for all passes of a run.

    Args:
        workers: who takes part.
        dtype: on the wire, or None for each tensor's own.
        quantization: what is sent quantized.
        piece_bytes: of whole matrices that may be on their way at once.
        warmup: how its steps send matrices.

    Attributes:
        room: for these.
        formats: the ledger's kind -> format of averages that are sent quantized.
        dtypes: the ledger's kind -> dtype on the wire, where it is another one.
        in_the_node: the requests that the ranks of a node answer together.
    """

    def __init__(
        self,
        workers: Workers,
        dtype: torch.dtype | None,
        quantization: Quantization | None = None,
        piece_bytes: int = PIECE_BYTES,
        warmup: Warmup | None = None,
    ) -> None:
        self.workers, self.dtype, self.room = workers, dtype, Room(piece_bytes)
        formats: dict[str, Format] = quantization.formats if quantization else {}
        self.dtypes: Mapping[str, torch.dtype] = {}
        if warmup is not None and warmup.format is not None:
            formats = {**formats, KIND: warmup.format}
        elif warmup is not None and warmup.dtype is not None:
            self.dtypes = {KIND: warmup.dtype}
        self.formats: Mapping[str, Format] = formats
        self.in_the_node = IntraNodeRequests(workers)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether the wire is narrower than this dtype of a computation."""
        return self.dtype is not None and self.dtype.itemsize < dtype.itemsize


@dataclass
class Pass:
    """One pass: what is averaged, how, and what it has cost so far.

    Attributes:
        starts: begin the compressors' generators, in the same order on all workers; a
            generator may ask for `Presence` first.
        dense: tensors to be averaged as they are.
        has_gradient: for each parameter, whether this worker has one; NaN for one that
            cannot be averaged.
        wire: how it communicates.
        rank, size: this worker's number, and how many workers there are.
        noise: number of a packet -> its draws for stochastic rounding.
        pieces: number of a generator -> bytes of the whole matrices that it sends;
            these begin when the wire has room for them.
        stats: filled while the pass runs, vetoed or not.
        refused: set if the pass was vetoed since some worker's gradient cannot be
            averaged.
        computed_once: matrices of which one rank has computed something for all.
    """

    starts: Sequence[Callable[[], Steps]]
    dense: Sequence[Tensor]
    has_gradient: Sequence[float]
    wire: Wire
    rank: int
    size: int
    noise: Callable[[int], Noise] | None = None
    pieces: Mapping[int, int] = field(default_factory=dict)
    stats: PassStats = field(default_factory=PassStats)
    refused: bool = False
    computed_once: int = 0


@dataclass
class Agreed:
    """What a pass that no worker vetoed ends with.

    Attributes:
        results: of the generators, in their order; None of one that found out that it
            has nothing to do.
        dense: the means of the dense tensors, in their order.
        present: for each parameter, whether any worker had a gradient.
    """

    results: list[Result | None]
    dense: list[Tensor]
    present: list[bool]
