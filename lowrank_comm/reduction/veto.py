"""What the host reads of a pass, and whether a worker vetoed it.

A packet is suspicious if some worker raised the flag among its control numbers, or if
the sum itself is not finite (it may overflow on a narrow wire). The host reads that
together with the compressors' own decisions, in one transfer for all batches, at the
latest before anything that a NaN would break or that cannot be taken back: two
transfers in an ordinary step of PowerSGD. Every worker reads the same sums, so all see
the same veto.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.compressors.requests import Decide, Read
from lowrank_comm.reduction.packet import Packet


class Veto:
    """What has come back and was not read by the host so far.

    Args:
        in_the_node: the ranks that must read the same.

    Attributes:
        suspects: flags of packets; any that is not zero is a veto.
        present: for each parameter, whether any worker had a gradient; None before that
            was read.
        refused: after a veto, whether some worker's gradient cannot be averaged.
    """

    def __init__(self, in_the_node: IntraNodeGroup) -> None:
        self._in_the_node = in_the_node
        self.suspects: list[Tensor] = []
        self._control: Tensor | None = None
        self.present: list[bool] | None = None
        self.refused = False

    def suspect(self, packet: Packet) -> None:
        """Remember what a packet brought, to be read with what comes next."""
        self.suspects.append(packet.unsound)
        if packet.control is not None:
            self._control = packet.control

    def read(self, asked: Mapping[int, Decide | Read]) -> dict[int, object] | None:
        """Read everything that the host waits for, in one transfer.

        Args:
            asked: the compressors' decisions, by generator.

        Returns:
            The answers; None if some worker vetoed the pass.
        """
        parts = [
            (~one.flag.all()).reshape(1) if isinstance(one, Decide) else one.tensor.reshape(-1)
            for one in asked.values()
        ]
        count = len(self.suspects)
        if self.suspects:
            parts.append(torch.stack(self.suspects))
        if self._control is not None:
            parts.append(self._control)
        home = parts[0].device
        flat = torch.cat([part.to(device=home, dtype=torch.float32) for part in parts])
        if self._in_the_node.size > 1:
            self._in_the_node.sum_(flat, "control")
        numbers = flat.tolist()
        answers: dict[int, object] = {}
        for (k, one), part in zip(asked.items(), parts, strict=False):
            length = part.numel()
            answers[k] = numbers[0] == 0 if isinstance(one, Decide) else numbers[:length]
            numbers = numbers[length:]
        flags, mask = numbers[:count], numbers[count:]
        if self._control is not None:
            flags.append(mask[0])
            self.present = [value > 0 for value in mask[1:]]
        self.suspects, self._control = [], None
        if any(flags):
            self.refused = any(map(math.isnan, mask))
            return None
        return answers
