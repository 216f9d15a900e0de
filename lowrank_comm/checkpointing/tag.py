"""The tag of a saved state: whose error memory it holds, of which step, in which
format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import LowRankCommError, StateMismatchError
from lowrank_comm.options import Seed
from lowrank_comm.reduction.reducer import Reducer

FORMAT = 1

WAY_OUT = "restore it, or resume from another checkpoint."

# as a rank: a state of one rank that no rank may take for its own
NOBODY = -1

_Count = Annotated[int, Field(ge=0, lt=2**62)]
# JSON has lists in the place of tuples
_History = Annotated[tuple[_Count, _Count, bool], Strict(False)]


class OtherGroupsError(ValueError):
    """The parameter groups of a state dict are others, said in torch's words."""


def readable(error: Exception, what: str) -> Exception:
    """Return an error as this library says it: another one than ours means that what
    was being read is damaged.
    """
    if isinstance(error, LowRankCommError):
        return error
    return StateMismatchError(f"{what} cannot be read ({type(error).__name__}: {error}); {WAY_OUT}")


@contextlib.contextmanager
def refused_together(workers: Workers, what: str) -> Iterator[None]:
    """Check inside what was given to load; a collective, whose end all workers reach.

    Args:
        workers: who load together.
        what: is loaded, for messages.

    Raises:
        StateMismatchError: on every worker, if the check has failed on some.
    """
    problem: Exception | None = None
    try:
        yield
    # the others wait to be told
    except Exception as error:
        problem = error if isinstance(error, OtherGroupsError) else readable(error, what)
    workers.refuse_together(problem)


def check_format(found: object, what: str) -> None:
    """Refuse what was saved in another layout than this version reads."""
    if found != FORMAT:
        raise StateMismatchError(
            f"{what} has format {found}, this version reads {FORMAT}; update lowrank_comm."
        )


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="ignore"))
class Tag:
    """What a saved state is. Fields that a later version adds are left out.

    Attributes:
        kind: "mean" or "own", see `checkpointing.file`.
        rank, world: the rank that has saved it, and how many there were.
        step: t of the next pass.
        seed: seed of the random draws.
        format: version of the layout.
        unsteady: parameter name -> (restarts, age, deferred), see `Restarts`; absent in
            what older versions saved, and then nothing is deferred.
        restart: the setting of the compressor, "" where it has none; absent in what
            older versions saved.
        warmup_steps: k of the run's warm-up.
    """

    kind: Literal["own", "mean"]
    rank: Annotated[int, Field(ge=NOBODY, lt=2**62)]
    world: Annotated[int, Field(ge=1, lt=2**62)]
    step: _Count
    seed: Seed
    format: int = FORMAT
    unsteady: Mapping[str, _History] = field(default_factory=dict)
    restart: str | None = None
    warmup_steps: _Count = 0

    @property
    def whose(self) -> str:
        """The rank whose state it is, for messages."""
        return "some rank's" if self.rank == NOBODY else f"rank {self.rank}'s"

    def check_usable_by(self, reducer: Reducer) -> None:
        """Refuse another worker's own errors.

        Raises:
            StateMismatchError: kind "own" from another rank or world size, or an
                unknown format.
        """
        check_format(self.format, "the saved state")
        memory, workers = reducer.assignment.error_feedback.memory, reducer.workers
        rank, world = workers.global_rank, workers.world_size
        if self.kind == "own" and (self.rank, self.world) != (rank, world):
            raise StateMismatchError(
                f"the saved {memory} is {self.whose} own of {self.world} ranks; this is rank"
                f" {rank} of {world}. Loading it here would lose that of the other workers."
                " Call optimizer.consolidate_error_memory() on all ranks before state_dict(), then"
                " it fits any worker."
            )


def read_tag(entries: Any, what: str) -> Tag:
    """Parse a saved tag.

    Args:
        entries: the fields by name, as they were saved.
        what: was saved, for messages: a file, or "the state dict".

    Raises:
        StateMismatchError: a field is missing or has a value that no tag has, or the
            format is another one.
    """
    if not isinstance(entries, dict):
        raise StateMismatchError(f"{what} is damaged: its tag is {entries!r:.80}; {WAY_OUT}")
    check_format(entries.get("format"), what)
    try:
        return Tag(**{str(key): value for key, value in entries.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        found = "no" if first["type"] == "missing" else f"{first['input']!r:.80} as"
        raise StateMismatchError(
            f"{what} is damaged: its tag has {found} {key} ({first['msg']}); {WAY_OUT}"
        ) from None


def tag_of(reducer: Reducer) -> Tag:
    """Return the tag of the reducer's present state."""
    state = reducer.state
    rank, world = state.worker or (reducer.workers.global_rank, reducer.workers.world_size)
    # before the first step all errors are zero
    shared = state.consolidated or world == 1 or state.step == 0
    kind: Literal["own", "mean"] = "mean" if shared or not state.keeps_private_state else "own"
    return Tag(
        kind,
        rank,
        world,
        state.step,
        state.seed,
        unsteady=state.restarts.irregular(),
        restart=reducer.assignment.compressor.describe().get("restart", ""),
        warmup_steps=state.warmup.length,
    )
