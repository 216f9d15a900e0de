"""Matrices of one shape in one batch: each gets what it gets alone."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import PowerSGD
from lowrank_comm.compressors.base import Compressor
from tests.support.driver import simulation
from tests.support.matrices import COMPRESSORS, low_rank, relative
from tests.support.reference import gradient

pytestmark = pytest.mark.usefixtures("both_paths")


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
