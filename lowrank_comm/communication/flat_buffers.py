"""One phase on the wire: the requests of all matrices packed into one flat buffer for
each wire dtype and device.

A buffer holds the tensors to be averaged first, then those that are only summed
(results that one worker computed and the others padded with zeros; control numbers). It
is summed over the workers in place by the driver of the pass; then `unpack` cuts it
into pieces again. For float16 wires the division by the number of workers comes before
the sum, which would overflow otherwise.

What is to be gathered has buffers of its own, and what is sent quantized
(`quantized_mean`) takes two legs: `exchanges` is the first leg of all, `second_leg`
what comes after it, if anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, Exchange
from lowrank_comm.communication.ledger import PassStats
from lowrank_comm.communication.quantized_mean import Noise, QuantizedMean
from lowrank_comm.numerics.quantization import Format
from lowrank_comm.options import check

WireDtype = Literal["float32", "float64", "bfloat16", "float16"]
WIRE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def wire_dtype_called(name: str | None) -> torch.dtype | None:
    """Return the wire dtype of that name; None for None, each tensor's own.

    Raises:
        ConfigError: it is unknown.
    """
    check("wire_dtype", name, WireDtype | None)
    return WIRE_DTYPES[name] if name is not None else None


def _largest(dtype: torch.dtype) -> float:
    """Return the largest magnitude that may be sent: 2^24 below the end of the range,
    for sums over rows and workers of what arrives. float16 has no room to spare, and
    what arrives in it is computed with in float32.
    """
    largest = torch.finfo(dtype).max
    return largest if dtype == torch.float16 else largest * 2.0**-24


LARGEST = {dtype: _largest(dtype) for dtype in WIRE_DTYPES.values()}


@dataclass
class Entry:
    """One tensor of a packet, and what came back for it.

    Attributes:
        tensor: of any shape.
        kind: its kind in the ledger.
        averaged: whether the sum over the workers is divided by their number.
        gathered: whether all workers are to have the tensors of all instead.
        format: in which it is averaged quantized, or None.
        sent: its place in the buffer that is summed, 1-D.
        mean: once unpacked, the mean or the sum; or the tensors of all workers,
            stacked.
        own: once unpacked, the tensor as it was sent.
    """

    tensor: Tensor
    kind: str
    averaged: bool = True
    gathered: bool = False
    format: Format | None = None
    sent: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    own: Tensor = field(init=False)


@dataclass
class _Sum:
    """A buffer that is summed over the workers.

    Attributes:
        buffer: the averaged entries, then those that are only summed.
        entries: in this order.
        averaged_length: elements of the averaged entries.
        own: this worker's numbers as they went on the wire, where that rounds.
    """

    buffer: Tensor
    entries: list[Entry]
    averaged_length: int
    own: Tensor | None


class FlatBuffers:
    """Packs tensors into flat buffers, and unpacks what came back.

    Args:
        entries: the tensors.
        workers: number of workers.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        rank: this worker's number.
        noise: for stochastic rounding; see `quantized_mean`.
        stats: to which the payload is added.

    Attributes:
        exchanges: what is to be carried out between the workers: sums, gathers, and
            the first leg of what is sent quantized.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        workers: int,
        wire_dtype: torch.dtype | None,
        rank: int,
        noise: Noise | None,
        stats: PassStats,
    ) -> None:
        self._workers, self._stats = workers, stats
        self._sums: list[_Sum] = []
        self._gathers: list[tuple[AllGather, list[Entry]]] = []
        self._quantized: list[tuple[QuantizedMean, list[Entry]]] = []
        quantized: dict[tuple[Format, torch.dtype, torch.device], list[Entry]] = {}
        gathered: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
        summed: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
        for entry in entries:
            tensor = entry.tensor
            wire = tensor.dtype
            if wire_dtype is not None and tensor.is_floating_point():
                wire = wire_dtype
            payload = tensor.numel() * wire.itemsize
            if entry.format is not None:
                quantized.setdefault((entry.format, tensor.dtype, tensor.device), []).append(entry)
                stats.spared += payload
                continue
            groups = gathered if entry.gathered else summed
            groups.setdefault((wire, tensor.device), []).append(entry)
            stats.bytes[entry.kind] += payload
        for (format, _, _), members in quantized.items():
            tensors = [entry.tensor for entry in members]
            mean = QuantizedMean(format, tensors, workers, rank, noise)
            self._add_quantized(mean, members)
        for (wire, _), members in gathered.items():
            self._add_gather(wire, members)
        for (wire, _), members in summed.items():
            self._add_sum(wire, members)
        self._to_check = [mean.numbers for mean, _ in self._quantized]
        self._to_check += [gather.own for gather, _ in self._gathers]
        self._to_check += [one.buffer for one in self._sums]
        self.exchanges: list[Exchange] = [one.buffer for one in self._sums]
        self.exchanges += [gather for gather, _ in self._gathers]
        self.exchanges += [mean.scatter() for mean, _ in self._quantized]

    def _add_quantized(self, mean: QuantizedMean, members: list[Entry]) -> None:
        self._quantized.append((mean, members))
        self._stats.surplus += mean.filling
        self._stats.spared -= mean.filling
        for entry, sent in zip(members, mean.bytes, strict=True):
            self._stats.bytes[entry.kind] += sent
            self._stats.spared -= sent

    def _add_gather(self, wire: torch.dtype, members: list[Entry]) -> None:
        own = torch.cat([entry.tensor.reshape(-1).to(wire) for entry in members])
        self._gathers.append((AllGather(own, own.new_empty(self._workers, own.numel())), members))
        if self._workers > 1:
            self._stats.surplus += own.nbytes * (self._workers / 2 - 1)

    def _add_sum(self, wire: torch.dtype, members: list[Entry]) -> None:
        """Add a buffer that is summed: the averaged entries first, each group in the
        order given.
        """
        members = sorted(members, key=attrgetter("averaged"), reverse=True)
        pieces, lengths, averaged_length, rounds = [], [], 0, False
        for entry in members:
            flat = entry.tensor.reshape(-1)
            lengths.append(flat.numel())
            if entry.averaged:
                averaged_length += flat.numel()
                rounds |= flat.dtype != wire
                if wire == torch.float16 and self._workers > 1:
                    # before the cast: 8e4 / 4 fits float16, 8e4 does not
                    flat = flat / self._workers
            pieces.append(flat.to(wire))
        buffer = torch.cat(pieces)
        for entry, sent in zip(members, buffer.split(lengths), strict=True):
            entry.sent = sent
        own = buffer.clone() if rounds else None
        self._sums.append(_Sum(buffer, members, averaged_length, own))

    def second_leg(self) -> list[Exchange]:
        """Return what comes after `exchanges`, which must have been carried out; empty
        where nothing is sent quantized.
        """
        return [mean.gather() for mean, _ in self._quantized] if self._quantized else []

    def all_sound(self) -> Tensor:
        """Return whether every number that is to be exchanged or has arrived is finite,
        and small enough that what is computed from it stays so: a 0-d bool on the
        device of the first buffer that is looked at.

        It is read off the least and the largest number: NaN passes through them, and no
        overflow spoils them, as it would a sum. After the last collective of a step a
        worker cannot tell the others of an overflow any more, hence the margin in
        `_largest`.
        """
        home = self._to_check[0].device
        flags = []
        for buffer in self._to_check:
            if buffer.numel() and buffer.is_floating_point():
                ends = torch.stack(torch.aminmax(buffer)).abs()
                flags.append((ends <= LARGEST[buffer.dtype]).all().to(home))
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=home)

    def unpack(self) -> Tensor:
        """Fill in `mean` and `own` of all entries, once everything was exchanged;
        return whether all that has arrived is sound, as `all_sound` does.
        """
        self._to_check = [one.buffer for one in self._sums]
        if self._gathers or self._quantized:
            self._to_check += [gather.everyone for gather, _ in self._gathers]
            self._to_check += [mean.decode() for mean, _ in self._quantized]
        sound = self.all_sound()
        for quantized, members in self._quantized:
            for entry, answer in zip(members, quantized.answers(), strict=True):
                entry.mean, entry.own = answer
        for gather, members in self._gathers:
            lengths = [entry.tensor.numel() for entry in members]
            for entry, everyone in zip(members, gather.everyone.split(lengths, dim=1), strict=True):
                tensor = entry.own = entry.tensor
                entry.mean = everyone.reshape(self._workers, *tensor.shape).to(tensor.dtype)
        for one in self._sums:
            divided = one.buffer.dtype == torch.float16 and self._workers > 1
            if not divided and one.own is None:
                one.buffer[: one.averaged_length].div_(self._workers)
            start = 0
            for entry in one.entries:
                like = entry.own = entry.tensor
                entry.mean = entry.sent.view(like.shape).to(like.dtype)
                stop = start + like.numel()
                if one.own is not None and entry.averaged:
                    entry.own = one.own[start:stop].view(like.shape).to(like.dtype)
                    if divided:
                        entry.own = entry.own * self._workers
                    else:  # in the computation's dtype: a 16-bit quotient would round once more
                        entry.mean = entry.mean / self._workers
                start = stop
        return sound
