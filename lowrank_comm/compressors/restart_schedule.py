"""When a matrix's subspace is restarted: in every step t, from 0, with (t + offset) mod
tau == 0.

Without staggering every offset is 0 and all matrices restart together, as in Algorithm
2 of PowerSGD+ (arXiv 2509.11254). With staggering, all restart at t = 0, where no
subspace is known yet, and afterwards each matrix has its own step within the period,
chosen so that every step carries about the same number of restart bytes. The offsets
are a function of the names and sizes alone, so all workers agree on them without
communication.

In a warm-up of k steps nothing restarts. Where bases have followed the means, the first
compressed step, t = k, needs no restart either; else it is one, as t = 0 is without a
warm-up.

A restart that falls on a step in which no worker has a gradient for a matrix is
deferred: it comes in the first later step in which some worker has one. Otherwise a
weight with gradients in every other step only (alternating adapters, the experts of a
mixture) might never restart. A matrix's `RestartHistory` therefore counts its own steps
and not those of the run. It follows from what all workers agree on, which gradients are
missing everywhere, and is kept on the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class RestartSchedule:
    """Which parameters restart at step t.

    Args:
        restart_every: tau, in steps.
        offsets: parameter name -> offset in [0, tau); absent means 0.
        first: k, the first step that compresses.
        restarts_first: whether all restart in it.
    """

    restart_every: int
    offsets: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    restarts_first: bool = True

    def due(self, name: str, t: int) -> bool:
        """Return whether the parameter restarts at step t: t = k, where all do, or (t +
        offset) mod tau == 0 and t >= k.
        """
        if t <= self.first and self.restarts_first:
            return t == self.first
        return t >= self.first and (t + self.offsets.get(name, 0)) % self.restart_every == 0


def staggered(restart_every: int, costs: Mapping[str, int]) -> RestartSchedule:
    """Spread the restarts over the period: the most expensive first, each into the
    cheapest step so far.

    Args:
        restart_every: tau, in steps.
        costs: parameter name -> elements that its restart sends.

    Returns:
        The schedule; no step carries more than the average plus the largest single
        cost.

    Example:
        >>> s = staggered(4, {"a": 10, "b": 10, "c": 10, "d": 10})
        >>> [sum(s.due(name, t) for name in "abcd") for t in range(4, 8)]
        [1, 1, 1, 1]
    """
    # Among equally loaded steps prefer those far apart (bit-reversed order), so that
    # few matrices do not restart in a row.
    bits = max(restart_every - 1, 1).bit_length()
    spread = sorted(range(restart_every), key=lambda step: int(f"{step:0{bits}b}"[::-1], 2))
    heap = [(0, place, step) for place, step in enumerate(spread)]
    heapq.heapify(heap)
    offsets: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, place, step = heapq.heappop(heap)
        offsets[name] = step
        heapq.heappush(heap, (load + max(costs[name], 1), place, step))
    return RestartSchedule(restart_every, offsets)


class RestartHistory(NamedTuple):
    """What a matrix has behind it, counted in committed steps in which some worker had
    a gradient for it.

    Attributes:
        restarts: how many it has made so far.
        age: steps since the last restart, or since the start where there was none.
        deferred: whether a restart fell on a step in which no worker had a gradient,
            and has not been made up for.
    """

    restarts: int = 0
    age: int = 0
    deferred: bool = False

    def after(self, due: bool, present: bool) -> RestartHistory:
        """Return the history after one more step.

        Args:
            due: a restart was due by the schedule.
            present: some worker had a gradient.
        """
        deferred = self.deferred or due
        if not present:
            return self._replace(deferred=deferred)
        if deferred:
            return RestartHistory(self.restarts + 1)
        return RestartHistory(self.restarts, self.age + 1)


def steady(schedule: RestartSchedule | None, name: str, t: int) -> RestartHistory:
    """Return the history before step t of a matrix that has had a gradient in every
    step.

    Example:
        >>> [steady(RestartSchedule(3), "a", t).age for t in range(1, 6)]
        [0, 1, 2, 0, 1]
    """
    if schedule is None or t <= schedule.first:
        return RestartHistory(0, t)
    tau, offset = schedule.restart_every, schedule.offsets.get(name, 0)
    # restarts after that of the first compressed step
    later = (t - 1 + offset) // tau - (schedule.first + offset) // tau
    restarts = later + schedule.due(name, schedule.first)
    if not restarts:
        return RestartHistory(0, t)
    last = (t - 1 + offset) // tau * tau - offset if later else schedule.first
    return RestartHistory(restarts, t - 1 - last)
