"""N gloo processes = the simulation of N workers in one process, step by step; and all
ranks hold the same bits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer, Identity, LowRankCommError, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation
from tests.support.driver import recorded_step
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

pytestmark = pytest.mark.usefixtures("both_paths")

SHAPES = {
    "tall": (12, 7),
    "tall_too": (12, 7),
    "wide": (7, 12),
    "filter": (6, 3, 2, 2),
    "bias": (5,),
    "scale": (),
}
STEPS = 20
COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=5),
    PowerSGDPlus(2, restart_every=5, restart="randomized", stagger=True),
    PowerSGDPlus(2, restart_every=5, consensus_restart=True, stagger=True),
    PowerSGDPlus(2, restart_every=5, exact_restart=True),
    Identity(),
]


def pulled(name: str, shape: tuple[int, ...], parameter: Tensor, step: int, worker: int) -> Tensor:
    """Gradient of 0.5 ||X - T_i||^2 plus noise: workers with targets of their own, so
    that parameters feed back into gradients.
    """
    noise = torch.as_tensor(gradient(shape, step, worker, len(name)), dtype=parameter.dtype)
    return parameter.detach() - (1 + worker) + noise


def start(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    return {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()
    }


def base(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters.items(), lr=0.02)


def over_gloo(
    rank: int, compressor: Compressor, dtype: torch.dtype, steps: int
) -> list[dict[str, dict[str, np.ndarray]]]:
    parameters = start(dtype)
    optimizer = CompressedOptimizer(
        base(parameters), compressor=compressor, min_compression_rate=0, seed=3
    )
    history = []
    for t in range(steps):
        for name, p in parameters.items():
            p.grad = pulled(name, SHAPES[name], p, t, rank)
        history.append(recorded_step(optimizer, parameters))
    return history


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(("workers", "steps"), [(2, STEPS), (4, 11)])
def test_gloo_equals_simulation(
    gloo: GlooPool, compressor: Compressor, workers: int, steps: int
) -> None:
    """Step by step to 1e-12. Two numbers have one sum; of four, gloo takes another
    order, and the power iteration amplifies that round-off.
    """
    histories = gloo.run(over_gloo, workers, compressor, torch.float64, steps)
    parameters = start(torch.float64)
    optimizer = base(parameters)
    sim = Simulation(
        SHAPES, compressor, workers, dtype=torch.float64, min_compression_rate=0, seed=3
    )
    for t in range(steps):
        applied = sim.reduce(
            [
                {name: pulled(name, SHAPES[name], p, t, w) for name, p in parameters.items()}
                for w in range(workers)
            ]
        )
        for name, p in parameters.items():
            p.grad = applied[name]
        optimizer.step()
        for worker, history in enumerate(histories):
            for name in SHAPES:
                where = f"{name}, step {t}, worker {worker}"
                np.testing.assert_allclose(
                    history[t]["applied"][name],
                    applied[name].numpy(),
                    rtol=1e-12,
                    atol=1e-12,
                    err_msg=where,
                )
            assert set(history[t]["error"]) == set(sim.error_memory(worker))
            for name, error in sim.error_memory(worker).items():
                np.testing.assert_allclose(
                    history[t]["error"][name], error.numpy(), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize(
    ("compressor", "dtype"),
    [(compressor, torch.float32) for compressor in COMPRESSORS]
    + [
        (COMPRESSORS[1], torch.float64),
        (COMPRESSORS[1], torch.bfloat16),
        (COMPRESSORS[2], torch.bfloat16),
    ],
    ids=str,
)
def test_all_ranks_hold_the_same_bits(
    gloo: GlooPool, compressor: Compressor, dtype: torch.dtype
) -> None:
    """After 20 steps with data that differ between the ranks; their error memories do
    differ.
    """
    values = gloo.run(final_bits, 4, compressor, dtype)
    for parameters, _ in values[1:]:
        assert parameters == values[0][0]
    if compressor.low_rank and not getattr(compressor, "exact_restart", False):
        assert values[1][1] != values[0][1]


def final_bits(
    rank: int, compressor: Compressor, dtype: torch.dtype
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    parameters = start(dtype)
    optimizer = CompressedOptimizer(base(parameters), compressor=compressor, min_compression_rate=0)
    for t in range(STEPS):
        for name, p in parameters.items():
            p.grad = pulled(name, SHAPES[name], p, t, rank)
        optimizer.step()

    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return (
        {name: bits(p) for name, p in parameters.items()},
        {name: bits(e) for name, e in optimizer.error_memory().items()},
    )


# --- the simulation's own manners ---


def test_simulation_changes_nothing_it_is_given() -> None:
    sim = Simulation({"w": (8, 6), "b": (3,)}, PowerSGD(2), 2, min_compression_rate=0)
    given = [{"w": torch.ones(8, 6) * k, "b": torch.ones(3) * k} for k in (1, 2)]
    before = [{name: g.clone() for name, g in one.items()} for one in given]
    sim.reduce(given)
    assert all(
        torch.equal(g, before[k][name]) for k, one in enumerate(given) for name, g in one.items()
    )


def test_simulation_of_a_missing_gradient() -> None:
    """None on one worker counts as zero; None on all stays None, and error and basis
    stay untouched.
    """
    sim = Simulation(
        {"w": (8, 6), "v": (8, 6), "b": (3,)},
        PowerSGD(2),
        2,
        dtype=torch.float64,
        min_compression_rate=0,
    )
    full = [
        {
            name: torch.from_numpy(gradient(shape, 0, k))
            for name, shape in (("w", (8, 6)), ("v", (8, 6)), ("b", (3,)))
        }
        for k in range(2)
    ]
    sim.reduce(full)
    before = [{name: e.clone() for name, e in sim.error_memory(k).items()} for k in range(2)]
    out = sim.reduce([{"w": full[0]["w"], "b": None}, {"b": None}])
    assert out["v"] is None
    assert out["b"] is None
    for k in range(2):
        assert torch.equal(sim.error_memory(k)["v"], before[k]["v"])
        assert not torch.equal(sim.error_memory(k)["w"], before[k]["w"])
    given = full[0]["w"] / 2 + (before[0]["w"] + before[1]["w"]) / 2
    left = (sim.error_memory(0)["w"] + sim.error_memory(1)["w"]) / 2
    torch.testing.assert_close(out["w"] + left, given, rtol=1e-12, atol=1e-12)


def test_simulation_of_a_veto() -> None:
    """A vetoed step gives {} and changes nothing: the steps after it are those of a run
    that never had it, bit for bit.
    """
    sims = [
        Simulation({"w": (8, 6)}, PowerSGDPlus(2, restart_every=3), 2, min_compression_rate=0)
        for _ in range(2)
    ]
    for t in range(5):
        gradients = [
            {"w": torch.as_tensor(gradient((8, 6), t, k), dtype=torch.float32)} for k in range(2)
        ]
        if t == 3:
            bad = [gradients[0], {"w": torch.full((8, 6), torch.nan)}]
            assert sims[1].reduce(bad) == {}
            assert [report.applied for report in sims[1].last_reports] == [False, False]
        expected, actual = (sim.reduce(gradients)["w"] for sim in sims)
        assert torch.equal(expected, actual)
        assert all(
            torch.equal(sims[0].error_memory(k)["w"], sims[1].error_memory(k)["w"])
            for k in range(2)
        )


def test_simulation_wants_one_mapping_a_worker() -> None:
    sim = Simulation({"w": (8, 6)}, PowerSGD(2), 3)
    with pytest.raises(LowRankCommError, match="3"):
        sim.reduce([{"w": torch.ones(8, 6)}])
