"""The tag of a saved state: whose error memory it holds, of which step, in which
format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowrank_comm.errors import StateMismatchError
from lowrank_comm.reduction.reducer import Reducer

FORMAT = 1


# as a rank: a state of one rank that no rank may take for its own
NOBODY = -1


def check_format(found: object, what: str) -> None:
    """Refuse what was saved in another layout than this version reads."""
    if found != FORMAT:
        raise StateMismatchError(
            f"{what} has format {found}, this version reads {FORMAT}; update lowrank_comm."
        )


@dataclass(frozen=True)
class Tag:
    """What a saved state is.

    Attributes:
        kind: "mean" or "own", see `checkpointing.file`.
        rank, world: the rank that has saved it, and how many there were.
        step: t of the next pass.
        seed: seed of the random draws.
        format: version of the layout.
        unsteady: parameter name -> (restarts, age, deferred), see `Restarts`; absent in
            what older versions saved, and then nothing is deferred.
    """

    kind: str
    rank: int
    world: int
    step: int
    seed: int
    format: int = FORMAT
    unsteady: Mapping[str, tuple[int, int, bool]] = field(default_factory=dict)

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


def tag_of(reducer: Reducer) -> Tag:
    """Return the tag of the reducer's present state."""
    state = reducer.state
    rank, world = state.worker or (reducer.workers.global_rank, reducer.workers.world_size)
    # before the first step all errors are zero
    shared = state.consolidated or world == 1 or state.step == 0
    kind = "mean" if shared or not state.keeps_private_state else "own"
    return Tag(kind, rank, world, state.step, state.seed, unsteady=state.restarts.irregular())
