"""What every step must keep, whatever the matrices look like: conservation of mass,
full rank, odd shapes, dead columns, scale, randomness.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import Identity, LowRankCommError, PowerSGD, PowerSGDPlus
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.memory import ErrorMemory
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from lowrank_comm.simulation import Simulation
from tests.support.driver import Workers, dense, simulation
from tests.support.reference import Reference, gradient, initial_basis

COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=3),
    PowerSGDPlus(2, restart_every=3, restart="randomized"),
    PowerSGDPlus(2, restart_every=3, exact_restart=True),
    PowerSGDPlus(2, restart_every=3, consensus_restart=True),
    PowerSGDPlus(2, restart_every=3, stagger=True),
]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
SHAPES = {"tall": (12, 7), "wide": (7, 12), "filter": (6, 3, 2, 2), "bias": (5,), "scale": ()}
MATRICES = ("tall", "wide", "filter")


def drawn(
    step: int,
    worker: int,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(gradient(shape, step, worker, k), dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }


def apply(sim: Simulation, matrix: Tensor) -> Tensor:
    """One step of a simulation that holds one matrix, called w, in one worker."""
    return sim.reduce([{"w": matrix.clone()}])["w"]


def low_rank(m: int, n: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, rank, generator=generator, dtype=torch.float64)
        @ torch.randn(rank, n, generator=generator, dtype=torch.float64)
    ).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# --- conservation ----------------------------------------------------------------------------------------------------


@every_compressor
def test_given_is_sent_plus_kept(compressor: Compressor) -> None:
    """Per worker and step g + e = sent + e', with `sent` from the compressor's own
    result and e' from the reducer's memory.
    """
    shape, workers = (9, 6), 3
    basis = torch.from_numpy(initial_basis({"w": shape}, 2)["w"])
    by_hand = Workers(compressor, ("w",), workers, basis[None])
    sim = simulation(compressor, {"w": shape}, workers, initial_basis={"w": basis})
    for t in range(12):
        given = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(workers)]
        before = [sim.error_memory(worker)["w"].clone() for worker in range(workers)]
        results = by_hand.step([g[None] for g in given])
        applied = sim.reduce([{"w": g.clone()} for g in given])["w"]
        torch.testing.assert_close(applied, dense(results[0].applied)[0], rtol=1e-12, atol=1e-12)
        sent = [dense(result.sent)[0] for result in results]
        torch.testing.assert_close(torch.stack(sent).mean(0), applied, rtol=1e-12, atol=1e-12)
        for worker in range(workers):
            kept = sim.error_memory(worker)["w"]
            # consensus: the mean is kept everywhere
            if getattr(compressor, "consensus_restart", False) and t % 3 == 0:
                kept_mean = torch.stack([sim.error_memory(w)["w"] for w in range(workers)]).mean(0)
                given_mean = torch.stack([g + e for g, e in zip(given, before, strict=True)]).mean(
                    0
                )
                torch.testing.assert_close(given_mean, applied + kept_mean, rtol=1e-12, atol=1e-12)
            else:
                torch.testing.assert_close(
                    given[worker] + before[worker], sent[worker] + kept, rtol=1e-12, atol=1e-12
                )


@every_compressor
def test_compression_is_an_orthogonal_projection(compressor: Compressor) -> None:
    """C(Delta) is orthogonal to Delta - C(Delta), hence Lemma 1: neither is longer than
    Delta.
    """
    by_hand = Workers(
        compressor, ("w",), 2, torch.from_numpy(initial_basis({"w": (8, 10)}, 2)["w"])[None]
    )
    for t in range(7):
        given = torch.stack([torch.from_numpy(gradient((8, 10), t, worker)) for worker in range(2)])
        delta = given.mean(0) + (torch.stack(by_hand.errors).mean(0)[0] if by_hand.errors else 0)
        applied = dense(by_hand.step([g[None] for g in given])[0].applied)[0]
        rest = delta - applied
        assert abs(float((applied * rest).sum())) < 1e-11 * float(delta.norm()) ** 2
        assert max(applied.norm(), rest.norm()) <= delta.norm() * (1 + 1e-12)


@every_compressor
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_applied_adds_up_to_what_was_given(compressor: Compressor, workers: int) -> None:
    """Over the run: the sum of what was applied = the sum of the mean gradients - the
    mean error.
    """
    sim = simulation(compressor, SHAPES, workers)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for t in range(50):
        gradients = [drawn(t, worker) for worker in range(workers)]
        for name in SHAPES:
            given[name] += sum(g[name] for g in gradients) / workers
        for name, value in sim.reduce(gradients).items():
            applied[name] += value
    errors = [sim.error_memory(worker) for worker in range(workers)]
    assert set(errors[0]) == set(MATRICES)
    for name in SHAPES:
        error = (
            sum(e[name] for e in errors) / workers
            if name in MATRICES
            else torch.zeros_like(given[name])
        )
        assert relative(applied[name] + error, given[name]) < 1e-10
        # otherwise nothing was compressed
        assert name not in MATRICES or float(error.norm()) > 1e-2


def test_a_narrow_wire_loses_nothing_to_its_own_rounding() -> None:
    """wire_dtype=bfloat16, one worker: P and Q are rounded on the wire, and what
    rounding took stays in the error memory.
    """
    for compressor in (PowerSGD(2), PowerSGDPlus(2, restart_every=4)):
        sim = simulation(compressor, {"w": (12, 7)}, dtype=torch.float32, wire_dtype="bfloat16")
        given, applied = torch.zeros(12, 7), torch.zeros(12, 7)
        rounded = False
        for t in range(20):
            g = torch.as_tensor(gradient((12, 7), t, 0), dtype=torch.float32)
            out = apply(sim, g)
            given, applied = given + g, applied + out
            rounded |= relative(out, out.to(torch.bfloat16).float()) > 1e-4
        assert relative(applied + sim.error_memory(0)["w"], given) < 1e-6
        assert sim.last_reports[0].bytes["factors"] == 2 * 2 * (12 + 7)
        assert rounded


NARROW = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=2),
    PowerSGDPlus(2, restart_every=2, exact_restart=True),
    PowerSGDPlus(2, restart_every=2, consensus_restart=True),
    PowerSGDPlus(2, restart_every=2, restart="randomized"),
]


@pytest.mark.parametrize("compressor", NARROW, ids=repr)
def test_on_a_narrow_wire_every_step_is_exact_for_one_worker(compressor: Compressor) -> None:
    """g + e = sent + e' with what was really sent: rounded factors, a rounded matrix at
    a restart, a basis that is orthonormal again after it was rounded.
    """
    sim = simulation(compressor, {"w": (12, 7)}, dtype=torch.float32, wire_dtype="bfloat16")
    for t in range(6):
        g = torch.as_tensor(gradient((12, 7), t, 0), dtype=torch.float32)
        before = sim.error_memory(0)["w"].clone()
        out = apply(sim, g)
        after = sim.error_memory(0)["w"]
        assert relative(out + after, g + before) < 1e-6
        # What is kept of a projection is orthogonal to what is sent, up to the rounding
        # of the factors.
        if not (isinstance(compressor, PowerSGDPlus) and compressor.exact_restart and t % 2 == 0):
            u = torch.linalg.svd(out)[0][:, :2]
            assert float((u.T @ after).norm() / (g + before).norm()) < 1e-2


def test_a_basis_that_was_rounded_on_the_wire_is_orthonormal_again() -> None:
    """With r = m every basis spans everything, so P P^T D = D, unless P is not
    orthonormal: then it is off by as much.
    """
    sim = simulation(
        PowerSGDPlus(7, restart_every=1), {"w": (7, 12)}, dtype=torch.float32, wire_dtype="bfloat16"
    )
    g = torch.as_tensor(gradient((7, 12), 0, 0), dtype=torch.float32)
    assert relative(apply(sim, g), g.to(torch.bfloat16).float()) < 1e-5


@pytest.mark.parametrize("wire", ["bfloat16", "float16", None])
@pytest.mark.parametrize("workers", [2, 4])
def test_what_a_narrow_wire_loses_among_several_workers(workers: int, wire: str | None) -> None:
    """The rounding of the sum on the wire belongs to nobody's error memory. It is below
    the wire's eps of what was given, and it is not nothing.
    """
    sim = simulation(
        PowerSGDPlus(2, restart_every=4),
        {"w": (12, 7)},
        workers,
        dtype=torch.float32,
        wire_dtype=wire,
    )
    given, applied = torch.zeros(12, 7), torch.zeros(12, 7)
    for t in range(100):
        gradients = [
            torch.as_tensor(gradient((12, 7), t, worker), dtype=torch.float32)
            for worker in range(workers)
        ]
        given += sum(gradients) / workers
        applied += sim.reduce([{"w": g} for g in gradients])["w"]
    kept = sum(sim.error_memory(worker)["w"] for worker in range(workers)) / workers
    lost = relative(applied + kept, given)
    eps = torch.finfo(getattr(torch, wire or "float32")).eps
    # in float32 every operation rounds as much as the wire
    assert lost < (eps if wire else 10 * eps)
    # a bound that nothing comes near would say nothing
    assert wire is None or lost > eps / 100


def test_stochastic_rounding_draws_anew_by_step_worker_and_matrix() -> None:
    """Equal noise at every step, or on all workers, would be a bias."""
    # between two numbers of bfloat16
    values = torch.full((2, 40, 30), 1.0 + 2**-10)

    def rounded(
        t: int, worker: int, shared: bool = False, names: tuple[str, ...] = ("a", "b")
    ) -> torch.Tensor:
        options = ErrorFeedback("bfloat16", "stochastic")
        memory = ErrorMemory(options, names, 40, 30, torch.float32, torch.device("cpu"), 7, worker)
        memory.store(values[: len(names)], t=t, shared=shared)
        return memory.tensor

    first = rounded(3, 0)
    assert torch.equal(first, rounded(3, 0))
    for other in (rounded(4, 0), rounded(3, 1), first.flip(0)):
        assert 0.1 < float((first != other).float().mean()) < 0.9
    assert torch.equal(rounded(3, 0, shared=True), rounded(3, 1, shared=True))
    # batch = singles
    assert torch.equal(rounded(3, 0, names=("b",))[0], first[1])
    mean = torch.stack([rounded(t, 0) for t in range(60)]).double().mean()
    assert abs(float(mean) - float(values[0, 0, 0])) < 2e-4


def test_an_offloaded_memory_gives_the_same_numbers() -> None:
    sims = [
        simulation(
            PowerSGDPlus(2, restart_every=3),
            {"w": (300, 200), "v": (12, 7)},
            2,
            error_feedback=ErrorFeedback(offload=offload),
        )
        for offload in (False, True)
    ]
    for t in range(5):
        given = [
            {n: torch.from_numpy(gradient(s, t, w)) for n, s in (("w", (300, 200)), ("v", (12, 7)))}
            for w in (0, 1)
        ]
        one, other = (sim.reduce(given) for sim in sims)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_dead_matrix_leaves_the_others_of_its_batch_alone() -> None:
    """Only it takes the path with random vectors; the rest get, bit by bit, what they
    get without it.
    """
    shapes = dict.fromkeys(("a", "b", "c"), (12, 7))
    with_dead, without = (simulation(PowerSGD(3), shapes) for _ in range(2))
    for t in range(4):
        given = {
            name: torch.from_numpy(gradient((12, 7), t, 0, k)) for k, name in enumerate(shapes)
        }
        # rank 1 of 3
        thin = torch.outer(given["b"][:, 0], given["b"][0])
        one = with_dead.reduce([given | {"b": thin if t == 0 else given["b"]}])
        other = without.reduce([given])
        assert torch.equal(one["a"], other["a"])
        assert torch.equal(one["c"], other["c"])
        if t == 0:
            assert relative(one["b"], thin) < 1e-12


def test_a_float16_wire_carries_numbers_beyond_its_range_if_their_mean_is_within() -> None:
    """65 504 ends float16. Gradients are divided by the number of workers before they
    are cast, and the own contribution is known all the same.
    """
    for name, shape in (("matrix", (6, 4)), ("vector", (5,))):
        compressor = PowerSGDPlus(2, restart_every=1)
        sim = simulation(compressor, {name: shape}, 2, dtype=torch.float32, wire_dtype="float16")
        large = torch.full(shape, 8e4)
        applied = sim.reduce([{name: large}, {name: torch.zeros(shape)}])[name]
        assert applied is not None
        assert relative(applied, large / 2) < 1e-3
        if name == "matrix":
            assert (
                relative(
                    applied + (sim.error_memory(0)[name] + sim.error_memory(1)[name]) / 2, large / 2
                )
                < 1e-6
            )


def test_error_memory_is_in_gradient_units_whatever_the_loss_scale() -> None:
    """reduce(scale=s): Delta = g / s + e, and what is written back is the mean times s."""
    slots = [
        ParamInfo(name, shape, torch.float64, torch.device("cpu")) for name, shape in SHAPES.items()
    ]
    plain = Reducer(slots, PowerSGDPlus(2, restart_every=3), Group(), min_compression_rate=0)
    scaled = Reducer(slots, PowerSGDPlus(2, restart_every=3), Group(), min_compression_rate=0)
    for t in range(7):
        scale = 2.0 ** (10 - t)
        one, other = list(drawn(t, 0).values()), [g * scale for g in drawn(t, 0).values()]
        assert plain.reduce(one).applied
        assert scaled.reduce(other, scale=scale).applied
        plain.commit()
        scaled.commit()
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b / scale, a, rtol=1e-12, atol=1e-12)
        for name in MATRICES:
            torch.testing.assert_close(
                scaled.error_memory()[name], plain.error_memory()[name], rtol=1e-12, atol=1e-12
            )


def held(reducer: Reducer) -> dict[str, Tensor]:
    """A copy of the error memory and the bases."""
    bases = {
        f"{name} {symbol}": q
        for name, parts in reducer.state.bases().items()
        for symbol, q in parts.items()
    }
    return {name: tensor.clone() for name, tensor in (reducer.state.error_memory() | bases).items()}


@every_compressor
def test_a_pass_is_pending_until_it_is_committed_or_rolled_back(compressor: Compressor) -> None:
    """An engine may find out later that a step does not count (loss scaling). Rolled
    back, the pass has left no trace; nothing is forgotten half-way, since a second pass
    before the decision is an error.
    """
    slots = [
        ParamInfo(name, shape, torch.float64, torch.device("cpu")) for name, shape in SHAPES.items()
    ]
    reducer, twin = (Reducer(slots, compressor, Group(), min_compression_rate=0) for _ in range(2))
    for t in range(5):
        before = held(reducer)
        for fate in (reducer.rollback, reducer.commit):
            given = (
                list(drawn(t, 0).values())
                if fate == reducer.commit
                else list(drawn(100 + t, 0).values())
            )
            assert reducer.reduce(given).applied
            assert all(torch.equal(tensor, before[key]) for key, tensor in held(reducer).items())
            with pytest.raises(LowRankCommError, match="commit"):
                reducer.reduce(given)
            fate()
        expected = list(drawn(t, 0).values())
        assert twin.reduce(expected).applied
        twin.commit()
        assert reducer.step == twin.step == t + 1
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        assert all(torch.equal(tensor, held(twin)[key]) for key, tensor in held(reducer).items())
    with pytest.raises(LowRankCommError, match="reduce"):
        reducer.commit()


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "rounding": "stochastic"}], ids=str
)
def test_an_error_memory_of_16_bits_loses_little(options: dict[str, str]) -> None:
    """500 steps of two workers with data of their own and noise: what got lost is below
    1 % of what was given (and not nothing, as it is in float32: the memory is as narrow
    as it says).
    """

    def lost(**memory: Any) -> float:
        sim = simulation(
            PowerSGD(2),
            {"w": (12, 9)},
            2,
            dtype=torch.float32,
            error_feedback=ErrorFeedback(**memory),
        )
        given = applied = torch.zeros(12, 9, dtype=torch.float64)
        for t in range(500):
            gradients = [
                torch.as_tensor(gradient((12, 9), t, worker), dtype=torch.float32)
                for worker in range(2)
            ]
            given = given + sum(gradients).double() / 2
            applied = applied + sim.reduce([{"w": g} for g in gradients])["w"].double()
        errors = [sim.error_memory(worker)["w"] for worker in range(2)]
        assert errors[0].dtype == getattr(torch, memory.get("dtype", "float32"))
        return relative(applied + sum(e.double() for e in errors) / 2, given)

    assert 1e-5 < lost(**options) < 1e-2
    assert lost() < 1e-5


# --- full rank, shapes -----------------------------------------------------------------------------------------------


@every_compressor
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 5), (1, 9), (9, 1), (6, 3, 2, 2), (1, 1)])
def test_full_rank_is_the_plain_mean(compressor: Compressor, shape: tuple[int, ...]) -> None:
    """With r >= min(m, n) (cut to it) every step gives the mean of the gradients, and
    no error is left.
    """
    settings = {key: value for key, value in vars(compressor).items() if key != "rank"}
    sim = simulation(type(compressor)(rank=50, **settings), {"w": shape}, 2)
    for t in range(8):
        gradients = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(2)]
        applied = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
        assert relative(applied, sum(gradients) / 2) < 1e-10
        mean_error = (sim.error_memory(0)["w"] + sim.error_memory(1)["w"]) / 2
        assert float(mean_error.norm()) < 1e-9
    assert applied.shape == torch.Size(shape)


def test_rank_is_cut_and_the_plan_says_so() -> None:
    sim = simulation(PowerSGD(10), {"small": (5, 8), "large": (30, 20)})
    rows = {row.name: row for row in sim.reducers[0].plan.rows}
    assert (rows["small"].rank, rows["large"].rank) == (5, 10)
    assert rows["small"].reason == "rank 10 cut to 5"
    assert rows["large"].reason == ""
    assert "cut to min(m, n) for 1 of" in str(sim.reducers[0].plan)


def test_what_is_not_worth_compressing_goes_dense() -> None:
    """A matrix is compressed when m n / (r (m + n)) > min_compression_rate; vectors and
    scalars never are. What goes dense has no error.
    """
    shapes = {
        "row": (1, 40),
        "column": (40, 1),
        "edge": (16, 16),
        "big": (17, 16),
        "vector": (64,),
        "scalar": (),
        "filter": (16, 4, 3, 3),
    }
    # 16 x 16 at rank 4: exactly 2, not more
    sim = Simulation(shapes, PowerSGD(4), 2, dtype=torch.float64)
    assert set(sim.error_memory(0)) == {"big", "filter"}
    for t in range(3):
        gradients = [drawn(t, worker, shapes) for worker in range(2)]
        applied = sim.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
        for name in shapes:
            distance = float((applied[name] - (gradients[0][name] + gradients[1][name]) / 2).norm())
            assert (distance > 1e-3) if name in ("big", "filter") else (distance < 1e-14), name


def test_rules_override_by_name_and_the_first_match_wins() -> None:
    shapes = {
        "embed.weight": (60, 20),
        "a.weight": (60, 20),
        "b.weight": (60, 20),
        "tiny.weight": (6, 4),
    }
    rules = [
        Rule("embed.*", treatment="dense"),
        Rule("a.*", rank=2),
        Rule("tiny.*", treatment="low_rank"),
        Rule("*", rank=7),
    ]
    sim = Simulation(shapes, PowerSGD(4), 1, dtype=torch.float64, rules=rules)
    ranks = {row.name: row.rank for row in sim.reducers[0].plan.rows}
    assert ranks == {"embed.weight": 0, "a.weight": 2, "b.weight": 7, "tiny.weight": 4}
    sim.reduce([drawn(0, 0, shapes)])
    assert set(sim.error_memory(0)) == {"a.weight", "b.weight", "tiny.weight"}
    assert sim.last_reports[0].bytes["factors"] == 8 * (2 * 80 + 7 * 80 + 4 * 10)
    assert sim.last_reports[0].bytes["dense"] == 8 * 60 * 20


def test_identity_is_the_plain_mean() -> None:
    sim = simulation(Identity(), SHAPES, 3)
    gradients = [drawn(0, worker) for worker in range(3)]
    applied = sim.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
    assert sim.error_memory(0) == {}
    for name in SHAPES:
        torch.testing.assert_close(
            applied[name], sum(g[name] for g in gradients) / 3, rtol=1e-15, atol=1e-15
        )


def test_a_tensor_of_four_dimensions_is_a_matrix_of_its_first() -> None:
    """(6, 3, 2, 2) behaves as (6, 12), number by number, and its error memory has the
    parameter's shape.
    """
    basis = {"w": torch.from_numpy(initial_basis({"w": (6, 12)}, 2)["w"])}
    as_filter = simulation(PowerSGD(2), {"w": (6, 3, 2, 2)}, initial_basis=basis)
    as_matrix = simulation(PowerSGD(2), {"w": (6, 12)}, initial_basis=basis)
    for t in range(5):
        g = torch.from_numpy(gradient((6, 12), t, 0))
        assert torch.equal(apply(as_filter, g.view(6, 3, 2, 2)).reshape(6, 12), apply(as_matrix, g))
    assert as_filter.error_memory(0)["w"].shape == (6, 3, 2, 2)
    assert torch.equal(
        as_filter.error_memory(0)["w"].reshape(6, 12), as_matrix.error_memory(0)["w"]
    )


def test_gradients_that_are_not_contiguous() -> None:
    one, other = simulation(PowerSGD(2), {"w": (8, 6)}), simulation(PowerSGD(2), {"w": (8, 6)})
    for t in range(4):
        g = torch.from_numpy(gradient((8, 6), t, 0))
        strided = g.t().contiguous().t()
        assert not strided.is_contiguous()
        torch.testing.assert_close(
            other.reduce([{"w": strided}])["w"], apply(one, g), rtol=1e-13, atol=1e-13
        )
    torch.testing.assert_close(
        one.error_memory(0)["w"], other.error_memory(0)["w"], rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize(
    ("dtype", "memory"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype: torch.dtype, memory: torch.dtype) -> None:
    """The error memory has the wider of float32 and the parameter's dtype; what is
    applied has the gradient's.
    """
    sim = simulation(PowerSGD(2), {"w": (12, 7)}, 2, dtype=dtype)
    applied = sim.reduce(
        [{"w": torch.as_tensor(gradient((12, 7), 0, worker), dtype=dtype)} for worker in range(2)]
    )["w"]
    assert applied.dtype == dtype
    assert sim.error_memory(0)["w"].dtype == memory
    assert bool(torch.isfinite(applied).all())


LARGE = {
    "square": (401, 353),
    "twin": (401, 353),
    "wide": (37, 4001),
    "tall": (4001, 37),
    "filter": (128, 64, 5, 5),
}
"""Above the size from which matrices are worked on one by one, in blocks of rows; odd,
so that the last block is not full.
"""


@pytest.mark.parametrize("tau", [None, 2])
def test_large_matrices_follow_the_paper(tau: int | None) -> None:
    """Against the NumPy reference, two workers; the twin's gradient is missing on one
    worker in the second step (it counts as zero).
    """
    bases = initial_basis(LARGE, 3)
    compressor = PowerSGD(3) if tau is None else PowerSGDPlus(3, restart_every=tau)
    sim = simulation(
        compressor, LARGE, 2, initial_basis={name: torch.from_numpy(q) for name, q in bases.items()}
    )
    paper = {
        name: Reference(shape, 2, 3, basis=bases[name], restart_every=tau)
        for name, shape in LARGE.items()
    }
    for t in range(4):
        given: list[dict[str, Any]] = [drawn(t, worker, LARGE) for worker in range(2)]
        if t == 1:
            given[1]["twin"] = None
            given[0]["wide"] = given[0]["wide"].t().contiguous().t()
        applied = sim.reduce(given)
        for name, reference in paper.items():
            absent = torch.zeros(LARGE[name], dtype=torch.float64)
            expected = reference.step(
                [(absent if g[name] is None else g[name]).numpy() for g in given]
            )
            np.testing.assert_allclose(applied[name].numpy(), expected, rtol=1e-9, atol=1e-9)
            for worker in range(2):
                np.testing.assert_allclose(
                    sim.error_memory(worker)[name].numpy(),
                    reference.errors[worker],
                    rtol=1e-9,
                    atol=1e-9,
                )


def test_large_gradients_of_16_bits_and_with_a_loss_scale() -> None:
    """bfloat16 gradients give the error memory that the same numbers in float32 give,
    also with a scale in them.
    """
    cpu = torch.device("cpu")
    of_16_bits, of_32_bits = (
        Reducer([ParamInfo("w", (401, 353), dtype, cpu)], PowerSGDPlus(3, restart_every=2), Group())
        for dtype in (torch.bfloat16, torch.float32)
    )
    for t in range(4):
        narrow = torch.as_tensor(gradient((401, 353), t, 0)).to(torch.bfloat16)
        wide = narrow.float()
        assert of_16_bits.reduce([narrow.mul_(64)], scale=64.0).applied
        assert of_32_bits.reduce([wide]).applied
        of_16_bits.commit()
        of_32_bits.commit()
        assert relative(of_16_bits.error_memory()["w"], of_32_bits.error_memory()["w"]) < 1e-5
        assert relative(narrow.float() / 64, wide) < 1e-2


# --- degenerate gradients --------------------------------------------------------------------------------------------


@every_compressor
@pytest.mark.parametrize("first", [0, 4], ids=["from the start", "after some steps"])
def test_zero_gradients_then_progress(compressor: Compressor, first: int) -> None:
    """Zero gradients leave everything zero; a gradient of rank 2 that follows goes
    through whole, at once.
    """
    sim = simulation(compressor, {"w": (14, 9)})
    for t in range(first):
        apply(sim, low_rank(14, 9, 5, t))
        cleared = t % 3 == 0 and getattr(compressor, "exact_restart", False)
        assert cleared or float(sim.error_memory(0)["w"].norm()) > 1e-1
    # what error there is goes out first
    for _ in range(40):
        last = apply(sim, torch.zeros(14, 9, dtype=torch.float64))
    assert float(last.norm()) < 1e-9
    assert float(sim.error_memory(0)["w"].norm()) < 1e-9
    for t in range(3):
        g = low_rank(14, 9, 2, 100 + t)
        assert relative(apply(sim, g), g) < 1e-9


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_lower_rank_than_r(compressor: Compressor, dtype: torch.dtype) -> None:
    """Rank 1 under r = 2: P is rank-deficient, its filling is arbitrary, the result
    exact; then rank 2 goes through as well.
    """
    sim = simulation(compressor, {"w": (14, 9)}, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for t in range(5):
        g = low_rank(14, 9, 1, t, dtype)
        assert relative(apply(sim, g), g) < tolerance
    g = low_rank(14, 9, 2, 50, dtype)
    assert relative(apply(sim, g), g) < 10 * tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rank_before", [0, 1, 5, 40])
def test_dead_columns_of_q_are_redrawn_before_use(
    dtype: torch.dtype, tolerance: float, rank_before: int
) -> None:
    """120 x 48 at full rank 48: after a gradient of lower rank most columns of Q are
    dead. Random vectors in P alone would miss more than half of the next gradient; with
    Q redrawn it goes through whole.
    """
    sim = simulation(PowerSGD(48), {"w": (120, 48)}, dtype=dtype)
    poor = (
        low_rank(120, 48, rank_before, 1, dtype)
        if rank_before
        else torch.zeros(120, 48, dtype=dtype)
    )
    apply(sim, poor)
    for seed in (2, 3):
        g = low_rank(120, 48, 48, seed, dtype)
        assert relative(apply(sim, g), g) < tolerance


@pytest.mark.parametrize("rows", [8, 15])
def test_a_gradient_whose_first_rows_and_columns_are_zero(rows: int) -> None:
    """Padding: a basis filled with unit vectors e_1, e_2, ... would never see it."""
    sim = simulation(PowerSGD(2), {"w": (20, 18)})
    apply(sim, torch.zeros(20, 18, dtype=torch.float64))
    g = torch.zeros(20, 18, dtype=torch.float64)
    g[rows:, rows:] = low_rank(20 - rows, 18 - rows, 2, 5)
    assert relative(apply(sim, g), g) < 1e-10
    assert float(sim.error_memory(0)["w"][:rows].norm()) < 1e-10


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_scale_does_not_matter(compressor: Compressor, dtype: torch.dtype, scale: float) -> None:
    """C(s Delta) = s C(Delta): squares of 1e18 overflow float32 and those of 1e-18
    vanish, unless one takes care.
    """
    one = simulation(compressor, {"w": (12, 9)}, dtype=dtype)
    other = simulation(compressor, {"w": (12, 9)}, dtype=dtype)
    for t in range(6):
        g = torch.as_tensor(gradient((12, 9), t, 0), dtype=dtype)
        expected, actual = apply(one, g), apply(other, g * scale)
        assert relative(actual.double() / scale, expected.double()) < (
            1e-10 if dtype == torch.float64 else 1e-4
        )


# --- batches, randomness ---------------------------------------------------------------------------------------------


# staggered offsets depend on which matrices there are
@pytest.mark.parametrize("compressor", COMPRESSORS[:5], ids=repr)
def test_a_batch_gives_what_its_members_give_alone(compressor: Compressor) -> None:
    """Matrices of one shape are one batch; among them one that is zero and one of rank
    1, so that the fall-backs run for part of it.
    """
    names = [f"w{k}" for k in range(5)]
    together = simulation(compressor, dict.fromkeys(names, (10, 6)), 2)
    alone = {name: simulation(compressor, {name: (10, 6)}, 2) for name in names}
    for t in range(7):
        gradients = [
            {
                name: torch.from_numpy(gradient((10, 6), t, worker, k))
                for k, name in enumerate(names)
            }
            for worker in range(2)
        ]
        for g in gradients:
            g["w1"].zero_()
            g["w3"] = low_rank(10, 6, 1, t)
        applied = together.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
        for name, sim in alone.items():
            expected = sim.reduce([{name: g[name].clone()} for g in gradients])[name]
            torch.testing.assert_close(applied[name], expected, rtol=1e-12, atol=1e-12)
    for worker in range(2):
        for name, sim in alone.items():
            torch.testing.assert_close(
                together.error_memory(worker)[name],
                sim.error_memory(worker)[name],
                rtol=1e-12,
                atol=1e-12,
            )


@every_compressor
def test_global_random_states_are_not_touched(compressor: Compressor) -> None:
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    states = (torch.get_rng_state().clone(), numpy_state, random.getstate())
    sim = simulation(compressor, SHAPES, 2)
    for t in range(4):
        sim.reduce(
            [
                (
                    drawn(t, worker)
                    if t
                    else {k: torch.zeros_like(v) for k, v in drawn(t, worker).items()}
                )
                for worker in range(2)
            ]
        )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_the_seed_determines_every_bit() -> None:
    """Same seed, same bits, whatever torch's own random state; another seed, another
    subspace; another name, another subspace.
    """

    def run(seed: int, name: str = "w") -> Tensor:
        torch.manual_seed(seed + random.randrange(1000))
        sim = simulation(PowerSGD(2), {name: (12, 9)}, 2, seed=seed)
        for t in range(3):
            out = sim.reduce(
                [{name: torch.from_numpy(gradient((12, 9), t, worker))} for worker in range(2)]
            )[name]
        return out

    assert torch.equal(run(3), run(3))
    assert relative(run(4), run(3)) > 1e-2
    assert relative(run(3, "v"), run(3)) > 1e-2


def test_the_first_basis_does_not_depend_on_the_world_size() -> None:
    """Equal gradients on 1 and on 4 workers: the same mean, hence the same result if
    Q_{-1} is the same.
    """
    g = torch.from_numpy(gradient((12, 9), 0, 0))
    alone = simulation(PowerSGD(2), {"w": (12, 9)}, 1, seed=5).reduce([{"w": g.clone()}])["w"]
    four = simulation(PowerSGD(2), {"w": (12, 9)}, 4, seed=5).reduce(
        [{"w": g.clone()} for _ in range(4)]
    )["w"]
    torch.testing.assert_close(four, alone, rtol=1e-12, atol=1e-12)


# --- the error memory over a long run --------------------------------------------------------------------------------


def test_error_memory_stays_bounded_where_the_averaged_residual_grows() -> None:
    """4 000 steps, 4 workers with data of their own. The averaged form, e_i = Delta_i -
    P Q^T, leads to the same training, since only the mean error matters; so its memory
    is the running sum of g_i - applied, which the test adds up as its control.
    """
    shape, workers = (16, 12), 4
    sim = simulation(PowerSGD(2), {"w": shape}, workers)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = [
        0.2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(workers)
    ]
    averaged = [torch.zeros(shape, dtype=torch.float64) for _ in range(workers)]
    local_norm, averaged_norm = {}, {}
    for t in range(1, 4001):
        gradients = [
            common / t**0.5
            + bias[worker]
            + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for worker in range(workers)
        ]
        applied = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
        averaged = [e + g - applied for e, g in zip(averaged, gradients, strict=True)]
        if t in (1000, 4000):
            local_norm[t] = max(
                float(sim.error_memory(worker)["w"].norm()) for worker in range(workers)
            )
            averaged_norm[t] = max(float(e.norm()) for e in averaged)
    mean = torch.stack([sim.error_memory(worker)["w"] for worker in range(workers)]).mean(0)
    # the same mean error
    torch.testing.assert_close(torch.stack(averaged).mean(0), mean, rtol=1e-8, atol=1e-8)
    assert local_norm[4000] < 1.5 * local_norm[1000]
    assert averaged_norm[4000] > 3 * averaged_norm[1000]
