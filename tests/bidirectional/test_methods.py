"""Methods on the simulated transport: invariants, independent references, the theorems'
bounds, the veto.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.bidirectional import (
    M3,
    M4,
    METHODS,
    BidirectionalSimulation,
    Clock,
    InkheartSGD,
    MarinaP,
    Method,
    PermK,
    Problem,
    RandK,
)
from lowrank_comm.bidirectional import inkheart as inkheart_module
from lowrank_comm.bidirectional import m4 as m4_module
from lowrank_comm.bidirectional.permk import Blocks
from lowrank_comm.bidirectional.transport import Context
from lowrank_comm.numerics.randomness import stream
from tests.support.bidirectional_runs import D, N, pull, run

EXAMPLES: list[Method] = [
    InkheartSGD(4, 0.3, uplink_fraction=0.4),
    # G divides neither n nor d
    InkheartSGD(3, 0.3, uplink_fraction=0.4, mask="independent"),
    MarinaP(2, 0.2),
    M3(4, 0.3, uplink_fraction=0.4, model_weight=0.6),
    M4(4, 0.3, uplink_fraction=0.4, gradient_weight=0.5),
    M4(3, 0.3, uplink_fraction=0.4, gradient_weight=0.5, uplink_sync_probability=0.1),
]


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_the_mean_of_the_workers_points_is_x(method: Method) -> None:
    simulation = BidirectionalSimulation(
        method, torch.zeros(D, dtype=torch.float64), N, gamma=0.2, seed=1
    )
    apart = 0.0
    for t in range(300):
        simulation.step(pull(simulation.points, t))
        w = simulation.state["w"]
        torch.testing.assert_close(w.mean(dim=0), simulation.x, rtol=0, atol=1e-12)
        apart = max(apart, float((w - simulation.x).norm()))
    # they do differ from one another
    assert apart > 0.01
    if "y" in simulation.state:
        torch.testing.assert_close(
            simulation.state["y"].mean(dim=0), simulation.state["y_bar"], rtol=0, atol=1e-12
        )


def test_control_a_fixed_permutation_per_worker_pulls_the_points_away_from_x(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean over the workers hides it; each one's own w_i - x, averaged over steps,
    does not vanish any more.
    """

    def drift() -> float:
        method = InkheartSGD(4, 0.02, uplink_fraction=1.0)
        total = torch.zeros(N, 8, dtype=torch.float64)
        simulation = BidirectionalSimulation(
            method, torch.zeros(8, dtype=torch.float64), N, gamma=0.05
        )
        for _ in range(2000):
            # x moves on steadily
            simulation.step(torch.ones(N, 8, dtype=torch.float64))
            total += simulation.state["w"] - simulation.x
        return float(total.norm()) / 2000

    fresh, draw = drift(), PermK.draw

    def fixed(self: PermK, seed: int, t: int, n: int, d: int) -> Blocks:
        return draw(self, seed, 0, n, d)

    monkeypatch.setattr(PermK, "draw", fixed)
    assert drift() > 10 * fresh


def test_draws_do_not_depend_on_torchs_default_dtype_or_device() -> None:
    """Ranks that differed in a coin would wait for each other in different
    collectives.
    """

    def drawn() -> list[Any]:
        context = [Context(3, t, 5, 8, (0,)) for t in range(100)]
        # of changing and of fixed members
        blocks = [PermK(groups).draw(3, 1, 5, 8) for groups in (2, 5)]
        whole = torch.arange(1.0, 9.0, dtype=torch.float32, device="cpu")
        return [
            [one.coin("downlink coin", 0.3) for one in context],
            *(b.restrict(whole, range(5)).tolist() for b in blocks),
        ]

    expected = drawn()
    assert 10 < sum(expected[0]) < 50
    try:
        torch.set_default_dtype(torch.float64)
        assert drawn() == expected
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert drawn() == expected


@pytest.mark.parametrize(
    "method",
    [
        InkheartSGD(1, uplink_fraction=1.0),
        MarinaP(1),
        M4(1, uplink_fraction=1.0, gradient_weight=1.0),
        M3(1, uplink_fraction=1.0, model_weight=1.0),
    ],
    ids=repr,
)
def test_uncompressed_it_is_plain_sgd_exactly(method: Method) -> None:
    """K = d, G = 1 (for M4 with a = 1, for M3 with beta = 1)."""
    simulation, x = run(method, 25), torch.zeros(D, dtype=torch.float64)
    for t in range(25):
        x = x - 0.2 * pull(x.expand(N, D), t).mean(dim=0)
    assert torch.equal(simulation.x, x)
    assert torch.equal(simulation.points, x.expand(N, D))


@dataclass
class Reference:
    """The methods in NumPy, worker by worker, from their pseudo-code; only the random
    draws are the library's.
    """

    method: Method
    seed: int = 3
    gamma: float = 0.2

    def coin(self, t: int, purpose: str, p: float) -> bool:
        return float(torch.rand((), generator=stream(self.seed, "bidirectional", t, purpose))) < p

    def randk(self, v: np.ndarray, t: int, i: int) -> np.ndarray:
        indices = RandK(0.4, self.method.mask).indices(self.seed, t, N, [i], D)  # type: ignore[attr-defined]
        assert indices is not None
        kept = np.zeros(D)
        kept[indices[0].numpy()] = 1.0
        return D / indices.shape[1] * kept * v

    def q(self, change: np.ndarray, t: int) -> list[np.ndarray]:
        blocks = PermK(self.method.groups(N)).draw(self.seed, t, N, D)
        result = []
        for i in range(N):
            members = int((blocks.group == blocks.group[i]).sum())
            kept = np.zeros(D)
            kept[blocks.coordinates(int(blocks.group[i])).numpy()] = 1.0
            result.append(N / members * kept * change)
        return result

    def run(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        m, x = self.method, np.zeros(D)
        w, z = np.zeros((N, D)), np.zeros((N, D))
        v, y, last, y_bar = np.zeros((N, D)), np.zeros((N, D)), np.zeros((N, D)), np.zeros(D)
        for t in range(steps):
            g = pull(torch.tensor(z if isinstance(m, M3) else w), t).numpy()
            if isinstance(m, M4):
                v_next = g if t == 0 else (1 - m.gradient_weight) * v + m.gradient_weight * g
                if t == 0 or self.coin(t, "uplink coin", m.uplink_probability(D)):
                    y = v_next.copy()
                else:
                    y = y + np.stack([self.randk(v_next[i] - v[i], t, i) for i in range(N)])
                v, estimate = v_next, y.mean(axis=0)
            elif isinstance(m, M3):
                if t == 0 or self.coin(t, "uplink coin", m.uplink_probability(D)):
                    y_bar = g.mean(axis=0)
                else:
                    y_bar = y_bar + np.mean(
                        [self.randk(g[i] - last[i], t, i) for i in range(N)], axis=0
                    )
                last, estimate = g, y_bar
            elif isinstance(m, InkheartSGD):
                estimate = np.mean([self.randk(g[i], t, i) for i in range(N)], axis=0)
            else:
                estimate = g.mean(axis=0)
            x_next = x - self.gamma * estimate
            if self.coin(t, "downlink coin", m.probability(N)):
                w = np.tile(x_next, (N, 1))
            else:
                w = w + np.stack(self.q(x_next - x, t))
            x = x_next
            if isinstance(m, M3):
                z = (1 - m.model_weight) * z + m.model_weight * w
        return x, w


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_an_independent_reference(method: Method) -> None:
    simulation = run(method, 15)
    x, w = Reference(method).run(15)
    np.testing.assert_allclose(simulation.x.numpy(), x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(simulation.state["w"].numpy(), w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_zero_gradients_then_progress_and_a_single_coordinate(method: Method) -> None:
    for d in (D, 1):
        simulation = BidirectionalSimulation(
            method, torch.ones(d, dtype=torch.float64), N, gamma=0.05
        )
        for _ in range(3):
            assert simulation.step(torch.zeros(N, d, dtype=torch.float64))
        assert torch.equal(simulation.x, torch.ones(d, dtype=torch.float64))
        for _ in range(600):
            assert simulation.step(simulation.points)
        assert float(simulation.x.norm()) < 1e-2


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_a_step_that_is_not_finite_changes_nothing(method: Method) -> None:
    simulation = run(method, 5)
    before = {name: tensor.clone() for name, tensor in simulation.state.items()}
    bad = pull(simulation.points, 5)
    bad[2, 7] = math.nan
    assert not simulation.step(bad)
    assert before.keys() == simulation.state.keys() and simulation.t == 5
    assert all(torch.equal(before[name], simulation.state[name]) for name in before)
    whole = run(method, 6)
    assert simulation.step(pull(simulation.points, 5)) and torch.equal(simulation.x, whole.x)


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_same_seed_same_bits(method: Method) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(method, 20).x
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run(method, 20).x) and not torch.equal(
        first, run(method, 20, seed=4).x
    )


# --- ledger and clock ---
def test_ledger_and_clock_are_the_formula() -> None:
    method, steps = InkheartSGD(4, 0.3, uplink_fraction=0.4), 200
    clock = Clock(h=2.0, kappa=0.5)
    simulation = BidirectionalSimulation(method, torch.zeros(D), N, gamma=0.1, clock=clock)
    for _ in range(steps):
        simulation.step(simulation.points, batch=3)
    ledger = simulation.ledger
    dense = ledger.coordinates["downlink_dense"] // D
    assert 0.15 * steps < dense < 0.45 * steps
    # K = 0.4 * 11, d/G = 11/4
    assert ledger.up == steps * 4 and ledger.coordinates["downlink"] == (steps - dense) * 3
    assert ledger.bytes["uplink"] == 4 * ledger.coordinates["uplink"] and (
        ledger.steps,
        ledger.vetoed,
    ) == (steps, 0)
    assert clock.seconds == pytest.approx(steps * 2.0 * 3 + 0.5 * (ledger.up + ledger.down))


def test_step_sizes_by_hand() -> None:
    problem = Problem(2.0, gap=3.0, variance=4.0, structure=0.5, worst_smoothness=5.0)
    # omega = 3, G - 1 = 3, p = 1/4
    method = InkheartSGD(4, uplink_fraction=0.25)
    conditions = [
        1 / 4,
        8 / 72,
        math.sqrt(0.25 / 24) / 0.5,
        2 * 0.25 / (6 * 0.25),
        math.sqrt(8 * 0.25 / 72) / 2,
    ]
    assert method.largest_step_size(problem, 8, 64) == pytest.approx(min(conditions))
    noise_rule = math.sqrt(2 * 3 * 8 * 5 / (3 * 2 * 4 * 4 * 10_000))
    assert method.step_size(problem, 8, 64, batch=5, steps=10_000) == pytest.approx(noise_rule)
    assert method.bound(problem, 8, 64, 5, 100, 0.01) == pytest.approx(
        12 / 1 + 6 * 2 * 0.01 * 4 * 4 / 40
    )
    assert InkheartSGD(1, uplink_fraction=1.0).largest_step_size(problem, 8, 64) == 0.25
    assert MarinaP(4).largest_step_size(problem, 8, 64) == pytest.approx(
        min(conditions[0], conditions[2], conditions[3])
    )
    # q = 1/4
    m4 = M4(4, uplink_fraction=0.25, gradient_weight=0.5)
    x = 4.5 * 4 / 0.25 + 15 * 3 * 0.25 / (0.25 * 0.25) + 18 * 3 * 4 * 25 / (0.25 * 8)
    gamma = 1 / (4 + 2 * math.sqrt(x))
    assert m4.step_size(problem, 8, 64) == pytest.approx(gamma)
    phi = 3 + 1.5 * gamma / 0.5 * 4 / (8 * 7) + 3 * gamma * 3 * 0.5 * 4 / (0.25 * 8 * 7)
    bound = 2 * phi / (gamma * 100) + 4 / (8 * 5) * (1.5 + 9 * 3 * 0.25 / 0.25)
    assert m4.bound(problem, 8, 64, batch=5, first_batch=7, steps=100) == pytest.approx(bound)


def test_plans_reach_their_eps_by_their_own_bounds_and_fall_with_n() -> None:
    problem, seconds = Problem(1.0, gap=1.0, variance=4.0, structure=0.0), []
    for n in (1, 16, 256):
        chosen = inkheart_module.plan(problem, n, 128, h=1.0, kappa=1.5, eps=0.01)
        assert chosen.method.bound(
            problem, n, 128, chosen.batch, chosen.steps, chosen.gamma
        ) <= 0.01 * (1 + 1e-9)
        assert chosen.gamma <= chosen.method.largest_step_size(problem, n, 128)
        seconds.append(chosen.seconds)
    assert seconds[0] > seconds[1] > seconds[2]
    m4 = m4_module.plan(problem, M4(4, uplink_fraction=0.25), n=16, d=64, batch=4, eps=0.05)
    assert m4.method.bound(problem, 16, 64, 4, m4.first_batch, m4.steps) <= 0.05 * (1 + 1e-9)


# --- bad input ---
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: InkheartSGD(0), "downlink_groups=0"),
        (lambda: InkheartSGD(2.0), "downlink_groups=2.0"),  # type: ignore[arg-type]
        (lambda: MarinaP(2, 0.0), "sync_probability=0.0"),
        (lambda: MarinaP(2, 1.1), "sync_probability=1.1"),
        (lambda: InkheartSGD(uplink_fraction=0.0), "uplink_fraction=0.0"),
        (lambda: M4(gradient_weight=0.0), "gradient_weight=0.0"),
        (lambda: M4(uplink_sync_probability=-1.0), "uplink_sync_probability=-1.0"),
        (lambda: M3(model_weight=True), "model_weight=True"),
        (lambda: M3(mask="random"), "mask='random'"),
        (lambda: MarinaP(8).groups(4), "downlink_groups=8"),
        (
            lambda: BidirectionalSimulation(MarinaP(8), torch.zeros(3), 4, gamma=0.1),
            "downlink_groups=8",
        ),
        (lambda: BidirectionalSimulation(MarinaP(2), torch.zeros(3), 4, gamma=0.0), "gamma=0.0"),
        (lambda: BidirectionalSimulation(MarinaP(), torch.zeros(3), 0, gamma=0.1), "workers=0"),
        (lambda: Problem(0.0, 1.0, 1.0), "smoothness=0.0"),
        (lambda: Problem(1.0, -1.0, 1.0), "gap=-1.0"),
    ],
)
def test_bad_values_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        make()


def test_registry_and_defaults() -> None:
    assert set(METHODS) == {"inkheart", "m4", "marina_p", "m3"}
    for name, kind in METHODS.items():
        method = kind()
        assert method.describe()["compressor"] == name == kind.json_name
        assert [method.groups(n) for n in (1, 2, 6, 7, 16, 12, 11)] == [1, 2, 6, 7, 8, 6, 1]
        assert method.probability(16) == 1 / 8
