"""Steps in which nobody has a gradient for a parameter: its restarts come later and its
turns wait, for every registered compressor, and a checkpoint in the middle of that
changes nothing.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import (
    Acp,
    CompressedOptimizer,
    ConfigMismatchError,
    GaLore,
    GreedyLore,
    PowerSGDPlus,
)
from lowrank_comm.checkpointing import file as library_checkpoint
from lowrank_comm.checkpointing.state_dict import KEY, PREFIX
from lowrank_comm.checkpointing.tag import Tag, tag_of
from lowrank_comm.checkpointing.tensors import restore, tensors_of
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.compressors.restart_schedule import (
    RestartHistory,
    RestartSchedule,
    staggered,
    steady,
)
from lowrank_comm.config import Section
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.restarts import Restarts
from lowrank_comm.simulation import Simulation
from tests.support.conformance import (
    combinations,
    compressor_of,
    drawn,
    label,
    sections,
    simulated,
    state_of,
)
from tests.support.driver import simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix

pytestmark = pytest.mark.usefixtures("both_paths")

TAU = 4

PATTERNS: dict[str, Callable[[int], bool]] = {
    "always": lambda t: True,
    "odd": lambda t: t % 2 == 1,
    "even": lambda t: t % 2 == 0,
    "rare": lambda t: t % 4 == 1,
    "late": lambda t: t >= 7,
    "two_of_three": lambda t: t % 3 != 2,
}
"""Name of a parameter -> whether somebody has a gradient for it at step t."""

SHAPES = dict.fromkeys(PATTERNS, (9, 6))

Given = dict[str, Any]


def with_even_period(section: Given) -> Given:
    return {**section, "restart_every": TAU} if "restart_every" in section else section


VARIANTS = [with_even_period(section) for section in sections() if compressor_of(section).low_rank]

COMBINATIONS = [
    (path, with_even_period(section))
    for path, section in combinations()
    if compressor_of(section).low_rank
]

every_variant = pytest.mark.parametrize("section", VARIANTS, ids=label)

every_combination = pytest.mark.parametrize(
    ("both_paths", "section"),
    COMBINATIONS,
    indirect=["both_paths"],
    ids=[f"{path}-{label(section)}" for path, section in COMBINATIONS],
)


def given(
    t: int, worker: int, workers: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """One worker's gradients by the patterns; at every third step one worker alone has
    those that there are.
    """
    there = {
        name
        for name, pattern in PATTERNS.items()
        if pattern(t) and (t % 3 != 0 or worker == t % workers)
    }
    return {name: g for name, g in drawn(t, worker, SHAPES, dtype).items() if name in there}


def in_words(
    schedule: RestartSchedule | None, name: str, t: int
) -> tuple[bool, bool, RestartHistory]:
    """From the list of steps so far, anew: whether the matrix owes a restart at t, is
    due, and its past.
    """
    owed, restarts, age = False, 0, 0
    for step in range(t):
        owed |= schedule is not None and schedule.due(name, step)
        if PATTERNS[name](step):
            restarts, age, owed = (restarts + 1, 0, False) if owed else (restarts, age + 1, False)
    return owed, schedule is not None and schedule.due(name, t), RestartHistory(restarts, age)


@every_variant
def test_an_owed_restart_comes_with_the_next_gradient_and_is_counted_then(section: Given) -> None:
    """Restarts in the report, and every byte of the ledger by the formula: a matrix
    that owes a restart sends nothing until it comes; a restart that is merely due is
    sent though nobody has a gradient, and not counted.
    """
    if section.get("sampling") == "bernoulli" or "galore_until" in section:
        pytest.skip("its count of bytes is random, or depends on t")
    compressor = compressor_of(section)
    sim = simulated(section, SHAPES, 2)
    schedule = sim.reducers[0].state.restarts.schedule
    total = 0
    for t in range(3 * TAU + 2):
        sim.reduce([given(t, worker) for worker in range(2)])
        restarts, elements = 0, 0
        for name, pattern in PATTERNS.items():
            owed, due, past = in_words(schedule, name, t)
            restarts += (owed or due) and pattern(t)
            if pattern(t) or not owed:
                elements += compressor.elements_in(
                    9, 6, 2, compressor.variant(past, owed or due), owed or due
                )
        report = sim.last_reports[0]
        assert report.restarts == restarts, t
        assert sum(report.bytes.values()) - report.bytes["control"] == 8 * elements, (
            t,
            report.bytes,
        )
        total += restarts
    assert sim.reducers[0].ledger.restarts == total
    assert schedule is None or total > 3 * len(PATTERNS)


@pytest.mark.parametrize("restart", ["svd", "randomized"])
def test_a_restart_that_is_owed_for_long_costs_nothing_until_it_comes(restart: str) -> None:
    """Neither bytes nor collectives; and then one collective more."""
    sim = simulation(
        PowerSGDPlus(2, restart_every=TAU, restart=restart), {"w": (12, 7), "idle": (12, 7)}, 2
    )
    alone = simulation(PowerSGDPlus(2, restart_every=TAU, restart=restart), {"w": (12, 7)}, 2)
    for t in range(3 * TAU):
        gradients = [{"w": torch.from_numpy(gradient((12, 7), t, worker))} for worker in range(2)]
        sim.reduce(gradients)
        alone.reduce(gradients)
        report, other = sim.last_reports[0], alone.last_reports[0]
        assert report.collectives == other.collectives
        assert report.restarts == other.restarts == (t % TAU == 0)
        if t > 0:
            assert {**report.bytes, "control": 0} == {**other.bytes, "control": 0}
    assert report.collectives == 2
    # where "w" restarts as well
    sim.reduce([{"idle": g["w"], **g} for g in gradients])
    sim.reduce([dict(g) for g in gradients])
    assert sim.reducers[0].ledger.restarts == 3 + 2
    late = simulation(
        PowerSGDPlus(2, restart_every=TAU, restart=restart), {"w": (12, 7), "idle": (12, 7)}, 2
    )
    counts = []
    for t in range(3):
        late.reduce([{"w": g["w"], **({"idle": g["w"]} if t == 1 else {})} for g in gradients])
        counts.append(late.last_reports[0].collectives)
    ordinary, in_a_restart = 2, 2 if restart == "svd" else 4
    assert counts == [in_a_restart, max(ordinary, 1 + in_a_restart), ordinary]


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("tau", [1, 2, 5])
def test_a_steady_past_is_that_of_a_matrix_that_never_misses(tau: int, offset: int) -> None:
    schedule, past = RestartSchedule(tau, {"w": offset % tau}), RestartHistory()
    for t in range(4 * tau + 3):
        assert past == steady(schedule, "w", t)
        past = past.after(schedule.due("w", t), True)
    assert steady(None, "w", 17) == RestartHistory(0, 17)


def test_only_the_matrices_that_miss_steps_are_remembered() -> None:
    """And those that are back in step with the schedule are no more."""
    restarts = Restarts(staggered(3, dict.fromkeys("abc", 5)), "abc")
    for t in range(9):
        restarts.commit(t, {"a": t != 3, "b": True, "c": t < 4, "dense": False})
        assert set(restarts.irregular()) <= {"a", "c"}
        assert ("c" in restarts.irregular()) == (t >= 4)
    assert "a" not in restarts.irregular()


def test_a_parameter_that_joins_late_owes_the_restart_of_the_start() -> None:
    """Its subspace is a random one until then."""
    first, second = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    base = torch.optim.SGD([("a", first.weight)], lr=0.1)
    optimizer = CompressedOptimizer(base, GreedyLore(2, restart_every=10), min_compression_rate=0)
    counts = []
    for t in range(5):
        if t == 3:
            optimizer.add_param_group({"params": [("b", second.weight)]})
        for layer in (first, second):
            layer.weight.grad = torch.from_numpy(gradient((8, 8), t, 0)).float()
        optimizer.step()
        counts.append(optimizer.last_report.restarts)
    assert counts == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("ends", ["vetoed", "rolled back"])
def test_a_step_that_does_not_count_changes_nothing(ends: str) -> None:
    """An owed restart in such a step is still owed after it, one that came due in it is
    not owed, and turns stay.
    """
    slots = [ParamInfo(name, (9, 6), torch.float64, torch.device("cpu")) for name in ("w", "idle")]
    reducer = Reducer(slots, Acp(2, restart_every=TAU), Group(), min_compression_rate=0)
    for t in range(TAU + 2):
        for counts in (False, True):
            grads = [
                torch.from_numpy(gradient((9, 6), t, 0)),
                None if t == 0 else torch.from_numpy(gradient((9, 6), t, 1)),
            ]
            if t % TAU == 0:
                grads.reverse()
            if not counts and ends == "vetoed":
                next(g for g in grads if g is not None)[0, 0] = torch.nan
            before = reducer.state.restarts.irregular()
            applied = reducer.reduce(grads).applied
            assert applied == (counts or ends == "rolled back")
            if counts:
                reducer.commit()
                continue
            if applied:
                reducer.rollback()
            assert (reducer.state.restarts.irregular(), reducer.step) == (before, t)
            assert reducer.last_report.restarts == 0
    # "idle" at 0 and TAU, "w" at the step after each
    assert reducer.ledger.restarts == 4


@pytest.mark.parametrize(
    "compressor", [GreedyLore(2, restart_every=9), PowerSGDPlus(2, restart_every=9)], ids=repr
)
def test_one_workers_nan_in_an_owed_restart_changes_nothing_anywhere(
    compressor: Compressor,
) -> None:
    """Its packet is the second, when the flag of the first has been raised by
    nobody.
    """
    sim = simulation(compressor, {"w": (9, 6), "late": (9, 6)}, 2)
    gradients = [
        {name: torch.from_numpy(gradient((9, 6), k, 0, j)) for j, name in enumerate(("w", "late"))}
        for k in (0, 1)
    ]
    sim.reduce([{"w": one["w"]} for one in gradients])
    before = [state_of(reducer) for reducer in sim.reducers]
    bad = copy.deepcopy(gradients)
    bad[1]["late"][3, 4] = torch.nan
    assert sim.reduce(bad) == {}
    for reducer, state in zip(sim.reducers, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in state_of(reducer).items())
        assert (reducer.state.restarts.deferred("late"), reducer.step, reducer.ledger.restarts) == (
            True,
            1,
            1,
        )
    sim.reduce(gradients)
    assert sim.last_reports[0].restarts == 1


@every_combination
def test_gradients_in_every_other_step_are_followed(section: Given) -> None:
    """With an even period: a constant rank-2 gradient arrives (with error feedback of
    any form, or a subspace from the gradient), and the subspace is found anew once a
    period.
    """
    x = torch.from_numpy(spectrum_matrix(8, 6, np.array([3.0, 2.0])))
    total = {name: torch.zeros(8, 6, dtype=torch.float64) for name in ("odd", "even")}
    sim = simulated(section, dict.fromkeys(total, (8, 6)), 2)
    steps = 120 if "quantization" in section else 60
    for t in range(steps):
        name, other = ("odd", "even") if t % 2 else ("even", "odd")
        out = sim.reduce([{name: x}] * 2)
        assert out[other] is None
        total[name] += out[name]
    restarts = sim.reducers[0].state.restarts.schedule is not None
    assert sim.reducers[0].ledger.restarts == (
        2 * steps // TAU + section.get("stagger", False) if restarts else 0
    )
    form = (
        Section.parse(section)
        .reducer_options()["error_feedback"]
        .for_compressor(compressor_of(section))
        .form
    )
    if form != "none" or (section["compressor"] == "galore" and "side" not in section):
        for mean in (total["odd"] / (steps / 2), total["even"] / (steps / 2)):
            assert float((mean - x).norm() / x.norm()) < 0.35


@pytest.mark.parametrize(
    "compressor", [GreedyLore(2, restart_every=TAU), GaLore(2, restart_every=TAU), Acp(2)], ids=repr
)
@pytest.mark.parametrize("pattern", ["odd", "even"])
def test_nothing_of_a_low_rank_gradient_is_left_behind(
    compressor: Compressor, pattern: str
) -> None:
    """Of a rank-2 gradient at rank 2 all arrives from the first restart on; with ACP,
    soon.
    """
    x = torch.from_numpy(spectrum_matrix(8, 6, np.array([3.0, 2.0])))
    sim = simulation(compressor, {"w": (8, 6)}, 2)
    for t in range(60):
        out = sim.reduce([{"w": x}] * 2 if PATTERNS[pattern](t) else [{}, {}])["w"]
    out = out if out is not None else sim.reduce([{"w": x}] * 2)["w"]
    assert float((out - x).norm() / x.norm()) < (0.35 if isinstance(compressor, Acp) else 1e-12)


def test_acp_takes_turns_in_the_steps_that_a_matrix_has() -> None:
    """Its numbers, bytes and subspaces in those steps are those of a run that has no
    others.
    """
    for scheme in (Acp(2), Acp(2, restart_every=3, restart="svd")):
        basis = {"w": torch.from_numpy(np.random.default_rng(3).standard_normal((6, 2)))}
        alone, among = (simulation(scheme, {"w": (9, 6)}, 2, initial_basis=basis) for _ in range(2))
        if scheme.restart_every is not None:
            # of own steps: every third of the run is a restart's, every step in it
            # counts
            period = scheme.restart_every
            among = simulation(
                Acp(2, restart_every=2 * period, restart="svd"),
                {"w": (9, 6)},
                2,
                initial_basis=basis,
            )
        for k in range(9):
            gradients = [
                {"w": torch.from_numpy(gradient((9, 6), k, worker))} for worker in range(2)
            ]
            expected = alone.reduce(gradients)["w"]
            among.reduce([{}, {}])
            torch.testing.assert_close(
                among.reduce(gradients)["w"], expected, rtol=1e-12, atol=1e-12
            )
            one, other = alone.last_reports[0].bytes, among.last_reports[0].bytes
            assert {kind: n for kind, n in one.items() if kind != "control"} == {
                kind: n for kind, n in other.items() if kind != "control"
            }


def test_every_kth_greedy_restart_of_a_matrix_finds_a_basis() -> None:
    """Counted by its own restarts: by the step, one with gradients at t = 1 mod 4 would
    never have come to it.
    """
    scheme = PowerSGDPlus(2, restart_every=2, restart="greedy", basis_every=2)
    sim = simulation(scheme, {"rare": (9, 6)}, 2)
    found = []
    for t in range(24):
        gradients = [
            {"rare": torch.from_numpy(gradient((9, 6), t, k))} if PATTERNS["rare"](t) else {}
            for k in range(2)
        ]
        before = sim.reducers[0].state.bases()["rare"]["U"]
        sim.reduce(gradients)
        if gradients[0]:
            found.append(not torch.equal(sim.reducers[0].state.bases()["rare"]["U"], before))
    assert found == [True, False] * 3


@every_combination
def test_a_batch_gives_what_its_members_give_alone(section: Given) -> None:
    """Also where its members restart in different steps and take different turns."""
    if section.get("stagger") or "quantization" in section:
        pytest.skip("the company in a schedule, or in a packet of codes, matters there")
    together = simulated(section, SHAPES, 2)
    alone = {name: simulated(section, {name: (9, 6)}, 2) for name in SHAPES}
    for t in range(2 * TAU + 2):
        gradients = [given(t, k) for k in range(2)]
        out = together.reduce(gradients)
        for name, sim in alone.items():
            expected = sim.reduce([{name: g[name]} if name in g else {} for g in gradients])[name]
            assert (expected is None) == (out[name] is None) == (not PATTERNS[name](t))
            if expected is not None:
                torch.testing.assert_close(out[name], expected, rtol=1e-9, atol=1e-11)


@every_combination
def test_resume_is_bit_equal_with_restarts_owed_and_turns_apart(section: Given) -> None:
    straight, resumed = (simulated(section, SHAPES, 2, torch.float32) for _ in range(2))
    for t in range(TAU + 1):
        straight.reduce([given(t, k, dtype=torch.float32) for k in range(2)])
    schedule = straight.reducers[0].state.restarts.schedule
    owed = {name for name in SHAPES if straight.reducers[0].state.restarts.deferred(name)}
    assert owed == {name for name in SHAPES if in_words(schedule, name, TAU + 1)[0]}
    assert owed or schedule is None
    for one, other in zip(straight.reducers, resumed.reducers, strict=True):
        tensors = {
            name: {k: v.clone() for k, v in parts.items()}
            for name, parts in tensors_of(one).items()
        }
        other.state.worker = (other.workers.global_rank, other.workers.world_size)
        restore(other, tag_of(one), tensors)
    for t in range(TAU + 1, 3 * TAU):
        gradients = [given(t, k, dtype=torch.float32) for k in range(2)]
        expected, actual = straight.reduce(gradients), resumed.reduce(gradients)
        for name in SHAPES:
            assert (expected[name] is None) == (actual[name] is None)
            assert expected[name] is None or torch.equal(expected[name], actual[name])
        assert straight.last_reports[0].restarts == resumed.last_reports[0].restarts


def optimizer_of(
    compressor: Compressor,
) -> tuple[dict[str, torch.nn.Parameter], CompressedOptimizer]:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    base = torch.optim.SGD(parameters.items(), lr=0.1, momentum=0.9)
    return parameters, CompressedOptimizer(base, compressor, min_compression_rate=0, seed=3)


def advance(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: CompressedOptimizer,
    steps: range,
    rank: int,
    workers: int,
) -> list[dict[str, Any]]:
    """What was applied, and the restarts, step by step."""
    seen = []
    for t in steps:
        gradients = given(t, rank, workers)
        for name, parameter in parameters.items():
            parameter.grad = gradients.get(name)
        optimizer.reduce_gradients()
        applied = {
            name: None if p.grad is None else p.grad.numpy().copy()
            for name, p in parameters.items()
        }
        optimizer.step()
        seen.append({**applied, "restarts": optimizer.last_report.restarts})
    return seen


FIRST, ALL = TAU + 1, 3 * TAU

COMPRESSORS = [
    GreedyLore(2, restart_every=TAU),
    Acp(2),
    Acp(2, restart_every=TAU),
    PowerSGDPlus(2, restart_every=TAU, restart="randomized", stagger=True),
    PowerSGDPlus(2, restart_every=2, restart="greedy", basis_every=2),
]


def over_gloo(rank: int, compressor: Compressor) -> dict[str, Any]:
    """A run that is saved in the middle, with a restart owed, by state dict; and one
    that resumes from it.
    """
    parameters, optimizer = optimizer_of(compressor)
    history = advance(parameters, optimizer, range(FIRST), rank, 2)
    optimizer.consolidate_error_memory()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    others, resumed = optimizer_of(compressor)
    for name, p in others.items():
        p.data.copy_(values[name])
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    owed = sorted(name for name in SHAPES if resumed.reducer.state.restarts.deferred(name))
    history += advance(parameters, optimizer, range(FIRST, ALL), rank, 2)
    again = advance(others, resumed, range(FIRST, ALL), rank, 2)
    return {"history": history, "again": again, "owed": owed}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_two_processes_equal_the_simulation_through_a_checkpoint(
    gloo: GlooPool, compressor: Compressor
) -> None:
    sim = Simulation(SHAPES, compressor, 2, dtype=torch.float64, min_compression_rate=0, seed=3)
    expected = []
    for t in range(ALL):
        expected.append(sim.reduce([given(t, worker) for worker in range(2)]))
        expected[-1]["restarts"] = sim.last_reports[0].restarts
    for seen in gloo.run(over_gloo, 2, compressor):
        assert seen["owed"] or compressor == Acp(2)
        for t, (one, other) in enumerate(zip(seen["history"], expected, strict=True)):
            again = seen["again"][t - FIRST] if t >= FIRST else one
            for name in (*SHAPES, "restarts"):
                if other[name] is None:
                    assert one[name] is None
                    assert again[name] is None
                else:
                    np.testing.assert_allclose(
                        one[name], np.asarray(other[name]), rtol=1e-9, atol=1e-11
                    )
                    assert np.array_equal(one[name], again[name])


def loads_another_state(rank: int) -> str:
    """Rank 1's was saved by a version that knew of no owed restarts."""
    parameters, optimizer = optimizer_of(COMPRESSORS[0])
    advance(parameters, optimizer, range(FIRST), rank, 2)
    optimizer.consolidate_error_memory()
    state = copy.deepcopy(optimizer.state_dict())
    if rank == 1:
        for entries in state["state"].values():
            entries[PREFIX + "tag"] = entries[PREFIX + "tag"][:6]
    optimizer.load_state_dict(state)
    try:
        advance(parameters, optimizer, range(FIRST, FIRST + 1), rank, 2)
    except ConfigMismatchError as error:
        return str(error)
    return ""


def test_workers_that_loaded_unlike_states_are_told_and_do_not_hang(gloo: GlooPool) -> None:
    for message in gloo.run(loads_another_state, 2):
        assert "restarts.late" in message
        assert "one deferred" in message


@pytest.mark.parametrize("keeps_the_top", [True, False])
def test_state_dicts_carry_what_is_owed(keeps_the_top: bool) -> None:
    """Also where torch.distributed.checkpoint has dropped the top-level key; and a
    state from before, whose tag has six numbers, owes nothing.
    """
    parameters, optimizer = optimizer_of(COMPRESSORS[0])
    advance(parameters, optimizer, range(FIRST), 0, 1)
    expected = optimizer.reducer.state.restarts.irregular()
    assert any(owed for _, _, owed in expected.values())
    state = copy.deepcopy(optimizer.state_dict())
    assert "unsteady" not in state[KEY]
    if not keeps_the_top:
        del state[KEY]
    _, resumed = optimizer_of(COMPRESSORS[0])
    resumed.load_state_dict(state)
    assert resumed.reducer.state.restarts.irregular() == expected
    for entries in state["state"].values():
        entries[PREFIX + "tag"] = entries[PREFIX + "tag"][:6]
    resumed.load_state_dict(state)
    assert (resumed.reducer.state.restarts.irregular(), resumed.reducer.step) == ({}, FIRST)


def test_files_carry_what_is_owed(tmp_path: Path) -> None:
    """As DeepSpeed's checkpoints; a tag from before has no such entry."""
    slots = [
        ParamInfo(name, shape, torch.float64, torch.device("cpu")) for name, shape in SHAPES.items()
    ]
    one, other = (Reducer(slots, COMPRESSORS[0], Group(), min_compression_rate=0) for _ in range(2))
    for t in range(FIRST):
        gradients = given(t, 0, 1)
        one.reduce([gradients.get(slot.name) for slot in slots])
        one.commit()
    library_checkpoint.save(one, tmp_path)
    assert library_checkpoint.load(other, tmp_path)
    assert other.state.restarts.irregular() == one.state.restarts.irregular() != {}
    assert all(torch.equal(state_of(one)[key], state_of(other)[key]) for key in state_of(one))
    old = json.loads(
        json.dumps({"kind": "mean", "rank": 0, "world": 1, "step": FIRST, "seed": 0, "format": 1})
    )
    restore(other, Tag(**old), tensors_of(one))
    assert (other.state.restarts.irregular(), other.step) == ({}, FIRST)


def test_a_basis_of_another_rank_does_not_wait_for_the_next_period() -> None:
    """GaLore, saved at rank 2 behind a refresh and loaded at rank 4 of a gradient of
    rank 4: a random basis, which it would keep for the rest of the period, sees a part
    of it; the refresh that it owes comes at once.
    """
    shape, left = (16, 12), torch.Generator().manual_seed(0)
    factors = [torch.randn(k, 4, generator=left, dtype=torch.float64) for k in shape]
    given = factors[0] @ factors[1].T
    options: dict[str, Any] = {"min_compression_rate": 0, "dtype": torch.float64}
    old = Simulation({"w": shape}, GaLore(2, restart_every=100), 1, **options)
    for _ in range(3):
        old.reduce([{"w": given}])
    new = Simulation({"w": shape}, GaLore(4, restart_every=100), 1, **options)
    restore(new.reducers[0], tag_of(old.reducers[0]), tensors_of(old.reducers[0]))
    applied = [new.reduce([{"w": given}])["w"] for _ in range(3)]
    assert [report.restarts for report in new.last_reports] == [0]
    assert all(float((one - given).norm() / given.norm()) < 1e-12 for one in applied)
