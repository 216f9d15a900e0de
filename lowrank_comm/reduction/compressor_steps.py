"""Advances the compressors' generators of a pass in lock-step, and keeps what they ask
for.

Generators that send whole matrices, as a restart by the SVD does, are pieces: each
begins when there is room for it, in their order, and what it ended with is copied out
of the buffers in which it travelled. So the buffers of a step are as large as a piece,
and not as the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_comm.compressors.base import Result
from lowrank_comm.compressors.requests import ComputeOnce, Decide, Gather, Mean, Read, Request
from lowrank_comm.reduction.passes import Pass, Presence, Steps

OnTheWire = Mean | ComputeOnce | Gather


class CompressorSteps:
    """The generators of a pass: which are live, what they ask for.

    Args:
        one: the pass, with its generators.

    Attributes:
        at_once: requests that are answered without a packet and without the host, by
            generator.
        decisions: requests for which the host reads numbers.
        later: pieces that wait for room, in their order.
        asking: requests for the next packet.
        waiting: generators that wait until it is known which gradients exist.
        results: of the generators; None of one that has nothing to do, or has not
            ended.
    """

    def __init__(self, one: Pass) -> None:
        self._starts, self._pieces, self._room = one.starts, one.pieces, one.wire.room
        self._steps: dict[int, Steps] = {}
        self._answers: dict[int, object] = {}
        # answered since the last `advance`, or not begun
        self._ready = [k for k in range(len(one.starts)) if k not in one.pieces]
        self.later, self._on_their_way = sorted(one.pieces), list[int]()
        self.results: list[Result | None] = [None] * len(one.starts)
        self.at_once: dict[int, Request] = {}
        self.decisions: dict[int, Decide | Read] = {}
        self.asking: dict[int, OnTheWire] = {}
        self.waiting: list[int] = []

    def advance(self) -> bool:
        """Run every generator whose request is answered to its next one, and let pieces
        begin for which there is room; return whether some can be answered without a
        packet.
        """
        self.at_once, self.decisions = {}, {}
        while self.later and self._room.take(self._pieces[self.later[0]]):
            self._on_their_way.append(self.later[0])
            self._ready.append(self.later.pop(0))
        for k in self._ready:
            if k not in self._steps:
                self._steps[k] = self._starts[k]()
            try:
                request = self._steps[k].send(self._answers.pop(k, None))
            except StopIteration as end:
                self.results[k] = end.value
                if k in self._pieces:
                    self.results[k] = end.value and end.value.copied_out()
                    self._leave(k)
                continue
            if isinstance(request, Presence):
                self.waiting.append(k)
            elif isinstance(request, Mean | ComputeOnce | Gather):
                self.asking[k] = request
            elif isinstance(request, Decide | Read):
                self.decisions[k] = request
            else:
                self.at_once[k] = request
        self._ready = []
        if self.at_once or self.decisions:
            return True
        # one order on all workers, whichever decided first
        self.asking = dict(sorted(self.asking.items()))
        return False

    def _leave(self, k: int) -> None:
        self._on_their_way.remove(k)
        self._room.free(self._pieces[k])

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
        """End all generators, and give back their room."""
        for steps in self._steps.values():
            steps.close()
        for k in list(self._on_their_way):
            self._leave(k)
