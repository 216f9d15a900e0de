"""When a subspace is refreshed: at every step t with (t + offset) mod tau == 0, t from 0.

Without staggering every offset is 0 and all matrices restart together, as in Algorithm 2 of PowerSGD+
(arXiv 2509.11254). With staggering, all restart at t = 0, where no subspace is known yet, and afterwards each matrix has
its own step within the period, chosen so that every step carries about the same number of restart bytes. The offsets
are a function of the names and sizes alone, so all workers agree on them without a word.

A restart that falls on a step in which nobody has a gradient for a matrix is owed: it comes in the first later step in
which somebody has one. Else a weight with gradients in every other step only (alternating adapters, the experts of a
mixture) might never restart. What a matrix has behind it (`Past`) therefore counts its own steps and not those of the run.
It follows from what all workers agree on, which gradients are missing everywhere, and is kept on the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class RestartSchedule:
    """Which parameters restart at step t.

    Args:
        restart_every: tau, in steps.
        offsets: parameter name -> offset in [0, tau); absent means 0.
    """

    restart_every: int
    offsets: Mapping[str, int] = field(default_factory=dict)

    def due(self, name: str, t: int) -> bool:
        """Whether the parameter restarts at step t: t = 0, or (t + offset) mod tau == 0."""
        return t == 0 or (t + self.offsets.get(name, 0)) % self.restart_every == 0


def staggered(restart_every: int, costs: Mapping[str, int]) -> RestartSchedule:
    """Offsets that spread the restarts over the period: the most expensive first, each into the cheapest step so far.

    Args:
        restart_every: tau, in steps.
        costs: parameter name -> elements that its restart sends.

    Returns:
        The schedule; no step carries more than the average plus the largest single cost.

    Example:
        >>> s = staggered(4, {"a": 10, "b": 10, "c": 10, "d": 10})
        >>> [sum(s.due(name, t) for name in "abcd") for t in range(4, 8)]
        [1, 1, 1, 1]
    """
    # Among equally loaded steps prefer those far apart (bit-reversed order), so that few matrices do not restart in a row.
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


@dataclass(frozen=True)
class Past:
    """What a matrix has behind it, counted in committed steps in which somebody had a gradient for it.

    Attributes:
        restarts: so far.
        age: steps since the last restart, or since the start where there was none.
        owed: whether a restart fell on a step in which nobody had a gradient, and has not been made up for.
    """

    restarts: int = 0
    age: int = 0
    owed: bool = False

    def after(self, due: bool, present: bool) -> Past:
        """After one more step. due: by the schedule; present: whether somebody had a gradient."""
        owed = self.owed or due
        if not present:
            return replace(self, owed=owed)
        return Past(self.restarts + 1) if owed else Past(self.restarts, self.age + 1)


def steady(schedule: RestartSchedule | None, name: str, t: int) -> Past:
    """Before step t, of a matrix that has had a gradient in every step.

    Example:
        >>> [steady(RestartSchedule(3), "a", t).age for t in range(1, 6)]
        [0, 1, 2, 0, 1]
    """
    if schedule is None or t == 0:
        return Past(0, t)
    offset = schedule.offsets.get(name, 0)
    later = (t - 1 + offset) // schedule.restart_every  # restarts after that of step 0
    last = later * schedule.restart_every - offset if later else 0
    return Past(1 + later, t - 1 - last)


class Restarts:
    """When the matrices of a run restart, and what each of them has behind it.

    Args:
        schedule: None for schemes without restarts.
        names: of the matrices.
    """

    def __init__(self, schedule: RestartSchedule | None, names: Iterable[str]) -> None:
        self.schedule, self._names = schedule, frozenset(names)
        self._unsteady: dict[str, Past] = {}  # of all others the past follows from the step

    def of(self, name: str, t: int) -> Past:
        """What a matrix has behind it before step t."""
        return self._unsteady.get(name) or steady(self.schedule, name, t)

    def due(self, name: str, t: int) -> bool:
        """Whether the schedule has a restart at step t."""
        return self.schedule is not None and name in self._names and self.schedule.due(name, t)

    def owed(self, name: str) -> bool:
        """Whether a restart waits for a gradient."""
        return name in self._unsteady and self._unsteady[name].owed

    def commit(self, t: int, present: Mapping[str, bool]) -> None:
        """Step t counts. present: parameter name -> whether somebody had a gradient."""
        for name, there in present.items():
            if name in self._names and (name in self._unsteady or not there):
                self._set(name, self.of(name, t).after(self.due(name, t), there), t + 1)

    def start_anew(self, names: Collection[str], t: int) -> None:
        """These matrices have nothing behind them; they have missed the restart of step 0, and owe it."""
        owing = t > 0 and self.schedule is not None
        for name in self._names.intersection(names):
            self._set(name, Past(owed=True) if owing else steady(self.schedule, name, t), t)

    def unsteady(self) -> dict[str, tuple[int, int, bool]]:
        """Name -> (restarts, age, owed), to be saved; of matrices that have had a gradient in every step there is nothing
        to say."""
        return {name: (past.restarts, past.age, past.owed) for name, past in sorted(self._unsteady.items())}

    def describe(self) -> dict[str, str]:
        """The same in words, to be compared between workers."""
        return {
            name: f"{restarts} so far, {age} steps since, {'one' if owed else 'none'} owed"
            for name, (restarts, age, owed) in self.unsteady().items()
        }

    def go_on(self, t: int, unsteady: Mapping[str, Sequence[int]]) -> None:
        """The next step is t, as saved; of all that are not in `unsteady` nothing is owed."""
        self._unsteady = {}
        for name in self._names.intersection(unsteady):
            restarts, age, owed = unsteady[name]
            self._set(name, Past(restarts, age, bool(owed) and self.schedule is not None), t)

    def _set(self, name: str, past: Past, t: int) -> None:
        if past == steady(self.schedule, name, t):
            self._unsteady.pop(name, None)
        else:
            self._unsteady[name] = past
