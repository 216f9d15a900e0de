"""What every scheme of compression must keep, as functions of a compressor: the test
files of single schemes call them for the options that they have.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.compressors.base import Compressor, Context, Result, State
from lowrank_comm.simulation import Simulation
from tests.support.driver import at, dense, drive, elements_at, recorded_step, simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

SHAPES = {
    "tall": (13, 7),
    "tall_too": (13, 7),
    "wide": (6, 11),
    "square": (8, 8),
    "filter": (6, 3, 2, 2),
}


def drawn(t: int, worker: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Float64 gradients of one worker at one step."""
    return {
        name: torch.from_numpy(gradient(shape, t, worker, k))
        for k, (name, shape) in enumerate(shapes.items())
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def low_rank(m: int, n: int, rank: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(
        generator.standard_normal((m, rank)) @ generator.standard_normal((rank, n))
    )


class Driven:
    """N workers that repeat `drive` on one matrix w with error feedback; `deltas` and
    `errors` are of the last step.
    """

    def __init__(
        self, compressor: Compressor, shape: tuple[int, int], workers: int, seed: int = 0
    ) -> None:
        self.compressor, self.shape, self.t = compressor, shape, 0
        self.context = Context(("w",), -1, seed, min(compressor.rank, *shape), m=shape[0])
        like = torch.empty(0, dtype=torch.float64)
        state: State = compressor.initial_state(self.context, *shape, like)
        self.states = [state] * workers
        self.errors = [torch.zeros(1, *shape, dtype=torch.float64) for _ in range(workers)]
        self.deltas: list[Tensor] = []

    def step(self, gradients: Sequence[Tensor]) -> list[Result]:
        schedule = self.compressor.schedule({"w": 1})
        restart = schedule is not None and schedule.due("w", self.t)
        self.deltas = [g[None] + e for g, e in zip(gradients, self.errors, strict=True)]
        results = drive(
            self.compressor,
            self.deltas,
            self.states,
            at(self.compressor, self.context, self.t, restart),
        )
        self.states = [result.state for result in results]
        self.errors = [
            d - dense(result.sent) if result.kept is None else result.kept
            for d, result in zip(self.deltas, results, strict=True)
        ]
        self.t += 1
        return results


def given_is_sent_plus_kept(compressor: Compressor) -> None:
    """Per worker and step, with `sent` of the compressor and the reducer's memory; the
    mean of sent is what is applied.
    """
    for shape in ((13, 7), (6, 11)):
        driven, sim = Driven(compressor, shape, 3), simulation(compressor, {"w": shape}, 3)
        for t in range(9):
            gradients = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(3)]
            before = [sim.error_memory(worker)["w"].clone() for worker in range(3)]
            results = driven.step(gradients)
            applied = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
            sent = torch.stack([dense(result.sent)[0] for result in results])
            torch.testing.assert_close(applied, dense(results[0].applied)[0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(
                sent.mean(0), dense(results[0].applied)[0], rtol=1e-11, atol=1e-12
            )
            for worker in range(3):
                kept = sim.error_memory(worker)["w"]
                torch.testing.assert_close(
                    gradients[worker] + before[worker], sent[worker] + kept, rtol=1e-9, atol=1e-10
                )


def nothing_is_lost_over_a_run(compressor: Compressor) -> None:
    """Sum of what was applied + mean error = sum of the mean gradients, 30 steps."""
    sim = simulation(compressor, SHAPES, 3)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for t in range(30):
        gradients = [drawn(t, worker) for worker in range(3)]
        out = sim.reduce(gradients)
        for name in SHAPES:
            given[name] += sum(g[name] for g in gradients) / 3
            applied[name] += out[name]
    for name in SHAPES:
        error = sum(sim.error_memory(worker)[name] for worker in range(3)) / 3
        assert relative(applied[name] + error, given[name]) < 1e-10


def full_rank_is_dense(compressor: Compressor) -> None:
    """At r = min(m, n), whatever the orientation, at every step."""
    whole = replace(compressor, rank=13)
    sim = simulation(whole, SHAPES, 2)
    for t in range(6):
        gradients = [drawn(t, worker) for worker in range(2)]
        out = sim.reduce([{k: g.clone() for k, g in one.items()} for one in gradients])
        for name in SHAPES:
            assert relative(out[name], (gradients[0][name] + gradients[1][name]) / 2) < 1e-11, (
                name,
                t,
            )


def narrow_matrices_are_exact(compressor: Compressor) -> None:
    """1 x n, m x 1, 1 x 1 at any rank, which is cut."""
    shapes = {"row": (1, 9), "column": (9, 1), "number": (1, 1)}
    sim = simulation(replace(compressor, rank=3), shapes, 2)
    for t in range(6):
        gradients = [drawn(t, worker, shapes) for worker in range(2)]
        out = sim.reduce([{k: g.clone() for k, g in one.items()} for one in gradients])
        for name in shapes:
            assert relative(out[name], (gradients[0][name] + gradients[1][name]) / 2) < 1e-11, (
                name,
                t,
            )


def zeros_do_no_harm(compressor: Compressor) -> None:
    """Three steps without any gradient give zero; afterwards a constant gradient comes
    through.
    """
    sim = simulation(compressor, SHAPES, 2)
    for _ in range(3):
        out = sim.reduce(
            [{name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}] * 2
        )
        assert all(not tensor.any() for tensor in out.values())
    constant = drawn(0, 0)
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for _ in range(40):
        out = sim.reduce([{k: g.clone() for k, g in constant.items()}] * 2)
        for name in SHAPES:
            total[name] += out[name] / 40
    for name in SHAPES:
        assert relative(total[name], constant[name]) < 0.5, name


def low_rank_gradients_come_through(compressor: Compressor) -> None:
    """Rank 2 at r = 3, a constant matrix: the third step applies it exactly, and
    nothing is kept.
    """
    shapes = {"tall": (13, 7), "wide": (6, 11)}
    wanted = {name: low_rank(*shape, 2, k) for k, (name, shape) in enumerate(shapes.items())}
    sim = simulation(replace(compressor, rank=3), shapes, 2)
    for _ in range(3):
        errors = [sim.error_memory(worker) for worker in range(2)]
        out = sim.reduce(
            [{name: wanted[name] - errors[worker][name] for name in shapes} for worker in range(2)]
        )
    for name in shapes:
        assert relative(out[name], wanted[name]) < 1e-9, name


def a_batch_is_its_members(compressor: Compressor) -> None:
    names = [f"w{k}" for k in range(4)]
    together = simulation(compressor, dict.fromkeys(names, (10, 6)), 2)
    alone = {name: simulation(compressor, {name: (10, 6)}, 2) for name in names}
    for t in range(6):
        gradients = [
            {n: torch.from_numpy(gradient((10, 6), t, w, k)) for k, n in enumerate(names)}
            for w in range(2)
        ]
        for g in gradients:
            g["w1"].zero_()
            g["w3"] = low_rank(10, 6, 1, t)
        out = together.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
        for name, sim in alone.items():
            expected = sim.reduce([{name: g[name].clone()} for g in gradients])[name]
            torch.testing.assert_close(out[name], expected, rtol=1e-10, atol=1e-11)


def one_bad_worker_stops_all(compressor: Compressor) -> None:
    """A NaN at one worker: nothing is applied, and errors and state are, bit by bit,
    what they were.
    """
    sim, twin = (simulation(compressor, SHAPES, 2) for _ in range(2))
    for t in range(7):
        good = [drawn(t, worker) for worker in range(2)]
        bad = drawn(t, 1)
        bad["wide"][0, 0] = math.inf if t % 2 else math.nan
        assert sim.reduce([good[0], bad]) == {}
        out, expected = (
            s.reduce([{k: g.clone() for k, g in one.items()} for one in good]) for s in (sim, twin)
        )
        assert all(torch.equal(out[name], expected[name]) for name in SHAPES)
        for worker in range(2):
            errors, others = sim.error_memory(worker), twin.error_memory(worker)
            assert all(torch.equal(errors[name], others[name]) for name in SHAPES)


def randomness_is_its_own(compressor: Compressor) -> None:
    """The same bits whatever torch's own random state, which is not touched."""

    def run(seed: int) -> dict[str, Tensor]:
        sim = simulation(compressor, SHAPES, 2, seed=seed)
        for t in range(5):
            out = sim.reduce([drawn(t, worker) for worker in range(2)])
        return out

    torch.manual_seed(1)
    before = torch.get_rng_state().clone()
    first = run(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), run(3).values(), strict=True))


def a_narrow_wire_keeps_what_it_rounds(compressor: Compressor) -> None:
    """bfloat16 on the wire, one worker: g + e = applied + e' at every step,
    in float32.
    """
    sim = simulation(
        compressor, {"tall": (13, 7), "wide": (6, 11)}, dtype=torch.float32, wire_dtype="bfloat16"
    )
    rounded = False
    for t in range(7):
        given = {
            name: g.float() for name, g in drawn(t, 0, {"tall": (13, 7), "wide": (6, 11)}).items()
        }
        before = {name: e.clone() for name, e in sim.error_memory(0).items()}
        out = sim.reduce([{k: g.clone() for k, g in given.items()}])
        for name, g in given.items():
            assert relative(out[name] + sim.error_memory(0)[name], g + before[name]) < 1e-6
            rounded |= relative(out[name].bfloat16().float(), out[name]) > 1e-4
    assert rounded


def bytes_are_as_said(compressor: Compressor, steps: int) -> None:
    """What the ledger counts of every step is `elements_at`, matrix by matrix."""
    sim = Simulation(SHAPES, compressor, 2, min_compression_rate=0)
    schedule = compressor.schedule(dict.fromkeys(SHAPES, 1))
    restarts = []
    for t in range(steps):
        sim.reduce(
            [{name: g.float() for name, g in drawn(t, worker).items()} for worker in range(2)]
        )
        restart = schedule is not None and schedule.due("tall", t)
        expected = 0
        for shape in SHAPES.values():
            m, n = shape[0], math.prod(shape[1:])
            expected += elements_at(compressor, m, n, min(compressor.rank, m, n), t, restart)
        sent = sim.last_reports[0].bytes
        assert sum(count for kind, count in sent.items() if kind != "control") == 4 * expected, (
            t,
            dict(sent),
        )
        restarts.append(restart)
    assert schedule is None or sum(restarts) >= 2


def resumed_is_continued(compressor: Compressor) -> None:
    """A state saved half-way, loaded by a new optimizer: the same bits afterwards, in
    float32.
    """

    def fresh() -> tuple[dict[str, torch.nn.Parameter], CompressedOptimizer]:
        parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
        }
        base = torch.optim.SGD(parameters.items(), lr=0.1, momentum=0.9)
        return parameters, CompressedOptimizer(
            base, compressor=compressor, min_compression_rate=0, seed=3
        )

    def advance(
        parameters: dict[str, torch.nn.Parameter], optimizer: CompressedOptimizer, steps: range
    ) -> None:
        for t in steps:
            for name, g in drawn(t, 0).items():
                parameters[name].grad = g.float()
            optimizer.step()

    parameters, optimizer = fresh()
    advance(parameters, optimizer, range(5))
    # its tensors are live
    saved = copy.deepcopy(optimizer.state_dict())
    others, resumed = fresh()
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(parameters[name])
    resumed.load_state_dict(saved)
    advance(parameters, optimizer, range(5, 11))
    advance(others, resumed, range(5, 11))
    assert all(torch.equal(p, others[name]) for name, p in parameters.items())
    assert all(
        torch.equal(e, resumed.error_memory()[name]) for name, e in optimizer.error_memory().items()
    )


def only_the_mean_error_matters(compressor: Compressor) -> None:
    """Three workers, and then one with the mean of their errors and of their gradients:
    the same for ten steps. With one worker's own error it is not (control).
    """
    # after which nobody has just cleared its errors
    three, before = simulation(compressor, SHAPES, 3), 7
    for t in range(before):
        three.reduce([drawn(t, worker) for worker in range(3)])
    one, wrong = simulation(compressor, SHAPES, 1), simulation(compressor, SHAPES, 1)
    errors, states = (
        [three.error_memory(worker) for worker in range(3)],
        three.reducers[0].state.bases(),
    )
    for name in SHAPES:
        one.reducers[0].state.set_state(
            name, sum(error[name] for error in errors) / 3, states[name]
        )
        wrong.reducers[0].state.set_state(name, errors[0][name], states[name])
    for sim in (one, wrong):
        sim.reducers[0].state.continue_at(before)
    differs = False
    for t in range(before, before + 10):
        gradients = [drawn(t, worker) for worker in range(3)]
        mean = {name: sum(g[name] for g in gradients) / 3 for name in SHAPES}
        expected = three.reduce(gradients)
        out, other = (
            sim.reduce([{name: g.clone() for name, g in mean.items()}]) for sim in (one, wrong)
        )
        for name in SHAPES:
            assert relative(out[name], expected[name]) < 1e-9, (name, t)
            differs |= relative(other[name], expected[name]) > 1e-2
    assert differs


STEPS = 8


def trained(
    rank: int, compressor: Compressor, float32: bool = False
) -> list[dict[str, dict[str, np.ndarray]]]:
    """A case for gloo processes."""
    dtype = torch.float32 if float32 else torch.float64
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()
    }
    base = torch.optim.SGD(parameters.items(), lr=0.1)
    optimizer = CompressedOptimizer(base, compressor=compressor, min_compression_rate=0, seed=3)
    history = []
    for t in range(STEPS):
        for name, g in drawn(t, rank).items():
            parameters[name].grad = g.to(dtype)
        history.append(recorded_step(optimizer, parameters))
    return history


def processes_equal_simulation(gloo: GlooPool, compressor: Compressor) -> None:
    """Two gloo processes and the simulation of two workers, to 1e-11; four processes in
    float32 hold the same bits.
    """
    histories = gloo.run(trained, 2, compressor)
    sim = simulation(compressor, SHAPES, 2, seed=3)
    for t in range(STEPS):
        out = sim.reduce([drawn(t, worker) for worker in range(2)])
        for worker, history in enumerate(histories):
            for name in SHAPES:
                np.testing.assert_allclose(
                    history[t]["applied"][name], out[name].numpy(), rtol=1e-11, atol=1e-11
                )
            assert set(history[t]["error"]) == set(sim.error_memory(worker))
            for name, memory in sim.error_memory(worker).items():
                error = memory.numpy()
                np.testing.assert_allclose(history[t]["error"][name], error, rtol=1e-11, atol=1e-11)
    first, *others = gloo.run(trained, 4, compressor, True)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(
                np.array_equal(one["parameter"][name], two["parameter"][name]) for name in SHAPES
            )


COMMON: list[Callable[[Compressor], None]] = [
    given_is_sent_plus_kept,
    nothing_is_lost_over_a_run,
    full_rank_is_dense,
    narrow_matrices_are_exact,
    zeros_do_no_harm,
    low_rank_gradients_come_through,
    a_batch_is_its_members,
    one_bad_worker_stops_all,
    randomness_is_its_own,
    a_narrow_wire_keeps_what_it_rounds,
    resumed_is_continued,
]
LINEAR = [*COMMON, only_the_mean_error_matters]
