"""One phase on the wire: the requests of all matrices packed into one flat buffer for
each wire dtype and device.

A buffer holds the tensors to be averaged first, then those that are only summed
(results that one worker computed and the others padded with zeros; control numbers). It
is summed over the workers in place by whoever drives the pass; then `answers` cuts it
into pieces again. For float16 wires the division by the number of workers comes before
the sum, which would overflow otherwise.

What is to be gathered has buffers of its own, and what travels as codes (`coded`) takes
two legs: `exchanges` is the first leg of all, `second_leg` what comes after it, if
anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, Exchange
from lowrank_comm.communication.quantized_mean import Noise, QuantizedMean
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import Format

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
    if name is not None and name not in WIRE_DTYPES:
        raise ConfigError(
            f"wire_dtype={name!r} is unknown; leave it out, or use one of {', '.join(WIRE_DTYPES)}."
        )
    return WIRE_DTYPES[name] if name is not None else None


def _largest(dtype: torch.dtype) -> float:
    """Largest magnitude that may travel: 2^24 below the end of the range, for sums over
    rows and workers of what arrives. float16 has no room to spare, and what arrives in
    it is computed with in float32.
    """
    largest = torch.finfo(dtype).max
    return largest if dtype == torch.float16 else largest * 2.0**-24


@dataclass
class _Entry:
    """One tensor of a packet and where its answer goes. `format`: of the codes in which
    it is averaged.
    """

    tensor: Tensor
    kind: str
    averaged: bool
    gathered: bool = False
    format: Format | None = None


class FlatBuffers:
    """Packs, and unpacks what came back.

    Args:
        workers: number of workers.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        rank: this worker's number.
        noise: for stochastic rounding to codes; see `coded`.
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
        self._order: list[list[int]] = []
        self._own: list[Tensor | None] = []
        self._gathers: list[tuple[AllGather, list[int]]] = []
        self._coded: list[tuple[QuantizedMean, list[int]]] = []
        self._to_check: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.bytes: Counter[str] = Counter()
        self.surplus = 0.0
        self.spared = 0

    def add(self, tensor: Tensor, kind: str, averaged: bool, format: Format | None = None) -> int:
        """Put a tensor in, to be averaged (as codes, if `format` is given) or summed;
        returns its number. `kind` is the ledger's.
        """
        self._entries.append(_Entry(tensor, kind, averaged, format=format))
        return len(self._entries) - 1

    def add_to_gather(self, tensor: Tensor, kind: str) -> int:
        """Put a tensor in, of which everyone is to have everyone's; returns its number."""
        self._entries.append(_Entry(tensor, kind, averaged=False, gathered=True))
        return len(self._entries) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor added first that is summed: control numbers that take it need
        no buffer of their own.
        """
        return next(
            (e.tensor.dtype for e in self._entries if not e.gathered and e.format is None),
            torch.float32,
        )

    def seal(self) -> None:
        """Build the buffers. Afterwards `exchanges` may be carried out."""
        coded: dict[tuple[Format, torch.dtype, torch.device], list[int]] = {}
        for k, entry in enumerate(self._entries):
            if entry.format is not None:
                coded.setdefault(
                    (entry.format, entry.tensor.dtype, entry.tensor.device), []
                ).append(k)
        for (format, _, _), members in coded.items():
            mean = QuantizedMean(
                format,
                [self._entries[k].tensor for k in members],
                self._workers,
                self._rank,
                self._noise,
            )
            self._coded.append((mean, members))
            self._to_check.append(mean.numbers)
            self.surplus += mean.filling
            self.spared -= mean.filling
            for k, sent in zip(members, mean.bytes, strict=True):
                self.bytes[self._entries[k].kind] += sent
                self.spared += (
                    self._entries[k].tensor.numel() * self._wire(self._entries[k].tensor).itemsize
                    - sent
                )
        for (wire, _), members in self._grouped(gathered=True).items():
            own = torch.cat([self._entries[k].tensor.reshape(-1).to(wire) for k in members])
            self._gathers.append(
                (AllGather(own, own.new_empty(self._workers, own.numel())), members)
            )
            self._to_check.append(own)
            self._count(members, wire)
            self.surplus += own.nbytes * (self._workers / 2 - 1) if self._workers > 1 else 0.0
        for (wire, _), members in self._grouped(gathered=False).items():
            # stable: the averaged ones come first
            members.sort(key=lambda k: not self._entries[k].averaged)
            buffer = torch.cat([self._on_wire(self._entries[k], wire) for k in members])
            rounds = any(
                self._entries[k].tensor.dtype != wire and self._entries[k].averaged for k in members
            )
            self._order.append(members)
            self._own.append(buffer.clone() if rounds else None)
            self.buffers.append(buffer)
            self._count(members, wire)
        self._to_check += self.buffers

    def _grouped(self, gathered: bool) -> dict[tuple[torch.dtype, torch.device], list[int]]:
        """What is gathered, or summed, by dtype on the wire and device."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k, entry in enumerate(self._entries):
            if entry.format is None and entry.gathered == gathered:
                groups.setdefault((self._wire(entry.tensor), entry.tensor.device), []).append(k)
        return groups

    def _count(self, members: Sequence[int], wire: torch.dtype) -> None:
        for k in members:
            self.bytes[self._entries[k].kind] += self._entries[k].tensor.numel() * wire.itemsize

    @property
    def exchanges(self) -> list[Exchange]:
        """What is to be carried out between the workers: sums, gathers, and the first
        leg of what travels as codes.
        """
        first_leg = [mean.scatter() for mean, _ in self._coded]
        return [*self.buffers, *(gather for gather, _ in self._gathers), *first_leg]

    def second_leg(self) -> list[Exchange]:
        """What comes after the first leg, which must have been carried out; empty where
        nothing travels as codes.
        """
        return [mean.gather() for mean, _ in self._coded]

    def arrived(self) -> None:
        """To be called when everything has been carried out, before `all_sound` and
        `answers`.
        """
        self._to_check = [*self.buffers, *(gather.everyone for gather, _ in self._gathers)]
        self._to_check += [mean.decode() for mean, _ in self._coded]

    def write(self, number: int, values: Tensor) -> None:
        """Overwrite the first numbers of an entry in the sealed buffers."""
        buffer, start = self._locate(number)
        buffer[start : start + values.numel()] = values.reshape(-1).to(buffer.dtype)

    def all_sound(self) -> Tensor:
        """0-d bool on the device of what is looked at first: every number, of what is
        to be exchanged or has arrived, is finite, and small enough that what is
        computed from it stays so.

        Read off the least and the largest: NaN passes through them, and no overflow
        spoils them, as it would a sum. After the last collective of a step nobody can
        tell the others of an overflow any more, hence the room above.
        """
        home = self._to_check[0].device
        flags = [
            (torch.stack(torch.aminmax(buffer)).abs() <= _largest(buffer.dtype)).all().to(home)
            for buffer in self._to_check
            if buffer.numel() and buffer.is_floating_point()
        ]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=home)

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """For every entry in the order in which they were put in: (mean or sum, own as
        sent), or (everyone's, own).
        """
        result: list[tuple[Tensor, Tensor] | None] = [None] * len(self._entries)
        for mean_of, members in self._coded:
            for k, pair in zip(members, mean_of.answers(), strict=True):
                result[k] = pair
        for gather, members in self._gathers:
            lengths = [self._entries[k].tensor.numel() for k in members]
            for k, everyone in zip(members, gather.everyone.split(lengths, dim=1), strict=True):
                tensor = self._entries[k].tensor
                result[k] = (
                    everyone.reshape(self._workers, *tensor.shape).to(tensor.dtype),
                    tensor,
                )
        for buffer, own, members in zip(self.buffers, self._own, self._order, strict=True):
            length = self._averaged_length(members)
            divided = self._divides_first(buffer.dtype)
            if not divided and own is None:
                buffer[:length].div_(self._workers)
            start = 0
            for k in members:
                entry = self._entries[k]
                piece = slice(start, start + entry.tensor.numel())
                start = piece.stop
                mean, mine = buffer[piece].view(entry.tensor.shape), entry.tensor
                if own is not None and entry.averaged:
                    mean, mine = mean.to(mine.dtype), own[piece].view(mine.shape).to(mine.dtype)
                    if divided:
                        mine = mine * self._workers
                    else:  # in the computation's dtype: a 16-bit quotient would round once more
                        mean = mean / self._workers
                elif mean.dtype != mine.dtype:
                    mean = mean.to(mine.dtype)
                result[k] = (mean, mine)
        return [pair for pair in result if pair is not None]

    def _on_wire(self, entry: _Entry, wire: torch.dtype) -> Tensor:
        flat = entry.tensor.reshape(-1)
        if entry.averaged and self._divides_first(wire):
            # before the cast: 8e4 / 4 fits float16, 8e4 does not
            flat = flat / self._workers
        return flat.to(wire)

    def _wire(self, tensor: Tensor) -> torch.dtype:
        return (self._wire_dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype

    def _divides_first(self, wire: torch.dtype) -> bool:
        return wire == torch.float16 and self._workers > 1

    def _averaged_length(self, members: list[int]) -> int:
        return sum(
            math.prod(self._entries[k].tensor.shape) for k in members if self._entries[k].averaged
        )

    def _locate(self, number: int) -> tuple[Tensor, int]:
        for buffer, members in zip(self.buffers, self._order, strict=True):
            if number in members:
                before = members[: members.index(number)]
                return buffer, sum(self._entries[k].tensor.numel() for k in before)
        raise KeyError(number)
