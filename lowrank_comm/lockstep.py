"""Many compressors, one conversation: drives the generators of all batches in lock-step phases.

In each round every live generator is advanced to its next request for communication; the requests of a round form one
`Packet`; the packet's buffers are yielded, to be summed over the workers in place by whoever drives this generator (a
process group, or the simulation of N workers side by side); the pieces are handed back as answers. So a step has as
many collectives as the algorithm has phases, however many matrices there are. The first packet also carries everything
that travels dense, and the control numbers:

    [0]   1 if this worker holds a number that is not finite (or next to the end of its dtype's range), else 0
    [1:]  for each parameter, 1 if this worker had a gradient, else 0

The veto. A packet is suspicious if some worker raised the flag, or if the sum itself is not finite (it may overflow on a
narrow wire). That is read by the host together with the compressors' own decisions, in one transfer for all batches, at
the latest before anything that a NaN would break or that cannot be taken back: two transfers in an ordinary step of
PowerSGD. Every worker reads the same sums, so all see the same veto, close their generators and return.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .communication.packet import Packet
from .compressors.base import ComputeOnce, Decide, Mean, Request, Result, Steps

Buffers = Generator[list[Tensor], int, "Agreed | None"]


@dataclass
class Agreed:
    """What a pass that nobody vetoed ends with.

    Attributes:
        results: of the generators, in their order.
        dense: the means of the dense tensors, in their order.
        present: for each parameter, whether any worker had a gradient.
    """

    results: list[Result]
    dense: list[Tensor]
    present: list[bool]


@dataclass
class Account:
    """Bytes by kind, collectives, and host seconds by phase of one pass; filled while it runs, vetoed or not."""

    bytes: Counter[str] = field(default_factory=Counter)
    collectives: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"compress": 0.0, "communicate": 0.0})


def lockstep(
    steps: Sequence[Steps],
    dense: Sequence[Tensor],
    has_gradient: Sequence[bool],
    *,
    workers: int,
    rank: int,
    wire_dtype: torch.dtype | None,
    device: torch.device,
    account: Account,
) -> Buffers:
    """One pass.

    Args:
        steps: fresh generators of compressors, in the same order on all workers.
        dense: tensors to be averaged as they are.
        has_gradient: for each parameter, whether this worker has one.
        workers, rank: size of the group, and this worker's number in it.
        wire_dtype: dtype on the wire, or None for each tensor's own.
        device: where the control numbers live.
        account: filled in.

    Yields:
        The buffers of a phase, to be summed over the workers in place; is sent the number of collectives that it took.

    Returns:
        `Agreed`, or None if any worker's numbers were not finite.
    """
    run = _Run(steps)
    suspects: list[Tensor] = []  # sums that decide about a veto, not read by the host so far
    control_sum: Tensor | None = None
    present: list[bool] = []
    dense_answers: list[Tensor] = []
    clock = time.perf_counter()
    first = True
    while True:
        while run.advance():  # Decide requests: read them and the suspects in one transfer
            verdicts, known = _read(run.flags(), suspects, control_sum)
            control_sum, present = None, known or present
            if verdicts is None:
                run.close()
                return None
            run.decide(verdicts)
        if suspects and (run.asking or run.finished):
            verdicts, known = _read([], suspects, control_sum)
            control_sum, present = None, known or present
            if verdicts is None:
                run.close()
                return None
        if not run.asking and not first:
            break
        packet = Packet(workers, wire_dtype)
        numbers = _pack(packet, run.asking, workers, rank)
        if first:
            dense_numbers = [packet.add(tensor, "dense", averaged=True) for tensor in dense]
            numbers_of_control = torch.tensor([0.0, *map(float, has_gradient)], dtype=packet.dtype, device=device)
            control = packet.add(numbers_of_control, "control", averaged=False)
        packet.seal()
        if first:
            packet.write(control, (~packet.all_sound()).to(numbers_of_control))
        account.bytes.update(packet.bytes)
        account.seconds["compress"] += time.perf_counter() - clock
        clock = time.perf_counter()
        account.collectives += yield packet.buffers
        account.seconds["communicate"] += time.perf_counter() - clock
        clock = time.perf_counter()
        suspects.append((~packet.all_sound()).to(torch.float32))
        answers = packet.answers()
        if first:
            dense_answers = [answers[k][0] for k in dense_numbers]
            control_sum = answers[control][0]
            first = False
        for k, number in numbers.items():
            request = run.asking[k]
            run.answers[k] = answers[number][0] if isinstance(request, ComputeOnce) else answers[number]
    account.seconds["compress"] += time.perf_counter() - clock
    return Agreed(run.results(), dense_answers, present)


class _Run:
    """The generators of a pass: which are live, what they ask for, what they were answered."""

    def __init__(self, steps: Sequence[Steps]) -> None:
        self._steps = list(steps)
        self._results: dict[int, Result] = {}
        self._deciding: dict[int, Decide] = {}
        self._ready = list(range(len(self._steps)))
        self.answers: dict[int, object] = {}
        self.asking: dict[int, Mean | ComputeOnce] = {}

    @property
    def finished(self) -> bool:
        return len(self._results) == len(self._steps)

    def advance(self) -> bool:
        """Run every generator whose request is answered to its next one. True if some ask for a decision now."""
        ready = [k for k in self._ready if k not in self._results]
        if not self._deciding:
            self.asking = {}
        self._deciding = {}
        for k in ready:
            try:
                request: Request = self._steps[k].send(self.answers.pop(k, None))
            except StopIteration as end:
                self._results[k] = end.value
                continue
            if isinstance(request, Decide):
                self._deciding[k] = request
            else:
                self.asking[k] = request
        self._ready = list(self._deciding) if self._deciding else sorted(self.asking)
        if not self._deciding:
            self.asking = dict(sorted(self.asking.items()))  # one order on all workers, whoever decided first
            return False
        return True

    def flags(self) -> list[Tensor]:
        return [request.flag for request in self._deciding.values()]

    def decide(self, verdicts: Sequence[bool]) -> None:
        self.answers.update(zip(self._deciding, verdicts, strict=True))

    def results(self) -> list[Result]:
        return [self._results[k] for k in range(len(self._steps))]

    def close(self) -> None:
        for steps in self._steps:
            steps.close()


def _pack(packet: Packet, asking: dict[int, Mean | ComputeOnce], workers: int, rank: int) -> dict[int, int]:
    """Add the requests to the packet; what is computed once goes round the workers, matrix by matrix."""
    numbers, turn = {}, 0
    for k, request in asking.items():
        if isinstance(request, Mean):
            numbers[k] = packet.add(request.tensor, request.kind, averaged=True)
            continue
        mine = [index for index in range(request.count) if (turn + index) % workers == rank]
        turn += request.count
        parts = torch.zeros((request.count, *request.shape), dtype=request.dtype, device=request.device)
        if mine:
            parts[mine] = request.compute(mine)
        numbers[k] = packet.add(parts, request.kind, averaged=False)
    return numbers


def _read(
    flags: list[Tensor], suspects: list[Tensor], control_sum: Tensor | None
) -> tuple[list[bool] | None, list[bool] | None]:
    """Everything the host waits for, in one transfer: verdicts (None for a veto), and which gradients exist anywhere."""
    parts = [torch.stack([flag.all() for flag in flags])] if flags else []
    parts += [torch.stack([suspect.reshape(()) for suspect in suspects])] if suspects else []
    parts += [control_sum] if control_sum is not None else []
    home = parts[0].device
    numbers = torch.cat([part.to(device=home, dtype=torch.float32) for part in parts]).tolist()
    verdicts = [value > 0 for value in numbers[: len(flags)]]
    vetoed = any(value != 0 for value in numbers[len(flags) : len(flags) + len(suspects)])
    known = None
    if control_sum is not None:
        flag, *mask = numbers[len(flags) + len(suspects) :]
        vetoed |= flag != 0
        known = [value > 0 for value in mask]
    suspects.clear()
    return (None if vetoed else verdicts), known
