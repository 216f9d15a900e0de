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
        suspects: whether packets were sound; any that was not is a veto.
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
        self.suspects.append(packet.sound.reshape(1))
        if packet.control is not None:
            self._control = packet.control

    def read(self, asked: Mapping[int, Decide | Read]) -> dict[int, object] | None:
        """Read everything that the host waits for, in one transfer.

        Args:
            asked: the compressors' decisions, by generator.

        Returns:
            The answers; None if some worker vetoed the pass.
        """
        order, parts = _joined(asked)
        count = len(self.suspects)
        parts += self.suspects
        if self._control is not None:
            parts.append(self._control)
        home = parts[0].device
        flat = torch.cat([part.to(home) for part in parts])
        if self._in_the_node.size > 1:
            flat = flat.to(torch.float32)
            self._in_the_node.sum_(flat, "control")
        everyone = float(self._in_the_node.size)
        # decisions are yes, packets sound, no flag is raised, all gradients there
        hoped = [everyone] * len(flat)
        if self._control is not None:
            hoped[-len(self._control)] = 0.0
        numbers = self._in_the_node.read(flat, hoped)
        answers: dict[int, object] = {}
        for k in order:
            length = asked[k].tensor.numel()
            own, numbers = numbers[:length], numbers[length:]
            answers[k] = own if isinstance(asked[k], Read) else own == [everyone] * length
        flags, mask = numbers[:count], numbers[count:]
        vetoed = flags != [everyone] * count
        if self._control is not None:
            # NaN too
            vetoed |= mask[0] != 0
            self.present = [value > 0 for value in mask[1:]]
        self.suspects, self._control = [], None
        if vetoed:
            self.refused = any(map(math.isnan, mask))
            return None
        return answers


def _joined(asked: Mapping[int, Decide | Read]) -> tuple[list[int], list[Tensor]]:
    """Return generators, and their numbers in this order: those to be read, then 1 for
    each that is above its limit, joined where the limits are the same.
    """
    order: list[int] = []
    parts: list[Tensor] = []
    alike: dict[tuple[float, torch.device], tuple[list[int], list[Tensor]]] = {}
    for k, one in asked.items():
        if isinstance(one, Read):
            order.append(k)
            parts.append(one.tensor.reshape(-1))
        else:
            members, numbers = alike.setdefault((one.limit, one.tensor.device), ([], []))
            members.append(k)
            numbers.append(one.tensor)
    for (limit, _), (members, numbers) in alike.items():
        order += members
        parts.append(torch.cat(numbers) > limit)
    return order, parts
