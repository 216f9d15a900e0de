"""Pieces: restarts that send whole matrices begin as there is room for them, and what
they agree on does not depend on it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lowrank_comm import ErrorFeedback, GaLore, GreedyLore, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors import subspaces
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.compressors.requests import ComputeOnce
from lowrank_comm.reduction.intra_node_requests import IntraNodeRequests
from lowrank_comm.reduction.passes import Room
from tests.support.driver import simulation
from tests.support.reference import gradient

pytestmark = pytest.mark.usefixtures("both_paths")

SHAPES = {f"{kind} {k}": shape for kind, shape in (("a", (12, 7)), ("b", (6, 9))) for k in range(5)}
NAMES = {**SHAPES, "bias": (5,)}
ONE = 12 * 7 * 8
"""Bytes of the larger matrix in float64."""


def given(t: int, worker: int, absent: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(gradient(shape, t, worker, k))
        for k, (name, shape) in enumerate(NAMES.items())
        if name not in absent
    }


def test_room_is_taken_and_given_back() -> None:
    room = Room(10)
    assert room.take(7)
    assert not room.take(4)
    assert room.take(3)
    room.free(7)
    room.free(3)
    # larger than the room: alone
    assert room.take(25)
    assert not room.take(1)
    room.free(25)
    assert room.taken == 0


CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CASES: dict[str, tuple[Compressor, dict[str, Any]]] = {
    "svd": (PowerSGDPlus(2, restart_every=3, restart="svd"), {}),
    "exact": (PowerSGDPlus(2, restart_every=3, restart="svd", exact_restart=True), {}),
    "consensus": (PowerSGDPlus(2, restart_every=3, restart="svd", consensus_restart=True), {}),
    "staggered": (PowerSGDPlus(2, restart_every=3, restart="svd", stagger=True), {}),
    "greedy": (PowerSGDPlus(2, restart_every=3, restart="greedy"), {}),
    "narrow wire": (
        PowerSGDPlus(2, restart_every=3, restart="svd"),
        {"wire_dtype": "bfloat16"},
    ),
    "two rounds": (
        PowerSGDPlus(2, restart_every=3, restart="svd"),
        {"error_feedback": ErrorFeedback(rounds=2)},
    ),
    "ef21": (
        PowerSGDPlus(2, restart_every=3, restart="svd"),
        {"error_feedback": ErrorFeedback(form="ef21")},
    ),
    "galore": (GaLore(2, restart_every=3), {"error_feedback": ErrorFeedback(form="ef14")}),
    "greedylore": (GreedyLore(2, restart_every=3), {}),
    "nothing to restart": (PowerSGD(2), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece_bytes", [1, 2 * ONE])
def test_small_pieces_give_what_one_piece_gives(case: str, piece_bytes: int) -> None:
    """Also where a gradient is missing and a restart deferred, and where the pass
    starts in several buckets; to round-off, since the batches are others.
    """
    compressor, options = CASES[case]
    sims = [
        simulation(compressor, NAMES, 2, **options, **more)
        for more in ({}, {"piece_bytes": piece_bytes}, {"piece_bytes": 1, "bucket_bytes": 3 * ONE})
    ]
    for t in range(8):
        absent = ("a 1", "a 3", "bias") if t == 3 else ()
        results = [sim.reduce([given(t, w, absent) for w in range(2)]) for sim in sims]
        for other, sim in zip(results[1:], sims[1:], strict=True):
            for name, mean in results[0].items():
                there = other[name]
                assert (mean is None) == (there is None)
                if mean is not None:
                    torch.testing.assert_close(there, mean, **CLOSE)
            for worker in range(2):
                expected = sims[0].error_memory(worker)
                held = sim.error_memory(worker)
                torch.testing.assert_close(held, expected, **CLOSE)
        assert all(r._wire.room.taken == 0 for sim in sims for r in sim.reducers)
    sent = [sim.reducers[0].ledger for sim in sims]
    assert sent[0].total_bytes == sent[1].total_bytes
    restarts = case != "nothing to restart"
    assert (sent[1].collectives > sent[0].collectives) == restarts or not sent[0].collectives


def test_a_veto_in_a_late_piece_leaves_everything_as_it_was() -> None:
    """The last matrix of one worker is not finite: pieces before it were exchanged, and
    nothing has changed; the room is free again.
    """
    compressor = PowerSGDPlus(2, restart_every=3, restart="svd")
    sims = [simulation(compressor, NAMES, 2, piece_bytes=ONE) for _ in range(2)]
    for t in range(4):
        if t == 3:
            bad = [given(t, w) for w in range(2)]
            bad[1]["b 4"][0, 0] = torch.inf
            assert sims[0].reduce(bad) == {}
        one, other = (sim.reduce([given(t, w) for w in range(2)]) for sim in sims)
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
        assert all(r._wire.room.taken == 0 for sim in sims for r in sim.reducers)


@pytest.mark.parametrize("piece_bytes", [10**6, 1])
def test_workers_take_turns_at_what_one_computes(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """Over all pieces of a pass, also where a piece is a matrix."""
    compressor = PowerSGDPlus(2, restart_every=3, restart="svd")
    sim = simulation(compressor, SHAPES, 5, piece_bytes=piece_bytes)
    computed: Counter[int] = Counter()
    compute = IntraNodeRequests._compute

    def counting(self: IntraNodeRequests, request: ComputeOnce, offset: int) -> torch.Tensor:
        result = compute(self, request, offset)
        computed[self._workers.global_rank] += int(result.flatten(1).any(dim=1).sum())
        return result

    monkeypatch.setattr(IntraNodeRequests, "_compute", counting)
    sim.reduce([given(0, worker) for worker in range(5)])
    assert computed == dict.fromkeys(range(5), len(SHAPES) // 5)


def test_room_is_given_back_where_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = PowerSGDPlus(2, restart_every=3, restart="svd")
    sim = simulation(compressor, NAMES, 1, piece_bytes=2 * ONE, bucket_bytes=3 * ONE)
    room, calls = sim.reducers[0]._wire.room, []

    def failing(matrices: torch.Tensor, r: int) -> torch.Tensor:
        calls.append(room.taken)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subspaces, "leading_left_singular_vectors", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        sim.reduce([given(0, 0)])
    assert calls[0] > 0
    assert room.taken == 0
