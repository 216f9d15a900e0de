"""What one packet carries: the requests of a phase, of all compressors together.

The first packet of a pass also carries everything that is averaged uncompressed, and
the control numbers:

    [0] 1 if this worker holds a number that is not finite (or next to the end of its
          dtype's range), else 0
    [1:]  for each parameter, 1 if this worker had a gradient, else 0

Where the ranks of a node compute whole matrices together, a request is shared out among
them on the way in and put together on the way back (`intra_node_requests`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.communication.flat_buffers import FlatBuffers
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
        first_leg: what is to be exchanged between the workers.
        unsound: 1 if a number that came back is not finite, else 0: a 0-d tensor on the
            device.
        dense: the means of what is averaged uncompressed; of the first packet.
        control: the sum of the control numbers over the workers; of the first packet.
    """

    def __init__(self, one: Pass, phase: int, asking: Mapping[int, OnTheWire]) -> None:
        wire = one.wire
        self._in_the_node = wire.in_the_node
        noise = one.noise(phase) if one.noise else None
        buffers = self._buffers = FlatBuffers(one.size, wire.dtype, one.rank, noise)
        self._asking = asking
        self._shares = wire.in_the_node.shares(asking)
        self._numbers: dict[int, int] = {}
        for k, request in asking.items():
            if isinstance(request, Mean):
                format = FORMATS[request.codes] if request.codes else wire.formats.get(request.kind)
                tensor = self._shares[k].tensor if k in self._shares else request.tensor
                self._numbers[k] = buffers.add(tensor, request.kind, format=format)
            elif isinstance(request, Gather):
                self._numbers[k] = buffers.add(request.tensor, request.kind, gathered=True)
            else:
                self._numbers[k] = buffers.add(self._shares[k].tensor, request.kind, averaged=False)
        self._dense_numbers: list[int] = []
        self.control: Tensor | None = None
        self.dense: list[Tensor] = []
        if phase == 0:
            self._dense_numbers = [buffers.add(tensor, "dense") for tensor in one.dense]
            numbers = [0.0, *map(float, one.has_gradient)]
            self.control = numbers_on(wire.workers.device, numbers, buffers.dtype)
            self._control_number = buffers.add(self.control, "control", averaged=False)
        buffers.seal()
        if self.control is not None:
            buffers.write(self._control_number, ~buffers.all_sound())
        self.first_leg: list[Exchange] = buffers.exchanges
        one.stats.bytes.update(buffers.bytes)
        one.stats.surplus += buffers.surplus
        one.stats.spared += buffers.spared

    def second_leg(self) -> list[Exchange]:
        """Return what comes after the first leg; empty where nothing is sent quantized."""
        return self._buffers.second_leg()

    def unpack(self) -> dict[int, object]:
        """Return the compressors' answers, by generator, once everything was exchanged."""
        self._buffers.arrived()
        self.unsound = (~self._buffers.all_sound()).to(torch.float32)
        pieces = self._buffers.answers()
        if self.control is not None:
            self.dense = [pieces[number][0] for number in self._dense_numbers]
            self.control = pieces[self._control_number][0]
        answers: dict[int, object] = {}
        for k, number in self._numbers.items():
            mean, own = pieces[number]
            if isinstance(self._asking[k], ComputeOnce | Gather):
                answers[k] = mean
            elif k in self._shares:
                answers[k] = self._in_the_node.put_together(self._shares[k], mean, own)
            else:
                answers[k] = (mean, own)
        return answers
