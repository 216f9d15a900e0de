"""Which matrices restart in a step: the schedule, and the restarts that are deferred
because a gradient was missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from lowrank_comm.compressors.restart_schedule import RestartHistory, RestartSchedule, steady


class Restarts:
    """When the matrices of a run restart, and what each of them has behind it.

    Args:
        schedule: None for compressors without restarts.
        names: of the matrices.
        warmup_steps: k of the warm-up, in which nothing restarts.
    """

    def __init__(
        self, schedule: RestartSchedule | None, names: Iterable[str], warmup_steps: int = 0
    ) -> None:
        self.schedule, self._names, self._warmup_steps = schedule, frozenset(names), warmup_steps
        # the history of all others follows from the step
        self._irregular: dict[str, RestartHistory] = {}

    def history(self, name: str, t: int) -> RestartHistory:
        """Return what a matrix has behind it before step t."""
        return self._irregular.get(name) or steady(self.schedule, name, t)

    def histories(
        self, names: Sequence[str], t: int
    ) -> dict[tuple[bool, RestartHistory], list[int]]:
        """Sort the matrices of a batch by (whether it restarts at step t, what it has
        behind it).

        Returns:
            The two -> places among the names, ascending.
        """
        same = self.schedule is None or not self.schedule.offsets
        if same and self._irregular.keys().isdisjoint(names):
            # those without a restart of their own are a batch by themselves
            kind = (self.due(names[0], t), steady(self.schedule, names[0], t))
            return {kind: list(range(len(names)))}
        kinds: dict[tuple[bool, RestartHistory], list[int]] = {}
        for row, name in enumerate(names):
            history = self.history(name, t)
            restart = self.due(name, t) or (history.deferred and t >= self._warmup_steps)
            kinds.setdefault((restart, history), []).append(row)
        return kinds

    def due(self, name: str, t: int) -> bool:
        """Return whether the schedule has a restart at step t."""
        return self.schedule is not None and name in self._names and self.schedule.due(name, t)

    def deferred(self, name: str) -> bool:
        """Return whether a restart waits for a gradient."""
        return name in self._irregular and self._irregular[name].deferred

    def commit(self, t: int, present: Mapping[str, bool]) -> None:
        """Count step t. present: parameter name -> whether a worker had a gradient."""
        for name, there in present.items():
            if name in self._names and (name in self._irregular or not there):
                after = self.history(name, t).after(self.due(name, t), there)
                if t + 1 == self._warmup_steps and self.schedule is not None and not after.age:
                    # without a gradient its basis could not follow
                    after = RestartHistory(deferred=True)
                self._set(name, after, t + 1)

    def start_anew(self, names: Collection[str], t: int) -> None:
        """Forget the history of these matrices; the restart of the first compressed
        step, or the warm-up, which they have missed, is made up for by a restart.
        """
        owing = t >= max(1, self._warmup_steps) and self.schedule is not None
        for name in self._names.intersection(names):
            self._set(
                name, RestartHistory(deferred=True) if owing else steady(self.schedule, name, t), t
            )

    def irregular(self) -> dict[str, RestartHistory]:
        """Return name -> (restarts, age, deferred), to be saved; of matrices that have
        had a gradient in every step there is nothing to say.
        """
        return dict(sorted(self._irregular.items()))

    def describe(self) -> dict[str, str]:
        """Return the same in words, to be compared between workers."""
        return {
            name: f"{restarts} so far, {age} steps since, {'one' if deferred else 'none'} deferred"
            for name, (restarts, age, deferred) in self.irregular().items()
        }

    def go_on(self, t: int, irregular: Mapping[str, Sequence[int]]) -> None:
        """Go on at step t, as saved; of all that are not in `irregular` nothing is
        deferred.
        """
        self._irregular = {}
        for name in self._names.intersection(irregular):
            restarts, age, deferred = irregular[name]
            self._set(
                name, RestartHistory(restarts, age, bool(deferred) and self.schedule is not None), t
            )

    def _set(self, name: str, history: RestartHistory, t: int) -> None:
        if history == steady(self.schedule, name, t):
            self._irregular.pop(name, None)
        else:
            self._irregular[name] = history
