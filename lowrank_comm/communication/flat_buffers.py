"""One phase on the wire: the requests of all matrices packed into one flat buffer for
each wire dtype and device.

A buffer holds the tensors to be averaged first, then those that are only summed
(results that one worker computed and the others padded with zeros; control numbers). It
is summed over the workers in place by the driver of the pass; then `unpack` cuts it
into pieces again. For float16 wires the division by the number of workers comes before
the sum, which would overflow otherwise.

What is to be gathered has buffers of its own, and so has what is sent quantized
(`quantized_mean`), which between many workers takes two legs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, Exchange
from lowrank_comm.communication.ledger import PassStats
from lowrank_comm.communication.quantized_mean import Noise, QuantizedMean
from lowrank_comm.numerics.linalg import largest_magnitude
from lowrank_comm.numerics.quantization import Format
from lowrank_comm.options import check

WireDtype = Literal["float32", "float64", "bfloat16", "float16"]
# The largest magnitude that may be sent: 2^24 below the end of the range, for sums over
# rows and workers of what arrives. float16 has no room to spare, and what arrives in it
# is computed with in float32.
LARGEST = {torch.float16: torch.finfo(torch.float16).max} | {
    dtype: torch.finfo(dtype).max * 2.0**-24
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
}


def wire_dtype_called(name: str | None) -> torch.dtype | None:
    """Return the wire dtype of that name; None for None, each tensor's own.

    Raises:
        ConfigError: it is unknown.
    """
    check("wire_dtype", name, WireDtype | None)
    dtype: torch.dtype | None = getattr(torch, name) if name is not None else None
    return dtype


@dataclass
class Entry:
    """One tensor of a packet, and what came back for it.

    Attributes:
        tensor: of any shape.
        kind: its kind in the ledger.
        averaged: whether the sum over the workers is divided by their number.
        gathered: whether all workers are to have the tensors of all instead.
        format: in which it is averaged quantized, or None.
        wire: dtype in which it is sent, or None for that of the packet.
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
    wire: torch.dtype | None = None
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
        rounds: whether the wire is narrower than some averaged entry; `Entry.own` is
            then what went on the wire, 1-D, until it is unpacked.
    """

    buffer: Tensor
    entries: list[Entry]
    averaged_length: int
    rounds: bool


class FlatBuffers:
    """Packs tensors into flat buffers, and unpacks what came back.

    Args:
        entries: the tensors.
        workers: number of workers.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        rank: this worker's number.
        noise: for stochastic rounding; see `quantized_mean`.
        stats: to which the payload is added.
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
        self._first_leg: list[Exchange] = []
        self._to_check: list[Tensor] = []
        self._arriving: list[Tensor] = []
        quantized: dict[tuple[Format, torch.dtype, torch.device], list[Entry]] = {}
        gathered: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
        summed: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
        for entry in entries:
            tensor = entry.tensor
            wire = tensor.dtype
            asked = entry.wire or wire_dtype
            if asked is not None and tensor.is_floating_point():
                wire = asked
            payload = tensor.numel() * wire.itemsize
            if entry.format is not None:
                quantized.setdefault((entry.format, tensor.dtype, tensor.device), []).append(entry)
                stats.spared += payload
                continue
            groups = gathered if entry.gathered else summed
            groups.setdefault((wire, tensor.device), []).append(entry)
            stats.bytes[entry.kind] += payload
        for (wire, _), members in summed.items():
            self._add_sum(wire, members)
        for (wire, _), members in gathered.items():
            self._add_gather(wire, members)
        for (format, _, _), members in quantized.items():
            tensors = [entry.tensor for entry in members]
            mean = QuantizedMean(format, tensors, workers, rank, noise)
            self._add_quantized(mean, members)

    def _add_quantized(self, mean: QuantizedMean, members: list[Entry]) -> None:
        self._quantized.append((mean, members))
        self._first_leg.append(mean.first_leg())
        self._to_check.append(mean.largest())
        self._stats.surplus += mean.surplus
        self._stats.spared -= mean.surplus
        for entry, sent in zip(members, mean.bytes, strict=True):
            self._stats.bytes[entry.kind] += sent
            self._stats.spared -= sent

    def _add_gather(self, wire: torch.dtype, members: list[Entry]) -> None:
        own = torch.cat([entry.tensor.reshape(-1).to(wire) for entry in members])
        gather = AllGather(own, own.new_empty(self._workers, own.numel()))
        self._gathers.append((gather, members))
        self._first_leg.append(gather)
        self._to_check.append(own)
        self._arriving.append(gather.everyone)
        self._stats.surplus += own.nbytes * max(self._workers / 2 - 1, 0)

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
                if wire == torch.float16:
                    # before the cast: 8e4 / 4 fits float16, 8e4 does not
                    flat = flat / self._workers
            pieces.append(flat)
        # cast on the way, without a cast copy of each
        buffer = pieces[0].new_empty(sum(lengths), dtype=wire)
        torch.cat(pieces, out=buffer)
        as_sent = buffer.clone() if rounds else buffer
        cut = zip(buffer.split(lengths), as_sent.split(lengths), strict=True)
        for entry, (sent, own) in zip(members, cut, strict=True):
            entry.sent, entry.own = sent, own
        self._sums.append(_Sum(buffer, members, averaged_length, rounds))
        self._first_leg.append(buffer)
        self._to_check.append(buffer)
        self._arriving.append(buffer)

    def legs(self) -> Iterator[list[Exchange]]:
        """Yield what is to be carried out between the workers, one leg after the other:
        sums, gathers, and the first leg of what is sent quantized, which are on the
        wire side by side; then the second leg of what takes two.
        """
        yield self._first_leg
        further = [leg for mean, _ in self._quantized if (leg := mean.second_leg()) is not None]
        if further:
            yield further

    def all_sound(self) -> Tensor:
        """Return whether every number that is to be exchanged or has arrived is finite,
        and small enough that what is computed from it stays so: a 0-d bool on the
        device of the first buffer that is looked at.

        It is read off the largest magnitude: NaN passes through it, and no overflow
        spoils it, as it would a sum. After the last collective of a step a worker
        cannot tell the others of an overflow any more, hence the margin in `LARGEST`.
        """
        home = self._to_check[0].device
        flags = [
            (largest_magnitude(buffer) <= LARGEST[buffer.dtype]).to(home)
            for buffer in self._to_check
            if buffer.numel() and buffer.is_floating_point()
        ]
        if not flags:
            return torch.ones((), dtype=torch.bool, device=home)
        return flags[0] if len(flags) == 1 else torch.stack(flags).all()

    def unpack(self) -> Tensor:
        """Fill in `mean` and `own` of all entries, once everything was exchanged;
        return whether all that has arrived is sound, as `all_sound` does.
        """
        for quantized, _ in self._quantized:
            quantized.decode()
        self._to_check = self._arriving + [mean.largest() for mean, _ in self._quantized]
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
            divided = one.buffer.dtype == torch.float16
            if not divided and not one.rounds and self._workers > 1:
                one.buffer[: one.averaged_length].div_(self._workers)
            for entry in one.entries:
                like = entry.tensor
                entry.mean = entry.sent.view(like.shape).to(like.dtype)
                if one.rounds and entry.averaged:
                    entry.own = entry.own.view(like.shape).to(like.dtype)
                    if divided:
                        entry.own.mul_(self._workers)
                    else:  # in the computation's dtype: a 16-bit quotient would round once more
                        entry.mean.div_(self._workers)
                else:
                    entry.own = like
        return sound
