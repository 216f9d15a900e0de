"""When matrices restart: every tau steps, staggered, and after a resume."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import PowerSGDPlus
from lowrank_comm.communication import Group
from lowrank_comm.compressors.restart_schedule import RestartHistory, RestartSchedule, steady
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.checkpointed import Trainer
from tests.support.driver import simulation
from tests.support.reference import gradient


def test_restart_schedule_goes_on_where_it_was() -> None:
    """t is part of the state: a run saved at t = 6 with tau = 4 restarts next
    at t = 8.
    """
    one = Trainer(PowerSGDPlus(2, restart_every=4))
    other = Trainer(PowerSGDPlus(2, restart_every=4))
    one.train(0, 6, 0)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    restarts = []
    for t in range(6, 10):
        other.train(t, 1, 0)
        restarts.append(other.optimizer.last_report.restarts)
    assert restarts == [0, 0, 2, 0]


@pytest.mark.parametrize("tau", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("restarts_first", [True, False])
def test_the_steady_history_is_what_steps_make(tau: int, first: int, restarts_first: bool) -> None:
    """Counted step by step, for every offset."""
    for offset in range(tau):
        schedule = RestartSchedule(tau, {"w": offset}, first, restarts_first or not first)
        history = RestartHistory()
        for t in range(25):
            assert steady(schedule, "w", t) == history, (offset, t)
            due = schedule.due("w", t)
            assert not (due and t < first)
            history = history.after(due, present=True)


@pytest.mark.parametrize("restart", ["svd", "randomized"])
@pytest.mark.parametrize("tau", [1, 3, 4])
def test_restarts_come_every_tau_steps_from_the_first(restart: str, tau: int) -> None:
    sim = simulation(
        PowerSGDPlus(2, restart_every=tau, restart=restart),
        {"a": (9, 6), "b": (6, 9), "c": (9, 6)},
        2,
    )
    seen = []
    for t in range(10):
        sim.reduce(
            [
                {
                    name: torch.from_numpy(gradient(shape, t, worker))
                    for name, shape in (("a", (9, 6)), ("b", (6, 9)), ("c", (9, 6)))
                }
                for worker in range(2)
            ]
        )
        seen.append(sim.last_reports[0].restarts)
    assert seen == [3 if t % tau == 0 else 0 for t in range(10)]


def restarted_by_step(
    shapes: dict[str, tuple[int, ...]], tau: int, steps: int
) -> tuple[list[set[str]], list[int]]:
    """Which matrices restarted at each step, told from outside: with exact_restart they
    are those without error afterwards.
    """
    sim = simulation(
        PowerSGDPlus(1, restart_every=tau, stagger=True, exact_restart=True), shapes, 1
    )
    names, restart_bytes = [], []
    for t in range(steps):
        sim.reduce(
            [
                {
                    name: torch.from_numpy(gradient(shape, t, 0, k))
                    for k, (name, shape) in enumerate(shapes.items())
                }
            ]
        )
        names.append({name for name, error in sim.error_memory(0).items() if not error.any()})
        restart_bytes.append(sim.last_reports[0].bytes.get("restart", 0))
        assert sim.last_reports[0].restarts == len(names[-1])
    return names, restart_bytes


def test_staggered_restarts_are_once_a_period_and_level() -> None:
    tau = 6
    equal = {f"w{k:02}": (8, 5) for k in range(12)}
    names, restart_bytes = restarted_by_step(equal, tau, 1 + 3 * tau)
    assert names[0] == set(equal)
    for period in range(3):
        steps = names[1 + period * tau : 1 + (period + 1) * tau]
        # each once
        assert sorted(name for step in steps for name in step) == sorted(equal)
        # at the same place in every period
        assert steps == names[1 : 1 + tau]
    assert restart_bytes[0] == 12 * 8 * 5 * 8
    # 12 equal matrices over 6 steps
    assert set(restart_bytes[1:]) == {2 * 8 * 5 * 8}


def test_staggered_restarts_of_unequal_matrices_are_level_too() -> None:
    tau = 5
    shapes = {f"w{k:02}": (4 + 2 * k, 3 + k % 4) for k in range(17)}
    names, restart_bytes = restarted_by_step(shapes, tau, 1 + tau)
    assert sorted(name for step in names[1:] for name in step) == sorted(shapes)
    sizes = [8 * m * n for m, n in shapes.values()]
    assert max(restart_bytes[1:]) <= sum(sizes) / tau + max(sizes)
    assert min(restart_bytes[1:]) >= sum(sizes) / tau - max(sizes)
    assert restart_bytes[0] == sum(sizes)


def test_restarts_of_a_pass_that_is_rolled_back_are_not_counted() -> None:
    slots = [ParamInfo("w", (12, 7), torch.float64, torch.device("cpu"))]
    reducer = Reducer(slots, PowerSGDPlus(2, restart_every=2), Group(), min_compression_rate=0)
    for commits in (False, True, True, True):
        reducer.reduce([torch.from_numpy(gradient((12, 7), 0, 0))])
        reducer.commit() if commits else reducer.rollback()
    # t = 0 and t = 2
    assert reducer.ledger.restarts == 2
    assert reducer.ledger.steps == 4


def test_without_stagger_all_restart_together() -> None:
    sim = simulation(PowerSGDPlus(1, restart_every=4), {f"w{k}": (8, 5) for k in range(6)}, 1)
    counts = []
    for t in range(9):
        sim.reduce([{f"w{k}": torch.from_numpy(gradient((8, 5), t, 0, k)) for k in range(6)}])
        counts.append(sim.last_reports[0].restarts)
    assert counts == [6, 0, 0, 0, 6, 0, 0, 0, 6]
