"""Advances the compressors' generators of a pass in lock-step, and keeps what they ask
for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lowrank_comm.compressors.base import Result
from lowrank_comm.compressors.requests import ComputeOnce, Gather, Mean, Request
from lowrank_comm.reduction.passes import Presence, Steps

OnTheWire = Mean | ComputeOnce | Gather


class CompressorSteps:
    """The generators of a pass: which are live, what they ask for.

    Args:
        starts: begin the generators; each is begun when it is first advanced.

    Attributes:
        at_once: requests that are answered without a packet, by generator.
        asking: requests for the next packet.
        waiting: generators that wait until it is known which gradients exist.
        results: of the generators; None of one that has nothing to do, or has not
            ended.
    """

    def __init__(self, starts: Sequence[Callable[[], Steps]]) -> None:
        self._starts = starts
        self._steps: dict[int, Steps] = {}
        self._answers: dict[int, object] = {}
        # answered since the last `advance`, or not begun
        self._ready = list(range(len(starts)))
        self.results: list[Result | None] = [None] * len(starts)
        self.at_once: dict[int, Request] = {}
        self.asking: dict[int, OnTheWire] = {}
        self.waiting: list[int] = []

    def advance(self) -> bool:
        """Run every generator whose request is answered to its next one; return whether
        some can be answered without a packet.
        """
        self.at_once = {}
        for k in self._ready:
            if k not in self._steps:
                self._steps[k] = self._starts[k]()
            try:
                request = self._steps[k].send(self._answers.pop(k, None))
            except StopIteration as end:
                self.results[k] = end.value
                continue
            if isinstance(request, Presence):
                self.waiting.append(k)
            elif isinstance(request, Mean | ComputeOnce | Gather):
                self.asking[k] = request
            else:
                self.at_once[k] = request
        self._ready = []
        if self.at_once:
            return True
        # one order on all workers, whichever decided first
        self.asking = dict(sorted(self.asking.items()))
        return False

    def answer(self, answers: Mapping[int, object]) -> None:
        """Give generators the answers to their requests; `advance` lets them go on."""
        self._answers.update(answers)
        self._ready += sorted(answers)

    def sent(self) -> dict[int, OnTheWire]:
        """Take out the requests that go into a packet now."""
        asking, self.asking = self.asking, {}
        return asking

    def tell(self, present: list[bool]) -> None:
        """Tell the generators that wait which gradients are present, and let them go
        on; what the others ask for stays.
        """
        self.answer(dict.fromkeys(self.waiting, present))
        self.waiting = []

    def close(self) -> None:
        """End all generators."""
        for steps in self._steps.values():
            steps.close()
