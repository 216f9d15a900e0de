"""GoLore: random subspaces from a step on, and its form that is unbiased."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_comm import ConfigError, GaLore, GoLore
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import Section
from tests.support.driver import dense, simulation
from tests.support.gloo import GlooPool
from tests.support.projection_runs import SHAPES, all_given, blocks_of_rows
from tests.support.projections import ByHand, distance_in_standard_errors, draws, given, relative
from tests.support.reference import spectrum_matrix


def test_the_scaled_form_with_error_feedback_is_refused() -> None:
    for section in (
        {"compressor": "golore", "scaled": True},
        {"compressor": "random_projection", "form": "unbiased"},
    ):
        Section.parse(section)
        with pytest.raises(ConfigError, match="ef14"):
            Section.parse(section | {"error_feedback": {"form": "ef14"}})


def test_the_hybrid_switches_at_the_first_refresh_after_its_step() -> None:
    """A negative control of the comparison: until = 4 and 5 differ from step 4 on,
    until = 5 and 8 do not differ at all.
    """
    runs = {}
    for until in (4, 5, 8):
        run = ByHand(GoLore(3, 4, galore_until=until), ("w",), (12, 7), 2, False)
        runs[until] = [
            dense(run.step([g[None] for g in given((12, 7), t, 2)])[0].applied) for t in range(12)
        ]
    for t in range(12):
        assert torch.equal(runs[5][t], runs[8][t])
        assert torch.equal(runs[4][t], runs[5][t]) == (t < 4 or t >= 8)


def test_the_random_subspace_is_kept_for_a_period_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    bases = []
    for _ in range(2):
        run = ByHand(GoLore(2, 4), ("w",), (12, 7), 1, False)
        bases.append([run.step([given((12, 7), t, 1)[0][None]])[0].state["P"] for t in range(9)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(*bases, strict=True))
    same = [torch.equal(bases[0][t], bases[0][t - 1]) for t in range(1, 9)]
    assert same == [True, True, True, False, True, True, True, False]


def test_a_parameter_that_comes_between_two_refreshes_has_a_subspace() -> None:
    """Its first refresh may be tau - 1 steps away; a zero basis would send nothing
    until then.
    """
    for kind in (GaLore(2, 10), GoLore(2, 10)):
        run = ByHand(kind, ("w",), (12, 7), 1, False)
        run.t = 3
        assert float(dense(run.step([given((12, 7), 3, 1)[0][None]])[0].applied).norm()) > 0.1


@pytest.mark.parametrize(
    ("shape", "side"), [((8, 5), "short"), ((5, 8), "short"), ((8, 5), "long")]
)
def test_the_scaled_form_is_unbiased(shape: tuple[int, int], side: str) -> None:
    """20 000 draws, 4 standard errors at the worst of 40 entries; the unscaled form
    fails by far.
    """
    matrix = torch.from_numpy(spectrum_matrix(*shape, np.array([3.0, 1.0, 0.3]), seed=1))
    assert (
        distance_in_standard_errors(draws(GoLore(2, 1, side, scaled=True), matrix, 20_000), matrix)
        < 4.0
    )
    assert distance_in_standard_errors(draws(GoLore(2, 1, side), matrix, 20_000), matrix) > 40.0


@pytest.mark.parametrize(("side", "length"), [("short", 6), ("long", 9)])
def test_a_random_subspace_captures_r_over_its_length(side: str, length: int) -> None:
    """E ||Delta - C(Delta)||^2 = (1 - r / s) ||Delta||^2 whatever the spectrum: 2 000
    draws, 3 standard errors; on the long side a smaller share, which is the negative
    control of the other side's.
    """
    matrix = torch.from_numpy(spectrum_matrix(9, 6, np.array([5.0, 1.0, 0.1]), seed=2))
    left = (matrix - draws(GoLore(2, 1, side), matrix, 2_000)).square().sum(
        dim=(1, 2)
    ) / matrix.square().sum()
    error = float(left.std()) / 2_000**0.5
    assert abs(float(left.mean()) - (1 - 2 / length)) < 3 * error
    assert abs(2 / 6 - 2 / 9) > 6 * error


@pytest.mark.parametrize("compressor", [GoLore(2, 3), GoLore(2, 3, "long")], ids=repr)
def test_golore_of_rows_in_blocks_equals_itself(gloo: GlooPool, compressor: Compressor) -> None:
    histories = gloo.run(blocks_of_rows, 4, compressor)
    sim = simulation(compressor, SHAPES, 2)
    for t in range(5):
        everything = all_given(t, 4)
        nodes = [
            {name: (g[2 * k] + g[2 * k + 1]) / 2 for name, g in everything.items()}
            for k in range(2)
        ]
        applied = sim.reduce(nodes)
        for name in SHAPES:
            assert all(relative(history[t][name], applied[name]) < 1e-12 for history in histories)
