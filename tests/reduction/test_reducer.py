"""The reducer: pending passes, dtypes and shapes, loss scales, and what the seed
determines.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import LowRankCommError, PowerSGD
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.driver import simulation
from tests.support.matrices import SHAPES, apply, drawn, every_compressor, relative
from tests.support.reference import gradient, initial_basis

pytestmark = pytest.mark.usefixtures("both_paths")


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
