"""Which matrices restart in a step: the schedule, and restarts deferred for want of a
gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lowrank_comm.compressors.restart_schedule import RestartHistory, RestartSchedule, steady


class Restarts:
    """When the matrices of a run restart, and what each of them has behind it.

    Args:
        schedule: None for schemes without restarts.
        names: of the matrices.
    """

    def __init__(self, schedule: RestartSchedule | None, names: Iterable[str]) -> None:
        self.schedule, self._names = schedule, frozenset(names)
        # of all others the past follows from the step
        self._unsteady: dict[str, RestartHistory] = {}

    def of(self, name: str, t: int) -> RestartHistory:
        """What a matrix has behind it before step t."""
        return self._unsteady.get(name) or steady(self.schedule, name, t)

    def due(self, name: str, t: int) -> bool:
        """Whether the schedule has a restart at step t."""
        return self.schedule is not None and name in self._names and self.schedule.due(name, t)

    def deferred(self, name: str) -> bool:
        """Whether a restart waits for a gradient."""
        return name in self._unsteady and self._unsteady[name].deferred

    def commit(self, t: int, present: Mapping[str, bool]) -> None:
        """Step t counts. present: parameter name -> whether somebody had a gradient."""
        for name, there in present.items():
            if name in self._names and (name in self._unsteady or not there):
                self._set(name, self.of(name, t).after(self.due(name, t), there), t + 1)

    def start_anew(self, names: Collection[str], t: int) -> None:
        """These matrices have nothing behind them; they have missed the restart of step
        0, and owe it.
        """
        owing = t > 0 and self.schedule is not None
        for name in self._names.intersection(names):
            self._set(
                name, RestartHistory(deferred=True) if owing else steady(self.schedule, name, t), t
            )

    def unsteady(self) -> dict[str, tuple[int, int, bool]]:
        """Name -> (restarts, age, deferred), to be saved; of matrices that have had a
        gradient in every step there is nothing to say.
        """
        return {
            name: (history.restarts, history.age, history.deferred)
            for name, history in sorted(self._unsteady.items())
        }

    def describe(self) -> dict[str, str]:
        """The same in words, to be compared between workers."""
        return {
            name: f"{restarts} so far, {age} steps since, {'one' if deferred else 'none'} deferred"
            for name, (restarts, age, deferred) in self.unsteady().items()
        }

    def go_on(self, t: int, unsteady: Mapping[str, Sequence[int]]) -> None:
        """The next step is t, as saved; of all that are not in `unsteady` nothing is
        deferred.
        """
        self._unsteady = {}
        for name in self._names.intersection(unsteady):
            restarts, age, deferred = unsteady[name]
            self._set(
                name, RestartHistory(restarts, age, bool(deferred) and self.schedule is not None), t
            )

    def _set(self, name: str, history: RestartHistory, t: int) -> None:
        if history == steady(self.schedule, name, t):
            self._unsteady.pop(name, None)
        else:
            self._unsteady[name] = history
