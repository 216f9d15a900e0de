"""Drives passes: generators that say what is to be exchanged between the workers.

A pass yields the exchanges of a phase, is sent how many collectives these took, and
goes on until it returns its result. It knows nothing of who carries the exchanges out.
A `Flight` is a pass on its way: it hands each phase's exchanges to `start`, which a
process group does as collectives (`Group.start`) and the simulation of N workers as
copies, and waits for them before it resumes the pass.

`complete` takes several flights to their ends side by side: while the exchanges of one
are on the wire, the next one computes. All workers must begin their flights in the same
order; they then make all collectives in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from lowrank_comm.communication.collectives import Exchange
from lowrank_comm.communication.failures import collective_failed

T = TypeVar("T")


class Flight(Generic[T]):
    """A pass on its way; its first phase is started at once.

    Args:
        passing: the pass.
        start: starts exchanges; each of what it returns has `wait()`.

    Attributes:
        result: what the pass returned, once it has ended.
    """

    def __init__(
        self,
        passing: Generator[list[Exchange], int, T],
        start: Callable[[Sequence[Exchange]], list[Any]],
    ) -> None:
        self._passing, self._start = passing, start
        self._works = start(next(passing))
        self.result: T

    def advance(self) -> bool:
        """Wait for what was started, and start the next phase; return False, with the
        result at hand, where there is none.
        """
        # they hold what was exchanged, which is not needed beside the next phase's
        works, self._works = self._works, []
        many = len(works)
        try:
            while works:
                works.pop(0).wait()
        except RuntimeError as error:
            raise collective_failed(error) from error
        try:
            exchanges = self._passing.send(many)
        except StopIteration as end:
            self.result = end.value
            return False
        self._works = self._start(exchanges)
        return True

    def abandon(self) -> None:
        """End the pass after a backward pass that failed on all workers."""
        for work in self._works:
            work.wait()
        self.close()

    def close(self) -> None:
        """End the pass, whatever is on its way."""
        self._passing.close()


def complete(flights: Sequence[Flight[T]]) -> list[T]:
    """Take all flights to their ends side by side; return their results in order."""
    going = list(flights)
    try:
        while going:
            if going[0].advance():
                going.append(going[0])
            del going[0]
    finally:
        # where one has failed
        for flight in going:
            flight.close()
    return [flight.result for flight in flights]
