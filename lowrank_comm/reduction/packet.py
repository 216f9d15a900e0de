"""What one packet carries: the requests of a phase, of all compressors together.

The first packet of a pass also carries everything that is averaged uncompressed, and
the control numbers:

    [0] 1 if this worker holds a number that is not finite (or next to the end of its
          dtype's range), else 0
    [1:]  for each parameter, 1 if this worker had a gradient, else 0; NaN, which vetoes
          the pass, if that cannot be averaged (`gradients.unusable`)

Where the ranks of a node compute whole matrices together, a request is shared out among
them on the way in and put together on the way back (`intra_node_requests`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_comm.communication.flat_buffers import Entry, FlatBuffers
from lowrank_comm.compressors.requests import ComputeOnce, Gather, Mean
from lowrank_comm.numerics.device import numbers_on
from lowrank_comm.numerics.quantization import FORMATS
from lowrank_comm.reduction.compressor_steps import OnTheWire
from lowrank_comm.reduction.passes import Pass


class Packet:
    """One phase on the wire.

    Args:
        one: the pass; its bytes are counted.
        phase: number of the packet, from 0.
        asking: the compressors' requests, by generator.

    Attributes:
        buffers: what is to be exchanged between the workers.
        sound: whether every number that came back is finite: a 0-d bool on the device.
        dense: the means of what is averaged uncompressed; of the first packet.
        control: the sum of the control numbers over the workers; of the first packet.
    """

    def __init__(self, one: Pass, phase: int, asking: Mapping[int, OnTheWire]) -> None:
        wire = one.wire
        self._in_the_node = wire.in_the_node
        noise = one.noise(phase) if one.noise else None
        self._asking = asking
        self._shares = wire.in_the_node.shares(asking, one.computed_once)
        self._entries: dict[int, Entry] = {}
        for k, request in asking.items():
            if isinstance(request, Mean):
                format = FORMATS[request.codes] if request.codes else wire.formats.get(request.kind)
                tensor = self._shares[k].tensor if k in self._shares else request.tensor
                dtype = wire.dtypes.get(request.kind)
                self._entries[k] = Entry(tensor, request.kind, format=format, wire=dtype)
            elif isinstance(request, Gather):
                self._entries[k] = Entry(request.tensor, request.kind, gathered=True)
            else:
                self._entries[k] = Entry(self._shares[k].tensor, request.kind, averaged=False)
                one.computed_once += len(request.matrices)
        entries = list(self._entries.values())
        self._dense: list[Entry] = []
        self._control: Entry | None = None
        if phase == 0:
            self._dense = [Entry(tensor, "dense") for tensor in one.dense]
            entries += self._dense
            numbers = [0.0, *map(float, one.has_gradient)]
            # of what comes first in a sum: that needs no buffer of its own
            sums = [one.tensor.dtype for one in entries if not (one.gathered or one.format)]
            dtype = sums[0] if sums else torch.float32
            control = numbers_on(wire.workers.device, numbers, dtype)
            self._control = Entry(control, "control", averaged=False)
            entries.append(self._control)
        self.buffers = FlatBuffers(entries, one.size, wire.dtype, one.rank, noise, one.stats)
        if self._control is not None:
            flag = self._control.sent[0]
            torch.logical_not(self.buffers.all_sound().to(flag.device), out=flag)
        self.control: Tensor | None = None
        self.dense: list[Tensor] = []

    def unpack(self) -> dict[int, object]:
        """Return the compressors' answers, by generator, once all was exchanged."""
        self.sound = self.buffers.unpack()
        self.dense = [entry.mean for entry in self._dense]
        if self._control is not None:
            self.control = self._control.mean
        answers: dict[int, object] = {}
        for k, entry in self._entries.items():
            if isinstance(self._asking[k], ComputeOnce | Gather):
                answers[k] = entry.mean
            elif k in self._shares:
                answers[k] = self._in_the_node.put_together(self._shares[k], entry.mean, entry.own)
            else:
                answers[k] = (entry.mean, entry.own)
        return answers
