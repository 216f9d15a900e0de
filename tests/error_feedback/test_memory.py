"""The error memory: nothing is lost, it stays bounded, and views of it stay live."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.checkpointing.tag import tag_of
from lowrank_comm.checkpointing.tensors import restore, tensors_of
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor, LowRank
from lowrank_comm.error_feedback.memory import ErrorMemory
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.numerics.device import accelerator_path
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.driver import Workers, dense, simulation
from tests.support.feedback_runs import optimizer_of, steps
from tests.support.matrices import SHAPES, drawn, every_compressor, relative
from tests.support.reference import gradient, initial_basis

pytestmark = pytest.mark.usefixtures("both_paths")


def test_views_of_the_error_memory_stay_live() -> None:
    """A view taken once shows every later step's error, for large matrices too, whose
    memory changes its place.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 200), torch.nn.Tanh(), torch.nn.Linear(200, 16)
    )
    optimizer = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(2))
    held = optimizer.error_memory()
    seen = []
    for _ in range(4):
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # read before anything else asks for the memory
        read = {name: view.clone() for name, view in held.items()}
        for name, fresh in optimizer.error_memory().items():
            assert torch.equal(read[name], fresh)
            assert torch.equal(held[name], fresh)
            assert held[name].data_ptr() == fresh.data_ptr()
        seen.append(held["0.weight"].clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    held["0.weight"].zero_()
    assert not optimizer.error_memory()["0.weight"].any()


@pytest.mark.parametrize("form", ["none", "ef21"])
def test_errors_are_not_lost_without_a_word(form: str) -> None:
    """A state with errors does not go into a run without an error memory; the other way
    round they start from zero, whatever the run held before.
    """
    old = optimizer_of(PowerSGD(rank=2))
    new = optimizer_of(PowerSGD(rank=2), error_feedback=ErrorFeedback(form=form))
    steps(old, 0, 3)
    steps(new, 0, 5)
    with pytest.raises(StateMismatchError, match=r"'w' has a saved error memory.*error_feedback"):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert new.reducer.step == 5
    assert float(old.error_memory()["w"].norm()) > 0
    restore(
        old.reducer, tag_of(new.reducer), {"w": {"Q": tensors_of(new.reducer)["w"]["Q"].clone()}}
    )
    assert torch.equal(old.reducer.state.bases()["w"]["Q"], new.reducer.state.bases()["w"]["Q"])
    assert float(old.error_memory()["w"].norm()) == 0


MATRICES = ("tall", "wide", "filter")


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
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_applied_adds_up_to_what_was_given(compressor: Compressor, workers: int) -> None:
    """Over the run: the sum of what was applied = the sum of the mean gradients - the
    mean error.
    """
    sim = simulation(compressor, SHAPES, workers)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for t in range(20):
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


class Events:
    """The stream of a GPU that is none, and what was asked of its events."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def record_event(self) -> Events:
        self.said.append("record")
        return self

    def wait_event(self, event: Events) -> None:
        assert event is self
        self.said.append("stream waits")

    def synchronize(self) -> None:
        self.said.append("host waits")


def test_the_host_waits_for_an_offloaded_memory_where_it_looks_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU copies from and to pinned memory are made while the host goes on."""
    events = Events()
    monkeypatch.setattr("lowrank_comm.numerics.device.current_stream", lambda device: events)
    with accelerator_path():
        sim = simulation(
            PowerSGD(2), {"w": (30, 20)}, 1, error_feedback=ErrorFeedback(offload=True)
        )
        state = sim.reducers[0].state

        def step() -> list[str]:
            events.said.clear()
            sim.reduce([{"w": torch.ones(30, 20)}])
            return list(events.said)

        # there, and back
        assert step() == ["record", "stream waits", "record"]
        assert step() == ["stream waits", "record"] * 2
        held = state.error_memory()
        assert events.said[-1] == "host waits"
        # whoever holds a view may read it whenever
        assert step()[-1] == "host waits"
        del held
        assert "host waits" not in step()
        sim.reducers[0].consolidate_error_memory()
        assert "host waits" in events.said


def test_error_memory_is_in_gradient_units_whatever_the_loss_scale() -> None:
    """reduce(scale=s): Delta = g / s + e, and what is written back is the
    mean times s.
    """
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
                scaled.state.error_memory()[name],
                plain.state.error_memory()[name],
                rtol=1e-12,
                atol=1e-12,
            )


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "rounding": "stochastic"}], ids=str
)
def test_an_error_memory_of_16_bits_loses_little(options: dict[str, str]) -> None:
    """200 steps of two workers with data of their own and noise: what got lost is below
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
        for t in range(200):
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


def test_error_memory_stays_bounded_where_the_averaged_residual_grows() -> None:
    """400 steps, 4 workers with data of their own. The averaged form, e_i = Delta_i -
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
    for t in range(1, 401):
        gradients = [
            common / t**0.5
            + bias[worker]
            + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for worker in range(workers)
        ]
        applied = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
        averaged = [e + g - applied for e, g in zip(averaged, gradients, strict=True)]
        if t in (100, 400):
            local_norm[t] = max(
                float(sim.error_memory(worker)["w"].norm()) for worker in range(workers)
            )
            averaged_norm[t] = max(float(e.norm()) for e in averaged)
    mean = torch.stack([sim.error_memory(worker)["w"] for worker in range(workers)]).mean(0)
    # the same mean error
    torch.testing.assert_close(torch.stack(averaged).mean(0), mean, rtol=1e-8, atol=1e-8)
    assert local_norm[400] < 1.5 * local_norm[100]
    assert averaged_norm[400] > 3 * averaged_norm[100]


def test_what_is_stored_is_what_is_there() -> None:
    """Also where a subtraction was still to come, on an accelerator."""
    memory = ErrorMemory(ErrorFeedback(), ("w",), 6, 5, torch.float64, torch.device("cpu"), 0, 0)
    delta, p, q = (torch.randn(1, *shape).double() for shape in ((6, 5), (6, 2), (5, 2)))
    given = delta.clone()
    memory.exchange(delta, LowRank(p, q))
    torch.testing.assert_close(memory.tensor, given - p @ q.mT)
    memory.exchange(given.clone(), LowRank(p, q))
    memory.store(given)
    assert torch.equal(memory.tensor, given)
