"""One phase on the wire: the requests of all matrices packed into one flat buffer for
each wire dtype and device.

A buffer holds the tensors to be averaged first, then those that are only summed
(results that one worker computed and the others padded with zeros; control numbers). It
is summed over the workers in place by the driver of the pass; then `answers` cuts it
into pieces again. For float16 wires the division by the number of workers comes before
the sum, which would overflow otherwise.

What is to be gathered has buffers of its own, and what is sent quantized
(`quantized_mean`) takes two legs: `exchanges` is the first leg of all, `second_leg` what
comes after it, if anything.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, Exchange
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
    """Largest magnitude that may be sent: 2^24 below the end of the range, for sums over
    rows and workers of what arrives. float16 has no room to spare, and what arrives in
    it is computed with in float32.
    """
    largest = torch.finfo(dtype).max
    return largest if dtype == torch.float16 else largest * 2.0**-24


LARGEST = {dtype: _largest(dtype) for dtype in WIRE_DTYPES.values()}


@dataclass
class _Entry:
    """One tensor of a packet, and where it lies in a sealed buffer.

    Attributes:
        wire: dtype on the wire.
        format: in which it is sent quantized, or None.
        buffer, start: the buffer that is summed, and the place in it.
    """

    tensor: Tensor
    kind: str
    averaged: bool
    wire: torch.dtype
    gathered: bool = False
    format: Format | None = None
    buffer: Tensor | None = None
    start: int = 0


@dataclass
class _Sum:
    """A buffer that is summed over the workers.

    Attributes:
        buffer: the averaged entries, then those that are only summed.
        entries: their numbers.
        averaged_length: elements of the averaged entries.
        own: this worker's numbers as they went on the wire, where that rounds.
    """

    buffer: Tensor
    entries: list[int]
    averaged_length: int
    own: Tensor | None


class FlatBuffers:
    """Packs tensors into flat buffers, and unpacks what came back.

    Args:
        workers: number of workers.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        rank: this worker's number.
        noise: for stochastic rounding; see `quantized_mean`.

    Attributes:
        exchanges: once sealed, what is to be carried out between the workers: sums,
            gathers, and the first leg of what is sent quantized.
        bytes: payload by the ledger's kinds.
        surplus, spared: see `ledger`.
    """

    def __init__(
        self,
        workers: int,
        wire_dtype: torch.dtype | None,
        rank: int = 0,
        noise: Noise | None = None,
    ) -> None:
        self._workers, self._wire_dtype, self._rank, self._noise = workers, wire_dtype, rank, noise
        self._entries: list[_Entry] = []
        self._sums: list[_Sum] = []
        self._gathers: list[tuple[AllGather, list[int]]] = []
        self._quantized: list[tuple[QuantizedMean, list[int]]] = []
        self._to_check: list[Tensor] = []
        self.exchanges: list[Exchange] = []
        self.bytes: Counter[str] = Counter()
        self.surplus = 0.0
        self.spared = 0

    def add(
        self,
        tensor: Tensor,
        kind: str,
        averaged: bool = True,
        format: Format | None = None,
        gathered: bool = False,
    ) -> int:
        """Put a tensor in; return its number.

        Args:
            tensor: of any shape.
            kind: the ledger's.
            averaged: whether the sum over the workers is divided by their number.
            format: in which it is averaged quantized, or None.
            gathered: whether everyone is to have everyone's instead.
        """
        wire = tensor.dtype
        if self._wire_dtype is not None and tensor.is_floating_point():
            wire = self._wire_dtype
        self._entries.append(_Entry(tensor, kind, averaged, wire, gathered, format))
        return len(self._entries) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor added first that is summed: control numbers that take it need
        no buffer of their own.
        """
        for entry in self._entries:
            if not entry.gathered and entry.format is None:
                return entry.tensor.dtype
        return torch.float32

    def seal(self) -> None:
        """Build the buffers; afterwards `exchanges` may be carried out."""
        quantized: dict[tuple[Format, torch.dtype, torch.device], list[int]] = {}
        gathered: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        summed: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k, entry in enumerate(self._entries):
            tensor, wire = entry.tensor, entry.wire
            if entry.format is not None:
                quantized.setdefault((entry.format, tensor.dtype, tensor.device), []).append(k)
                continue
            groups = gathered if entry.gathered else summed
            groups.setdefault((wire, tensor.device), []).append(k)
            self.bytes[entry.kind] += tensor.numel() * wire.itemsize
        for (format, _, _), members in quantized.items():
            self._seal_quantized(format, members)
        for (wire, _), members in gathered.items():
            self._seal_gather(wire, members)
        for (wire, _), members in summed.items():
            self._seal_sum(wire, members)
        self.exchanges += [gather for gather, _ in self._gathers]
        self.exchanges += [mean.scatter() for mean, _ in self._quantized]

    def _seal_quantized(self, format: Format, members: list[int]) -> None:
        tensors = [self._entries[k].tensor for k in members]
        mean = QuantizedMean(format, tensors, self._workers, self._rank, self._noise)
        self._quantized.append((mean, members))
        self._to_check.append(mean.numbers)
        self.surplus += mean.filling
        self.spared -= mean.filling
        for k, sent in zip(members, mean.bytes, strict=True):
            entry = self._entries[k]
            self.bytes[entry.kind] += sent
            self.spared += entry.tensor.numel() * entry.wire.itemsize - sent

    def _seal_gather(self, wire: torch.dtype, members: list[int]) -> None:
        own = torch.cat([self._entries[k].tensor.reshape(-1).to(wire) for k in members])
        gather = AllGather(own, own.new_empty(self._workers, own.numel()))
        self._gathers.append((gather, members))
        self._to_check.append(own)
        self.surplus += own.nbytes * (self._workers / 2 - 1) if self._workers > 1 else 0.0

    def _seal_sum(self, wire: torch.dtype, members: list[int]) -> None:
        """The averaged entries come first, each group in the order of `add`."""
        averaged = [k for k in members if self._entries[k].averaged]
        members = averaged + [k for k in members if not self._entries[k].averaged]
        pieces, start, averaged_length, rounds = [], 0, 0, False
        for k in members:
            entry = self._entries[k]
            flat = entry.tensor.reshape(-1)
            entry.start, start = start, start + flat.numel()
            if entry.averaged:
                averaged_length = start
                rounds |= flat.dtype != wire
                if wire == torch.float16 and self._workers > 1:
                    # before the cast: 8e4 / 4 fits float16, 8e4 does not
                    flat = flat / self._workers
            pieces.append(flat.to(wire))
        buffer = torch.cat(pieces)
        for k in members:
            self._entries[k].buffer = buffer
        own = buffer.clone() if rounds else None
        self._sums.append(_Sum(buffer, members, averaged_length, own))
        self._to_check.append(buffer)
        self.exchanges.append(buffer)

    def write(self, number: int, values: Tensor) -> None:
        """Overwrite the first numbers of an entry in the sealed buffers."""
        entry = self._entries[number]
        assert entry.buffer is not None
        flat = values.reshape(-1).to(entry.buffer.dtype)
        entry.buffer[entry.start : entry.start + flat.numel()] = flat

    def second_leg(self) -> list[Exchange]:
        """Return what comes after `exchanges`, which must have been carried out; empty
        where nothing is sent quantized.
        """
        return [mean.gather() for mean, _ in self._quantized] if self._quantized else []

    def all_sound(self) -> Tensor:
        """Return whether every number, of what is to be exchanged or has arrived, is
        finite, and small enough that what is computed from it stays so: a 0-d bool on
        the device of what is looked at first.

        Read off the least and the largest: NaN passes through them, and no overflow
        spoils them, as it would a sum. After the last collective of a step a worker
        cannot tell the others of an overflow any more, hence the room above.
        """
        home = self._to_check[0].device
        flags = []
        for buffer in self._to_check:
            if buffer.numel() and buffer.is_floating_point():
                ends = torch.stack(torch.aminmax(buffer)).abs()
                flags.append((ends <= LARGEST[buffer.dtype]).all().to(home))
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=home)

    def arrived(self) -> None:
        """Look at what has come back: to be called when everything has been carried
        out, before `all_sound` and `answers`.
        """
        self._to_check = [one.buffer for one in self._sums]
        if self._gathers or self._quantized:
            self._to_check += [gather.everyone for gather, _ in self._gathers]
            self._to_check += [mean.decode() for mean, _ in self._quantized]

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """For every entry in the order in which they were put in: (mean or sum, own as
        sent), or (everyone's, own).
        """
        result: dict[int, tuple[Tensor, Tensor]] = {}
        for mean_of, members in self._quantized:
            result.update(zip(members, mean_of.answers(), strict=True))
        for gather, members in self._gathers:
            lengths = [self._entries[k].tensor.numel() for k in members]
            for k, everyone in zip(members, gather.everyone.split(lengths, dim=1), strict=True):
                tensor = self._entries[k].tensor
                shape = (self._workers, *tensor.shape)
                result[k] = (everyone.reshape(shape).to(tensor.dtype), tensor)
        for one in self._sums:
            divided = one.buffer.dtype == torch.float16 and self._workers > 1
            if not divided and one.own is None:
                one.buffer[: one.averaged_length].div_(self._workers)
            for k in one.entries:
                entry = self._entries[k]
                mine = entry.tensor
                piece = slice(entry.start, entry.start + mine.numel())
                mean = one.buffer[piece].view(mine.shape).to(mine.dtype)
                if one.own is not None and entry.averaged:
                    mine = one.own[piece].view(mine.shape).to(mine.dtype)
                    if divided:
                        mine = mine * self._workers
                    else:  # in the computation's dtype: a 16-bit quotient would round once more
                        mean = mean / self._workers
                result[k] = (mean, mine)
        return [result[k] for k in range(len(self._entries))]
