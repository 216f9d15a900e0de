"""GaLore and GoLore as schemes of communication: against NumPy, in bytes, in
expectation, over gloo, in GaLore's trap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowrank_comm import CompressedOptimizer, ConfigError, GaLore, GoLore
from lowrank_comm.communication.topology import grid
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import Section
from lowrank_comm.numerics.linalg import leading_left_singular_vectors
from lowrank_comm.simulation import Simulation
from tests.support.driver import dense, simulation
from tests.support.gloo import GlooPool
from tests.support.projection_runs import SHAPES, all_given, train
from tests.support.projections import ByHand, given, relative
from tests.support.reference import gradient
from tests.support.reference_projection import Projection

SIDES = ("short", "long")


@pytest.mark.parametrize("ef", [False, True], ids=["no feedback", "EF14"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rule", "until"), [("galore", 0), ("golore", 0), ("golore", 6)])
def test_fifteen_steps_as_numpy(rule: str, until: int, side: str, ef: bool) -> None:
    """tau = 4, three workers; the hybrid has GaLore's refreshes at 0 and 4 and random
    ones from 8 on.
    """
    kind = GaLore(3, 4, side) if rule == "galore" else GoLore(3, 4, side, galore_until=until)
    for name, shape in SHAPES.items():
        paper = Projection(name, shape, 3, 3, 4, rule, side, until, ef)
        ours = ByHand(kind, (name,), shape, 3, ef)
        for t in range(15):
            results = ours.step([g[None] for g in given(shape, t, 3)])
            applied = paper.step([gradient(shape, t, worker) for worker in range(3)])
            for worker, result in enumerate(results):
                np.testing.assert_allclose(
                    dense(result.applied)[0], applied, rtol=1e-9, atol=1e-9, err_msg=f"{name} {t}"
                )
                np.testing.assert_allclose(
                    ours.errors[worker][0], paper.errors[worker], rtol=1e-9, atol=1e-9
                )


@pytest.mark.parametrize("form", [None, "ef14"])
@pytest.mark.parametrize("rule", ["galore", "golore"])
def test_the_reducer_has_no_error_feedback_unless_asked(rule: str, form: str | None) -> None:
    """Named in JSON; the papers' schemes have none, and then no memory either."""
    section = {"compressor": rule, "rank": 3, "restart_every": 4, "error_feedback": {"form": form}}
    parsed = Section.parse(section)
    sim = simulation(
        parsed.make_compressor(),
        SHAPES,
        2,
        **parsed.reducer_options() | {"min_compression_rate": 0},
    )
    papers = {
        name: Projection(name, shape, 2, 3, 4, rule, feedback=form == "ef14")
        for name, shape in SHAPES.items()
    }
    for t in range(9):
        applied = sim.reduce(
            [{name: given(shape, t, 2)[w] for name, shape in SHAPES.items()} for w in range(2)]
        )
        for name, paper in papers.items():
            expected = paper.step([gradient(SHAPES[name], t, worker) for worker in range(2)])
            np.testing.assert_allclose(applied[name].numpy(), expected, rtol=1e-9, atol=1e-9)
    assert set(sim.error_memory(0)) == (set(SHAPES) if form else set())


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_a_refresh_can_apply_the_whole_mean(shape: tuple[int, int]) -> None:
    run = ByHand(GaLore(2, 3, apply_full=True), ("w",), shape, 2, True)
    for t in range(7):
        gradients = given(shape, t, 2)
        before = [error.clone() for error in run.errors]
        applied = dense(run.step([g[None] for g in gradients])[0].applied)[0]
        full = (sum(gradients) + sum(e[0] for e in before)) / 2
        assert (relative(applied, full) < 1e-14) == (t % 3 == 0)
        assert all((float(error.norm()) < 1e-14) == (t % 3 == 0) for error in run.errors)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "compressor", [GaLore(2, 3), GoLore(2, 3), GoLore(2, 3, galore_until=2)], ids=repr
)
def test_projection_of_the_mean_with_mean_of_sent_applied(compressor: GaLore, side: str) -> None:
    """mean of sent = applied, the same on all workers; applied is orthogonal to what it
    leaves of the mean; P stays orthonormal; and each worker's part is linear in its own
    Delta given P.
    """
    kind = type(compressor)(
        **{key: getattr(compressor, key) for key in compressor.options()} | {"side": side}
    )
    for shape in SHAPES.values():
        run = ByHand(kind, ("w",), shape, 3, True)
        for t in range(7):
            gradients = given(shape, t, 3)
            deltas = [g + e[0] for g, e in zip(gradients, run.errors, strict=True)]
            results = run.step([g[None] for g in gradients])
            applied, p = dense(results[0].applied)[0], results[0].state["P"][0]
            assert all(torch.equal(dense(r.applied), dense(results[0].applied)) for r in results)
            assert relative(sum(dense(r.sent)[0] for r in results) / 3, applied) < 1e-12
            mean = sum(deltas) / 3
            assert abs(float((applied * (mean - applied)).sum())) < 1e-11 * float(mean.norm()) ** 2
            assert relative(p.T @ p, torch.eye(2, dtype=torch.float64)) < 1e-13
            on_rows = p.shape[0] == shape[0] != shape[1]
            for delta, result in zip(deltas, results, strict=True):
                alone = p @ (p.T @ delta) if on_rows else delta @ p @ p.T
                assert relative(dense(result.sent)[0], alone) < 1e-12


@pytest.mark.parametrize(
    "compressor",
    [GaLore(9, 2), GoLore(9, 2), GaLore(9, 2, "long"), GoLore(7, 3, scaled=True)],
    ids=repr,
)
def test_full_rank_is_dense(compressor: Compressor) -> None:
    """Where r reaches the length of the basis. On the long side it cannot: r is cut to
    min(m, n); GaLore's singular vectors then still hold everything at a refresh.
    """
    for shape in ((12, 7), (7, 12), (1, 5), (5, 1)):
        run = ByHand(compressor, ("w",), shape, 2, False)
        for t in range(4):
            gradients = given(shape, t, 2)
            applied = dense(run.step([g[None] for g in gradients])[0].applied)[0]
            if getattr(compressor, "side", "short") == "short" or t % 2 == 0:
                assert relative(applied, sum(gradients) / 2) < 1e-11


@pytest.mark.parametrize(
    "compressor",
    [GaLore(2, 3), GoLore(2, 3), GoLore(2, 3, scaled=True), GoLore(2, 3, "long")],
    ids=repr,
)
def test_a_batch_gives_what_its_members_give_alone(compressor: Compressor) -> None:
    names = ("a", "b", "c")
    together = ByHand(compressor, names, (8, 6), 2, compressor.contractive)
    alone = [ByHand(compressor, (name,), (8, 6), 2, compressor.contractive) for name in names]
    for t in range(7):
        gradients = [
            torch.stack([torch.from_numpy(gradient((8, 6), t, w, k)) for k in range(3)])
            for w in range(2)
        ]
        applied = dense(together.step(gradients)[0].applied)
        for k, one in enumerate(alone):
            assert (
                relative(
                    dense(one.step([g[k : k + 1] for g in gradients])[0].applied)[0], applied[k]
                )
                < 1e-12
            )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [GaLore, GoLore])
def test_the_transposed_parameter_gives_the_transposed_result(
    kind: type[GaLore], side: str
) -> None:
    straight, turned = (
        ByHand(kind(2, 3, side), ("w",), shape, 2, True) for shape in ((12, 7), (7, 12))
    )
    for t in range(7):
        gradients = given((12, 7), t, 2)
        applied = dense(straight.step([g[None] for g in gradients])[0].applied)
        other = dense(turned.step([g.T[None] for g in gradients])[0].applied)
        assert relative(other.mT, applied) < 1e-11


def test_singular_vectors_of_each_workers_own_gradient_are_wrong() -> None:
    """The defect of per-rank SVDs: coordinates in different systems are averaged. What
    comes out is no projection of the mean on anything, it is further from it than the
    right one, and the workers apply different updates.
    """
    gradients = given((12, 7), 0, 4)
    mean, r = sum(gradients) / 4, 2
    applied = dense(
        ByHand(GaLore(r, 5), ("w",), (12, 7), 4, False)
        .step([g[None] for g in gradients])[0]
        .applied
    )[0]
    own = [leading_left_singular_vectors(g.T[None], r)[0] for g in gradients]
    coordinates = sum(g @ p for g, p in zip(gradients, own, strict=True)) / 4
    wrong = [coordinates @ p.T for p in own]
    best = float(torch.linalg.svdvals(mean)[r:].square().sum()) ** 0.5
    assert abs(float((mean - applied).norm()) - best) < 1e-12
    assert all(float((mean - one).norm()) > 1.1 * best for one in wrong)
    assert all(
        abs(float((one * (mean - one)).sum())) > 0.02 * float(mean.norm()) ** 2 for one in wrong
    )
    assert max(relative(one, wrong[0]) for one in wrong[1:]) > 0.5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["galore", "golore", "hybrid"])
def test_bytes_are_the_formula_over_two_periods(kind: str, side: str) -> None:
    """r l at every step, l the side without the basis; GaLore's refresh m n and the
    basis, r s; GoLore's nothing more.
    """
    tau, r, workers = 4, 2, 3
    # of two refreshes GaLore has 2, 0, 1
    until = {"galore": 2 * tau, "golore": 0, "hybrid": 2}[kind]
    compressor = (
        GaLore(r, tau, side) if kind == "galore" else GoLore(r, tau, side, galore_until=until)
    )
    sim = simulation(compressor, SHAPES, workers, dtype=torch.float32)
    for t in range(2 * tau):
        sim.reduce(
            [
                {name: g[worker].float() for name, g in all_given(t, workers).items()}
                for worker in range(workers)
            ]
        )
    expected = {"factors": 0, "restart": 0, "broadcast": 0}
    for m, n in SHAPES.values():
        s = min(m, n) if side == "short" else max(m, n)
        for t in range(2 * tau):
            if t % tau == 0 and t < until:
                expected["restart"] += 4 * m * n
                expected["broadcast"] += 4 * r * s
            else:
                expected["factors"] += 4 * r * (m * n // s)
    counted = sim.reducers[0].ledger.bytes
    assert {key: counted[key] for key in expected} == expected
    ordinary = {name: compressor.elements(m, n, r) for name, (m, n) in SHAPES.items()}
    assert sum(ordinary.values()) * 4 == sim.last_reports[0].bytes["factors"]
    if kind == "galore":
        assert sum(compressor.restart_elements(m, n, r) for m, n in SHAPES.values()) * 4 * 2 == sum(
            expected[key] for key in ("restart", "broadcast")
        )
    elif kind == "golore":
        assert all(
            compressor.restart_elements(m, n, r) == ordinary[name]
            for name, (m, n) in SHAPES.items()
        )


SCHEMES: dict[str, Compressor] = {
    "galore": GaLore(2, 3),
    "galore, long": GaLore(2, 3, "long"),
    "golore": GoLore(2, 3),
    "hybrid": GoLore(2, 3, galore_until=3),
}


@pytest.mark.parametrize("wire", [None, "bfloat16"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_gloo_processes_equal_the_simulation(gloo: GlooPool, scheme: str, wire: str | None) -> None:
    histories = gloo.run(train, 3, SCHEMES[scheme], wire)
    sim = simulation(SCHEMES[scheme], SHAPES, 3, wire_dtype=wire)
    for t in range(7):
        applied = sim.reduce(
            [{name: g[worker] for name, g in all_given(t, 3).items()} for worker in range(3)]
        )
        for name in SHAPES:
            assert all(
                torch.equal(other[t][name], histories[0][t][name]) for other in histories[1:]
            )
            assert relative(histories[0][t][name], applied[name]) < (
                1e-12 if wire is None else 2e-2
            )


def refused(rank: int) -> str:
    try:
        base = torch.optim.SGD({"w": torch.nn.Parameter(torch.zeros(8, 8))}.items())
        str(CompressedOptimizer(base, GaLore(2), grid(2), shard_scope="matrix").plan)
    except NotImplementedError as error:
        return str(error)
    return ""


def test_galore_of_rows_in_blocks_is_refused(gloo: GlooPool) -> None:
    assert all("galore" in text and 'shard_scope="shard"' in text for text in gloo.run(refused, 4))


def squared_gradient(
    compressor: Compressor | None, sigma: float, steps: int = 2_000, rate: float = 0.02
) -> float:
    """Of f(X) = ||A X||^2 / 2, n = 10, r = 4, A = [I_6, 0], from X = I / 2 on the first
    six; the noise is +-sigma times the identity on the last 4 x 4 block, which f does
    not see. SGD without error feedback; the mean over the last tenth.
    """
    n, r = 10, 4
    mask = torch.zeros(n, 1, dtype=torch.float64)
    mask[: n - r] = 1.0
    noise = torch.zeros(n, n, dtype=torch.float64)
    noise[n - r :, n - r :] = torch.eye(r, dtype=torch.float64)
    x = 0.5 * mask * torch.eye(n, dtype=torch.float64)
    coins = np.random.default_rng(0).choice([-1.0, 1.0], size=steps)
    run = ByHand(compressor, ("x",), (n, n), 1, False) if compressor else None
    squares = []
    for coin in coins:
        squares.append(float((mask * x).square().sum()))
        g = mask * x + sigma * float(coin) * noise
        x = x - rate * (dense(run.step([g[None]])[0].applied)[0] if run else g)
    return float(np.mean(squares[-steps // 10 :]))


def test_galore_is_trapped_by_noise_and_golore_escapes() -> None:
    """With noise above every singular value of the gradient the SVD takes the noise's
    subspace at every refresh, for ever: the gradient, 1.5 at first, stays what it was.
    GoLore and the hybrid leave; with less noise GaLore does too.
    """
    assert squared_gradient(GaLore(4, 20), sigma=1.0) == pytest.approx(1.5, abs=1e-12)
    assert squared_gradient(GoLore(4, 20), sigma=1.0) < 0.01
    assert squared_gradient(GoLore(4, 20, galore_until=500), sigma=1.0) < 0.01
    assert squared_gradient(GaLore(4, 20), sigma=0.4) < 1.2
    assert squared_gradient(None, sigma=1.0) < 1e-6


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tau": ({"compressor": "galore", "restart_every": 0}, ["restart_every", "0"]),
    "side": ({"compressor": "galore", "side": "left"}, ["side", "'left'", "'short'", "'long'"]),
    "full": ({"compressor": "galore", "apply_full": 1}, ["apply_full", "1"]),
    "until": (
        {"compressor": "golore", "galore_until": -1},
        ["galore_until", "-1", "galore_until=1000"],
    ),
    "part": ({"compressor": "golore", "galore_until": 0.25}, ["galore_until", "0.25", "steps"]),
    "scaled": ({"compressor": "golore", "scaled": "yes"}, ["scaled", "'yes'"]),
    "scaled hybrid": (
        {"compressor": "golore", "scaled": True, "galore_until": 10},
        ["scaled=True", "galore_until=10"],
    ),
    "full without": (
        {"compressor": "golore", "apply_full": True},
        ["apply_full=True", "galore_until"],
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_settings_are_refused_by_name(case: str) -> None:
    options, words = BAD[case]
    kind = {"galore": GaLore, "golore": GoLore}[options["compressor"]]
    with pytest.raises(ConfigError) as error:
        kind(**{key: value for key, value in options.items() if key != "compressor"})
    assert all(word in str(error.value) for word in words)


def test_what_the_forms_claim() -> None:
    assert (GaLore().contractive, GaLore().unbiased, GaLore().feedback) == (True, False, "none")
    assert (GoLore().contractive, GoLore().unbiased, GoLore().feedback) == (True, False, "none")
    scaled = GoLore(scaled=True)
    assert (scaled.contractive, scaled.unbiased, scaled.feedback) == (False, True, "none")
    assert GoLore().row_blocks
    assert not GoLore(galore_until=1).row_blocks
    assert not GaLore().row_blocks
    assert isinstance(Simulation({"w": (4, 4)}, scaled, 1), Simulation)
