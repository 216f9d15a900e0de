"""What all ranks of all nodes do together beside averaging."""

from __future__ import annotations

from lowrank_comm import ConfigMismatchError
from lowrank_comm.communication import Group
from lowrank_comm.communication.topology import grid, levels
from lowrank_comm.communication.workers import Workers
from tests.support.gloo import GlooPool


def test_one_rank_alone() -> None:
    workers = Workers(Group())
    assert (workers.global_rank, workers.world_size, workers.is_writer) == (0, 1, True)
    assert workers.all_gather_text("here") == ["here"]
    assert workers.any_in_the_node(True)
    assert not workers.any_in_the_node(False)


def in_two_nodes(rank: int) -> tuple[list[str], bool, bool, str]:
    """Texts of all ranks; a flag of rank 2 in its node; settings in which
    rank 1 differs.
    """
    group, intra_node = levels(grid(2))
    workers = Workers(group, intra_node)
    texts = workers.all_gather_text(f"rank {workers.global_rank}")
    raised = workers.any_in_the_node(rank == 2)
    try:
        workers.agree({"rank": 3 if rank == 1 else 2})
        error = ""
    except ConfigMismatchError as mismatch:
        error = str(mismatch)
    return texts, raised, workers.agreed, error


def test_two_nodes_of_two_ranks(gloo: GlooPool) -> None:
    """A difference that two of the ranks see is told to all four."""
    for rank, (texts, raised, agreed, error) in enumerate(gloo.run(in_two_nodes, 4)):
        assert texts == [f"rank {k}" for k in range(4)]
        assert raised == (rank >= 2)
        assert not agreed
        assert "rank" in error
