"""One phase on the wire: the requests of all matrices packed into one flat buffer for each wire dtype and device.

A buffer holds the tensors to be averaged first, then those that are only summed (results that one worker computed and
the others padded with zeros; control numbers). It is summed over the workers in place by whoever drives the pass; then
`answers` cuts it into pieces again. For float16 wires the division by the number of workers comes before the sum, which
would overflow otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


def _largest(dtype: torch.dtype) -> float:
    """Largest magnitude that may travel: 2^24 below the end of the range, for sums over rows and workers of what arrives.
    float16 has no room to spare, and what arrives in it is computed with in float32."""
    largest = torch.finfo(dtype).max
    return largest if dtype == torch.float16 else largest * 2.0**-24


@dataclass
class _Entry:
    """One tensor of a packet and where its answer goes."""

    tensor: Tensor
    kind: str
    averaged: bool


class Packet:
    """Packs, and unpacks what came back.

    Args:
        workers: number of workers.
        wire_dtype: dtype on the wire, or None for each tensor's own.
    """

    def __init__(self, workers: int, wire_dtype: torch.dtype | None) -> None:
        self._workers, self._wire_dtype = workers, wire_dtype
        self._entries: list[_Entry] = []
        self._order: list[list[int]] = []
        self._own: list[Tensor | None] = []
        self.buffers: list[Tensor] = []
        self.bytes: Counter[str] = Counter()

    def add(self, tensor: Tensor, kind: str, averaged: bool) -> int:
        """Put a tensor in; returns its number. `kind` is the ledger's."""
        self._entries.append(_Entry(tensor, kind, averaged))
        return len(self._entries) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor added first: control numbers that take it need no buffer of their own."""
        return self._entries[0].tensor.dtype if self._entries else torch.float32

    def seal(self) -> None:
        """Build the buffers. Afterwards `buffers` may be summed over the workers, in place."""
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for k, entry in enumerate(self._entries):
            groups.setdefault((self._wire(entry.tensor), entry.tensor.device), []).append(k)
        for (wire, _), members in groups.items():
            members.sort(key=lambda k: not self._entries[k].averaged)  # stable: the averaged ones come first
            buffer = torch.cat([self._on_wire(self._entries[k], wire) for k in members])
            rounds = any(self._entries[k].tensor.dtype != wire and self._entries[k].averaged for k in members)
            self._order.append(members)
            self._own.append(buffer.clone() if rounds else None)
            self.buffers.append(buffer)
            for k in members:
                self.bytes[self._entries[k].kind] += self._entries[k].tensor.numel() * wire.itemsize

    def write(self, number: int, values: Tensor) -> None:
        """Overwrite the first numbers of an entry in the sealed buffers."""
        buffer, start = self._locate(number)
        buffer[start : start + values.numel()] = values.reshape(-1).to(buffer.dtype)

    def all_sound(self) -> Tensor:
        """0-d bool on the first buffer's device: every number in the buffers is finite, and small enough that what is
        computed from it stays so.

        Read off the least and the largest: NaN passes through them, and no overflow spoils them, as it would a sum. After
        the last collective of a step nobody can tell the others of an overflow any more, hence the room above.
        """
        flags = [
            (torch.stack(torch.aminmax(buffer)).abs() <= _largest(buffer.dtype)).all().to(self.buffers[0].device)
            for buffer in self.buffers
            if buffer.numel()
        ]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=self.buffers[0].device)

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """(mean or sum, own as sent) for every entry in the order of `add`, after the buffers were summed."""
        result: list[tuple[Tensor, Tensor] | None] = [None] * len(self._entries)
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
            flat = flat / self._workers  # before the cast: 8e4 / 4 fits float16, 8e4 does not
        return flat.to(wire)

    def _wire(self, tensor: Tensor) -> torch.dtype:
        return self._wire_dtype or tensor.dtype

    def _divides_first(self, wire: torch.dtype) -> bool:
        return wire == torch.float16 and self._workers > 1

    def _averaged_length(self, members: list[int]) -> int:
        return sum(math.prod(self._entries[k].tensor.shape) for k in members if self._entries[k].averaged)

    def _locate(self, number: int) -> tuple[Tensor, int]:
        for buffer, members in zip(self.buffers, self._order, strict=True):
            if number in members:
                before = members[: members.index(number)]
                return buffer, sum(self._entries[k].tensor.numel() for k in before)
        raise KeyError(number)
