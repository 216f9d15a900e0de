"""RandomProjection: a fresh subspace at every step, contractive with error feedback or
unbiased without.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowrank_comm import ConfigError, RandomProjection
from tests.support.driver import dense, simulation
from tests.support.gloo import GlooPool
from tests.support.projection_runs import SHAPES, blocks_of_rows, train
from tests.support.projections import ByHand, distance_in_standard_errors, draws, given, relative
from tests.support.reference import gradient, spectrum_matrix
from tests.support.reference_projection import Projection

SIDES = ("short", "long")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["contractive", "unbiased"])
def test_fifteen_steps_as_numpy(form: str, side: str) -> None:
    """With error feedback where the form allows it, three workers."""
    for name, shape in SHAPES.items():
        ef = form == "contractive"
        paper = Projection(name, shape, 3, 3, 1, "every step", side, feedback=ef)
        ours = ByHand(RandomProjection(3, form, side), (name,), shape, 3, ef)
        scale = 1.0 if ef else paper.s / 3
        for t in range(15):
            results = ours.step([g[None] for g in given(shape, t, 3)])
            applied = scale * paper.step([gradient(shape, t, worker) for worker in range(3)])
            for worker, result in enumerate(results):
                np.testing.assert_allclose(dense(result.applied)[0], applied, rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(
                    ours.errors[worker][0], paper.errors[worker], rtol=1e-9, atol=1e-9
                )
            assert (
                relative(sum(dense(r.sent)[0] for r in results) / 3, dense(results[0].applied)[0])
                < 1e-12
            )


def test_what_is_applied_adds_up_to_what_was_given() -> None:
    """Contractive with error feedback, 50 steps: nothing is lost, and the memory stays
    bounded: with a new subspace at every step, what waits has gone after some s / r
    steps.
    """
    run = ByHand(RandomProjection(2), ("w",), (12, 8), 2, True)
    total = applied = torch.zeros(12, 8, dtype=torch.float64)
    norms = []
    for t in range(50):
        gradients = given((12, 8), t, 2)
        total = total + sum(gradients) / 2
        applied = applied + dense(run.step([g[None] for g in gradients])[0].applied)[0]
        norms.append(float(run.errors[0].norm()))
    assert relative(applied + sum(e[0] for e in run.errors) / 2, total) < 1e-12
    assert max(norms[25:]) < 1.5 * max(norms[:25])


def test_scaled_with_feedback_the_memory_grows_without_bound() -> None:
    """Why the combination is refused: the residual of the unbiased form is longer than
    Delta (r < s / 2).
    """
    run = ByHand(RandomProjection(2, "unbiased"), ("w",), (12, 8), 1, True)
    norms = []
    for t in range(50):
        run.step([given((12, 8), t, 1)[0][None]])
        norms.append(float(run.errors[0].norm()))
    assert norms[49] > 1e6 * norms[0]


@pytest.mark.parametrize(
    ("shape", "side"), [((8, 5), "short"), ((5, 8), "short"), ((8, 5), "long")]
)
def test_the_unbiased_form_is(shape: tuple[int, int], side: str) -> None:
    """20 000 draws, 4 standard errors at the worst of 40 entries, which the contractive
    form misses by far; omega = s / r
    - 1 within 3 standard errors.
    """
    matrix = torch.from_numpy(spectrum_matrix(*shape, np.array([3.0, 1.0, 0.3]), seed=1))
    sample = draws(RandomProjection(2, "unbiased", side), matrix, 20_000)
    assert distance_in_standard_errors(sample, matrix) < 4.0
    assert distance_in_standard_errors(sample * 2 / (5 if side == "short" else 8), matrix) > 40.0
    omega = (sample - matrix).square().sum(dim=(1, 2)) / matrix.square().sum()
    expected = (5 if side == "short" else 8) / 2 - 1
    assert abs(float(omega.mean()) - expected) < 3 * float(omega.std()) / 20_000**0.5


@pytest.mark.parametrize(("side", "length"), [("short", 6), ("long", 9)])
def test_the_contractive_form_leaves_one_minus_r_over_s(side: str, length: int) -> None:
    """In expectation, whatever the spectrum: 2 000 draws, 3 standard errors. And it
    never makes Delta longer.
    """
    matrix = torch.from_numpy(spectrum_matrix(9, 6, np.array([5.0, 1.0, 0.1]), seed=2))
    left = (
        (matrix - draws(RandomProjection(2, "contractive", side), matrix, 2_000))
        .square()
        .sum(dim=(1, 2))
    )
    left = left / matrix.square().sum()
    assert abs(float(left.mean()) - (1 - 2 / length)) < 3 * float(left.std()) / 2_000**0.5
    assert float(left.max()) <= 1 + 1e-12


def test_every_step_draws_anew_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    matrix = given((12, 7), 0, 1)[0][None]
    first, again = (ByHand(RandomProjection(2), ("w",), (12, 7), 1, False) for _ in range(2))
    applied = [dense(first.step([matrix])[0].applied) for _ in range(3)]
    assert all(torch.equal(dense(again.step([matrix])[0].applied), one) for one in applied)
    assert all(relative(one, other) > 0.1 for one, other in itertools.pairwise(applied))
    other = ByHand(RandomProjection(2), ("v",), (12, 7), 1, False)
    assert relative(dense(other.step([matrix])[0].applied), applied[0]) > 0.1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form", ["contractive", "unbiased"])
def test_full_rank_is_dense_and_the_transposed_is_transposed(form: str) -> None:
    for shape in ((12, 7), (7, 12), (1, 5), (5, 1)):
        run = ByHand(RandomProjection(9, form), ("w",), shape, 2, False)
        gradients = given(shape, 0, 2)
        assert (
            relative(
                dense(run.step([g[None] for g in gradients])[0].applied)[0], sum(gradients) / 2
            )
            < 1e-11
        )
    straight, turned = (
        ByHand(RandomProjection(2, form), ("w",), shape, 1, False) for shape in ((12, 7), (7, 12))
    )
    for t in range(3):
        g = given((12, 7), t, 1)[0]
        applied = dense(straight.step([g[None]])[0].applied)
        assert relative(dense(turned.step([g.T[None]])[0].applied).mT, applied) < 1e-11


@pytest.mark.parametrize("side", SIDES)
def test_bytes_are_the_formula(side: str) -> None:
    compressor = RandomProjection(2, side=side)
    sim = simulation(compressor, SHAPES, 2, dtype=torch.float32)
    for t in range(5):
        sim.reduce(
            [
                {name: given(shape, t, 2)[w].float() for name, shape in SHAPES.items()}
                for w in range(2)
            ]
        )
    lengths = [max(shape) if side == "short" else min(shape) for shape in SHAPES.values()]
    assert sim.reducers[0].ledger.bytes["factors"] == 5 * 4 * 2 * sum(lengths)
    assert sum(compressor.elements(*shape, 2) for shape in SHAPES.values()) == 2 * sum(lengths)


@pytest.mark.parametrize("wire", [None, "bfloat16"])
def test_gloo_processes_equal_the_simulation(gloo: GlooPool, wire: str | None) -> None:
    histories = gloo.run(train, 3, RandomProjection(2), wire)
    sim = simulation(RandomProjection(2), SHAPES, 3, wire_dtype=wire)
    for t in range(7):
        applied = sim.reduce(
            [{name: given(shape, t, 3)[w] for name, shape in SHAPES.items()} for w in range(3)]
        )
        for name in SHAPES:
            assert all(
                torch.equal(other[t][name], histories[0][t][name]) for other in histories[1:]
            )
            assert relative(histories[0][t][name], applied[name]) < (
                1e-12 if wire is None else 2e-2
            )


def test_rows_in_blocks_equal_whole_matrices(gloo: GlooPool) -> None:
    histories = gloo.run(blocks_of_rows, 4, RandomProjection(2))
    sim = simulation(RandomProjection(2), SHAPES, 2)
    for t in range(5):
        of_ranks = {name: given(shape, t, 4) for name, shape in SHAPES.items()}
        nodes = [
            {name: (g[2 * k] + g[2 * k + 1]) / 2 for name, g in of_ranks.items()} for k in range(2)
        ]
        applied = sim.reduce(nodes)
        for name in SHAPES:
            assert all(relative(history[t][name], applied[name]) < 1e-12 for history in histories)


def test_bad_settings_are_refused_and_the_forms_say_what_they_are() -> None:
    with pytest.raises(
        ConfigError, match=r"form='scaled' is unknown; choose one of 'contractive', 'unbiased'"
    ):
        RandomProjection(2, "scaled")
    with pytest.raises(ConfigError, match=r"side='left' is unknown"):
        RandomProjection(2, side="left")
    contractive, unbiased = RandomProjection(2), RandomProjection(2, "unbiased")
    assert (contractive.contractive, contractive.unbiased, contractive.feedback) == (
        True,
        False,
        "ef14",
    )
    assert (unbiased.contractive, unbiased.unbiased, unbiased.feedback) == (False, True, "none")
