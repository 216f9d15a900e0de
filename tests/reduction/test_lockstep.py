"""The veto: a step that is not finite on one worker is skipped by all, and changes
nothing.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import Identity, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient
from tests.support.vetoes import BAD_STEP, SHAPES, STEPS, Run, bits

pytestmark = pytest.mark.usefixtures("both_paths")

COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=3),
    PowerSGDPlus(2, restart_every=3, restart="randomized"),
    PowerSGDPlus(2, restart_every=3, exact_restart=True, stagger=True),
    Identity(),
]


def vetoed(
    rank: int, compressor: Compressor, poison: dict[int, dict[str, float]], explicit: bool
) -> dict[str, Any]:
    """STEPS good steps; before the good step BAD_STEP, one with poisoned gradients. A
    twin never sees the bad one.
    """
    run, twin = Run(compressor), Run(compressor)
    report: dict[str, Any] = {"same": []}
    for t in range(STEPS):
        if t == BAD_STEP:
            before = run.state()
            run.give(100, rank)
            for name, value in poison.get(rank, {}).items():
                run.parameters[name].grad.view(-1)[1] = value
            if explicit:
                run.optimizer.reduce_gradients()
            run.optimizer.step()
            report["untouched"] = run.state() == before
            report["applied"] = run.optimizer.last_report.applied
            run.optimizer.zero_grad()
        run.give(t, rank)
        twin.give(t, rank)
        run.optimizer.step()
        twin.optimizer.step()
        report["same"].append(run.state() == twin.state())
    report["parameters"] = bits({name: p.data for name, p in run.parameters.items()})
    report["moved"] = all(bool(p.data.any()) for p in run.parameters.values())
    report["totals"] = (run.optimizer.ledger.steps, run.optimizer.ledger.vetoed)
    return report


POISON = {
    "nan in a matrix": {1: {"twin": torch.nan}},
    "inf in a matrix": {0: {"wide": torch.inf}},
    "nan in a vector": {1: {"bias": torch.nan}},
    "-inf in a vector": {1: {"bias": -torch.inf}},
    "inf and -inf that cancel": {
        0: {"tall": torch.inf, "bias": torch.inf},
        1: {"tall": -torch.inf, "bias": -torch.inf},
    },
    "a sum that overflows": {0: {"bias": 3e38}, 1: {"bias": 3e38}},
    "nan everywhere": {rank: dict.fromkeys(SHAPES, torch.nan) for rank in range(4)},
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("explicit", [True, False], ids=["reduce_gradients", "step"])
def test_veto_on_all_ranks(
    gloo: GlooPool, compressor: Compressor, poison: dict[int, dict[str, float]], explicit: bool
) -> None:
    reports = gloo.run(vetoed, 2, compressor, poison, explicit)
    for report in reports:
        assert report["untouched"]
        assert report["applied"] is False
        assert all(report["same"]), report["same"]
        assert report["moved"]
        assert report["totals"] == (STEPS + 1, 1)
        assert report["parameters"] == reports[0]["parameters"]


def test_veto_among_four(gloo: GlooPool) -> None:
    for report in gloo.run(
        vetoed, 4, PowerSGDPlus(2, restart_every=3), {2: {"tall": torch.nan}}, False
    ):
        assert report["untouched"]
        assert all(report["same"])


def test_veto_alone() -> None:
    """One process without torch.distributed: the same rule."""
    report = vetoed(0, PowerSGDPlus(2, restart_every=3), {0: {"tall": torch.nan}}, False)
    assert report["untouched"]
    assert all(report["same"])


def overflowing_wire(rank: int) -> dict[str, Any]:
    """Finite gradients whose sum, or whose P, does not fit the wire: 16-bit floats end
    at 65 504.
    """
    run = Run(PowerSGD(2), wire_dtype="float16")
    run.give(0, rank)
    run.optimizer.step()
    before = run.state()
    run.give(1, rank, 1e30)
    run.optimizer.step()
    return {"untouched": run.state() == before, "applied": run.optimizer.last_report.applied}


def test_veto_when_the_wire_overflows(gloo: GlooPool) -> None:
    for report in gloo.run(overflowing_wire, 2):
        assert report == {"untouched": True, "applied": False}


def overflowing_parameters(rank: int) -> dict[str, Any]:
    """float16 parameters: local gradients, P and Q are finite in float32, but the mean
    does not fit the gradient.
    """
    run = Run(PowerSGD(2), dtype=torch.float16)
    run.give(0, rank)
    run.optimizer.step()
    run.optimizer.error_memory()["tall"].fill_(1e5)
    before = run.state()
    run.give(1, rank)
    run.optimizer.step()
    found = {"untouched": run.state() == before, "applied": run.optimizer.last_report.applied}
    run.optimizer.error_memory()["tall"].zero_()
    run.give(1, rank)
    run.optimizer.step()
    return found | {"goes on": run.optimizer.last_report.applied and run.state() != before}


def test_veto_when_what_is_decompressed_overflows_the_parameters_dtype(gloo: GlooPool) -> None:
    for report in gloo.run(overflowing_parameters, 2):
        assert report == {"untouched": True, "applied": False, "goes on": True}


def test_veto_when_the_singular_vectors_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker alone computes them: its exception would leave the others waiting, its
    NaN stops all.
    """
    workers = Simulation(
        {"w": (12, 7), "b": (3,)}, PowerSGDPlus(2, restart_every=2), 2, min_compression_rate=0
    )

    def given(t: int) -> list[dict[str, Tensor]]:
        shapes = {"w": (12, 7), "b": (3,)}
        return [
            {
                n: torch.as_tensor(gradient(s, t, worker), dtype=torch.float32)
                for n, s in shapes.items()
            }
            for worker in (0, 1)
        ]

    assert workers.reduce(given(0))
    assert workers.reduce(given(1))
    before = [bits(workers.error_memory(worker)) for worker in (0, 1)]
    with monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")

        patch.setattr(torch.linalg, "svd", fails)
        assert workers.reduce(given(2)) == {}
    assert [bits(workers.error_memory(worker)) for worker in (0, 1)] == before
    assert workers.reduce(given(2))


HUGE = 2.9e38

ALMOST = {
    "one worker, one column": lambda worker: torch.full((12, 7), HUGE if worker == 0 else 1.0),
    "columns that cancel between workers": lambda worker: torch.full(
        (12, 7), HUGE * (1 - 2 * worker)
    ),
}


@pytest.mark.parametrize("given", ALMOST.values(), ids=ALMOST.keys())
@pytest.mark.parametrize(
    "compressor",
    [
        PowerSGD(2),
        PowerSGDPlus(2, 1),
        PowerSGDPlus(2, 1, restart="randomized"),
        PowerSGDPlus(2, 1, exact_restart=True),
    ],
    ids=repr,
)
def test_finite_numbers_from_which_infinite_ones_would_be_computed(
    compressor: Compressor, given: Any
) -> None:
    """Finite in float32, but not their products with a basis: those of an SVD restart
    come after its last collective.
    """
    workers = Simulation({"w": (12, 7)}, compressor, 2, min_compression_rate=0)
    assert workers.reduce([{"w": torch.full((12, 7), 1e30)}] * 2)
    before = [bits(workers.error_memory(worker)) for worker in (0, 1)]
    assert workers.reduce([{"w": given(worker)} for worker in (0, 1)]) == {}
    assert [bits(workers.error_memory(worker)) for worker in (0, 1)] == before
    assert workers.reduce([{"w": torch.ones(12, 7)}] * 2)


def test_reduce_gradients_is_idempotent_after_a_veto_too() -> None:
    run = Run(PowerSGD(2))
    run.give(0, 0, torch.nan)
    assert [run.optimizer.reduce_gradients() for _ in range(3)] == [False] * 3
    assert (run.optimizer.ledger.steps, run.optimizer.ledger.vetoed) == (1, 1)


def test_vetoes_in_a_row_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(PowerSGD(2))
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        for factor in (torch.nan, torch.nan, 1.0, torch.inf):
            run.give(0, 0, factor)
            run.optimizer.step()
    assert [message.split("(")[1].split(")")[0] for message in caplog.messages] == [
        "1 in a row",
        "2 in a row",
        "1 in a row",
    ]
