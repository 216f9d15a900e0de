"""Narrow wires: what rounding takes is kept, and what does not fit is scaled."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.memory import ErrorMemory
from lowrank_comm.error_feedback.options import ErrorFeedback
from tests.support.driver import simulation
from tests.support.matrices import apply, relative
from tests.support.reference import gradient


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
