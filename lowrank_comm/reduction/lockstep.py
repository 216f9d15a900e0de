"""Many compressors, one conversation: drives the generators of all batches in lock-step
phases.

In each round every live generator is advanced to its next request for communication;
the requests of a round form one `FlatBuffers`; the packet's exchanges are yielded, to
be carried out by whoever drives this generator (a process group, or the simulation of N
workers side by side); the pieces are handed back as answers. So a step has as many
collectives as the algorithm has phases, however many matrices there are; what travels
as codes takes two instead of one. The first packet also carries everything that travels
dense, and the control numbers:

    [0] 1 if this worker holds a number that is not finite (or next to the end of its
          dtype's range), else 0
    [1:]  for each parameter, 1 if this worker had a gradient, else 0

A generator may wait until it is known which gradients exist (`Presence`); it has no
part in the first packet then.

Where a worker is a node whose ranks hold blocks of rows of its matrices
(`IntraNodeGroup.whole_matrices`), all ranks of all nodes are in lock-step. What
contracts over rows is summed inside the node before it travels; each rank then carries
its share of the sum to the other nodes, and the node puts the shares together again.
What the host reads is agreed inside the node.

The veto. A packet is suspicious if some worker raised the flag, or if the sum itself is
not finite (it may overflow on a narrow wire). That is read by the host together with
the compressors' own decisions, in one transfer for all batches, at the latest before
anything that a NaN would break or that cannot be taken back: two transfers in an
ordinary step of PowerSGD. Every worker reads the same sums, so all see the same veto,
close their generators and return.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.communication.flat_buffers import FlatBuffers
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.communication.quantized_mean import Noise
from lowrank_comm.compressors.base import Result
from lowrank_comm.compressors.requests import Decide, Read, Request
from lowrank_comm.numerics.device import numbers_on
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.intra_node_requests import IntraNodeRequests, _AtOnce, _OnTheWire

Exchanges = Generator[list[Exchange], int, "Agreed | None"]


@dataclass(frozen=True)
class Presence:
    """Request of the reducer's own, for steps that depend on it: for each parameter,
    whether any worker has a gradient. That is known when the first packet has come
    back, so who asks takes no part in that packet, but in those that follow.
    """


Passing = Generator[Request | Presence, Any, Result | None]


@dataclass
class Agreed:
    """What a pass that nobody vetoed ends with.

    Attributes:
        results: of the generators, in their order; None of one that found out that it
            has nothing to do.
        dense: the means of the dense tensors, in their order.
        present: for each parameter, whether any worker had a gradient.
    """

    results: list[Result | None]
    dense: list[Tensor]
    present: list[bool]


@dataclass
class PassStats:
    """Bytes by kind, collectives, and host seconds by phase of one pass; filled while
    it runs, vetoed or not. `inside`: bytes by kind between the ranks of a node;
    `surplus`, `spared`: see `communication.ledger`.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    collectives: int = 0
    surplus: float = 0.0
    spared: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"compress": 0.0, "communicate": 0.0})


def lockstep(
    steps: Sequence[Passing],
    dense: Sequence[Tensor],
    has_gradient: Sequence[bool],
    *,
    workers: int,
    rank: int,
    wire_dtype: torch.dtype | None,
    device: torch.device,
    stats: PassStats,
    intra_node: IntraNodeGroup,
    quantization: Quantization | None = None,
    noise: Callable[[int], Noise] | None = None,
) -> Exchanges:
    """One pass.

    Args:
        steps: fresh generators of compressors, in the same order on all workers; they
            may ask for `Presence` first.
        dense: tensors to be averaged as they are.
        has_gradient: for each parameter, whether this worker has one.
        workers, rank: size of the group, and this worker's number in it.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        device: where the control numbers live.
        account: filled in.
        intra_node: the ranks of this node; they take part in the conversation if they
            compute whole matrices together.
        quantization: what travels as codes, by kind.
        noise: number of a packet -> its draws for stochastic rounding.

    Yields:
        What is to be exchanged in a phase, or in one of its legs; is sent the number of
        collectives that it took.

    Returns:
        `Agreed`, or None if any worker's numbers were not finite.
    """
    inside = IntraNodeRequests(
        intra_node if intra_node.whole_matrices else IntraNodeGroup(), workers, rank
    )
    run = _Run(steps)
    # sums that decide about a veto, not read by the host so far
    suspects: list[Tensor] = []
    control_sum: Tensor | None = None
    present: list[bool] = []
    dense_answers: list[Tensor] = []
    clock = time.perf_counter()
    first, phase, codes = True, 0, quantization or Quantization()
    while True:
        # requests that need no packet; decisions are read with the suspects in one
        # transfer
        while run.advance():
            run.answers.update(inside.answer(run.at_once))
            waiting = {
                k: request
                for k, request in run.at_once.items()
                if isinstance(request, Decide | Read)
            }
            if not waiting:
                continue
            verdicts, known = _read(
                list(waiting.values()), suspects, control_sum, inside.intra_node
            )
            control_sum, present = None, known or present
            if verdicts is None:
                run.close()
                return None
            run.answers.update(zip(waiting, verdicts, strict=True))
        if suspects and (run.asking or run.waiting or run.finished):
            verdicts, known = _read([], suspects, control_sum, inside.intra_node)
            control_sum, present = None, known or present
            if verdicts is None:
                run.close()
                return None
        if run.waiting and not first:
            run.tell(present)
            continue
        if not run.asking and not first:
            break
        packet = FlatBuffers(workers, wire_dtype, rank, noise(phase) if noise else None)
        phase += 1
        asked = inside.prepare(run.asking)
        numbers = {k: one.put_into(packet, codes) for k, one in asked.items()}
        if first:
            dense_numbers = [packet.add(tensor, "dense", averaged=True) for tensor in dense]
            numbers_of_control = numbers_on(device, [0.0, *map(float, has_gradient)], packet.dtype)
            control = packet.add(numbers_of_control, "control", averaged=False)
        packet.seal()
        if first:
            packet.write(control, (~packet.all_sound()).to(numbers_of_control))
        stats.bytes.update(packet.bytes)
        stats.surplus += packet.surplus
        stats.spared += packet.spared
        stats.seconds["compress"] += time.perf_counter() - clock
        clock = time.perf_counter()
        stats.collectives += yield packet.exchanges
        stats.seconds["communicate"] += time.perf_counter() - clock
        clock = time.perf_counter()
        if second_leg := packet.second_leg():
            stats.seconds["compress"] += time.perf_counter() - clock
            clock = time.perf_counter()
            stats.collectives += yield second_leg
            stats.seconds["communicate"] += time.perf_counter() - clock
            clock = time.perf_counter()
        packet.arrived()
        suspects.append((~packet.all_sound()).to(torch.float32))
        answers = packet.answers()
        if first:
            dense_answers = [answers[k][0] for k in dense_numbers]
            control_sum = answers[control][0]
            first = False
        run.answers.update(
            inside.complete(asked, {k: answers[number] for k, number in numbers.items()})
        )
    stats.seconds["compress"] += time.perf_counter() - clock
    return Agreed(run.results(), dense_answers, present)


class _Run:
    """The generators of a pass: which are live, what they ask for, what they were
    answered.

    Attributes:
        answers: by generator; taken when it is advanced.
        at_once: requests that are answered without a packet.
        asking: requests for the next packet.
        waiting: generators that wait until it is known which gradients exist.
    """

    def __init__(self, steps: Sequence[Passing]) -> None:
        self._steps = list(steps)
        self._results: dict[int, Result | None] = {}
        self._ready = list(range(len(self._steps)))
        self.answers: dict[int, object] = {}
        self.at_once: dict[int, _AtOnce] = {}
        self.asking: dict[int, _OnTheWire] = {}
        self.waiting: list[int] = []
        # some go on with an answer that the others have not waited for
        self._goes_on = False

    def tell(self, present: list[bool]) -> None:
        """Let those that wait go on; what the others ask for stays."""
        self.answers.update(dict.fromkeys(self.waiting, present))
        self._ready, self.waiting, self._goes_on = self.waiting, [], True

    @property
    def finished(self) -> bool:
        return len(self._results) == len(self._steps)

    def advance(self) -> bool:
        """Run every generator whose request is answered to its next one. True if some
        can be answered without a packet.
        """
        ready = [k for k in self._ready if k not in self._results]
        if not self.at_once and not self._goes_on:
            self.asking = {}
        self.at_once, self._goes_on = {}, False
        for k in ready:
            try:
                request = self._steps[k].send(self.answers.pop(k, None))
            except StopIteration as end:
                self._results[k] = end.value
                continue
            if isinstance(request, Presence):
                self.waiting.append(k)
            elif isinstance(request, _OnTheWire):
                self.asking[k] = request
            else:
                self.at_once[k] = request
        self._ready = list(self.at_once) if self.at_once else sorted(self.asking)
        if not self.at_once:
            # one order on all workers, whoever decided first
            self.asking = dict(sorted(self.asking.items()))
            return False
        return True

    def results(self) -> list[Result | None]:
        return [self._results[k] for k in range(len(self._steps))]

    def close(self) -> None:
        for steps in self._steps:
            steps.close()


def _read(
    waiting: Sequence[Decide | Read],
    suspects: list[Tensor],
    control_sum: Tensor | None,
    intra_node: IntraNodeGroup,
) -> tuple[list[bool | list[float]] | None, list[bool] | None]:
    """Everything the host waits for, in one transfer: the answers (None for a veto),
    and which gradients exist anywhere.
    """
    parts = [
        (~one.flag.all()).reshape(1) if isinstance(one, Decide) else one.tensor.reshape(-1)
        for one in waiting
    ]
    lengths = [part.numel() for part in parts]
    if suspects:
        parts.append(torch.stack([suspect.reshape(()) for suspect in suspects]))
    if control_sum is not None:
        parts.append(control_sum)
    home = parts[0].device
    flat = torch.cat([part.to(device=home, dtype=torch.float32) for part in parts])
    intra_node.sum_([flat], "control")
    numbers = flat.tolist()
    answers: list[bool | list[float]] = []
    for one, length in zip(waiting, lengths, strict=True):
        answers.append(numbers[0] == 0 if isinstance(one, Decide) else numbers[:length])
        numbers = numbers[length:]
    vetoed = any(value != 0 for value in numbers[: len(suspects)])
    known = None
    if control_sum is not None:
        flag, *mask = numbers[len(suspects) :]
        vetoed |= flag != 0
        known = [value > 0 for value in mask]
    suspects.clear()
    return (None if vetoed else answers), known
