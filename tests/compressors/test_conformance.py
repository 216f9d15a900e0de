"""What every registered compressor must keep, alone and with what may be around it. A
new one is here as soon as it is registered: with its defaults, until
`conformance.SETTINGS` names others.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.checkpointing.tag import tag_of
from lowrank_comm.checkpointing.tensors import check_fits, restore, tensors_of
from lowrank_comm.compressors import REGISTRY, Compressor
from lowrank_comm.config import Section
from lowrank_comm.numerics.device import on_accelerator
from lowrank_comm.simulation import Simulation
from tests.support.conformance import (
    AROUND,
    MATRICES,
    SETTINGS,
    SHAPES,
    applied_of,
    combinations,
    compressor_of,
    drawn,
    label,
    one_step,
    sections,
    sent_of,
    simulated,
    state_of,
    suited,
)
from tests.support.driver import elements_at
from tests.support.gloo import GlooPool
from tests.support.reference import spectrum_matrix

pytestmark = pytest.mark.usefixtures("both_paths")

every_variant = pytest.mark.parametrize("section", sections(), ids=label)
every_combination = pytest.mark.parametrize(
    ("both_paths", "section"),
    combinations(),
    indirect=["both_paths"],
    ids=[f"{path}-{label(section)}" for path, section in combinations()],
)
Given = dict[str, Any]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def feedback_of(section: Given) -> str:
    """The form that the section comes to."""
    return str(
        Section.parse(section)
        .reducer_options()["error_feedback"]
        .for_compressor(compressor_of(section))
        .form
    )


def test_no_compressor_is_forgotten() -> None:
    assert set(SETTINGS) == set(REGISTRY)


def test_the_accelerators_path_has_every_compressor_and_all_that_may_be_around_one() -> None:
    plain = sections()
    of_path = {"cpu": Counter[str](), "accelerator": Counter[str]()}
    for path, section in combinations():
        of_path[path][section["compressor"]] += 1
        if section not in plain:
            of_path[path][f"around {section['compressor']}"] += 1
            for one in AROUND:
                of_path[path][str(one)] += suited(section, one).items() <= section.items()
    assert of_path["cpu"].keys() == of_path["accelerator"].keys()
    assert min(of_path["accelerator"][str(one)] for one in AROUND) >= 2


# --- mass ---


@every_combination
def test_what_was_sent_and_kept_is_what_was_given(section: Given) -> None:
    """With an error memory: over 12 steps, sum of what was applied + mean error = sum
    of the mean gradients. Without one: what is applied is, on average over the workers,
    what they sent (`test_applied_is_the_mean_of_sent`).
    """
    sim = simulated(section, SHAPES, 3)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for t in range(12):
        gradients = [drawn(t, worker) for worker in range(3)]
        for name in SHAPES:
            given[name] += sum(g[name] for g in gradients) / 3
        for name, value in sim.reduce(gradients).items():
            applied[name] += value
    errors = [sim.error_memory(worker) for worker in range(3)]
    coded = "dense" in section.get("quantization", {})
    assert set(errors[0]) >= (
        set(MATRICES)
        if feedback_of(section) == "ef14" and section["compressor"] != "identity"
        else set()
    )
    for name in SHAPES:
        if name in errors[0]:
            mean_error = sum(e[name] for e in errors) / 3
            assert relative(applied[name] + mean_error, given[name]) < 1e-10
            sends_all = (
                coded
                or section["compressor"] == "greedylore"
                or "rounds" in section.get("error_feedback", {})
            )
            assert sends_all or float(mean_error.norm()) > 1e-3
        elif name not in MATRICES or section["compressor"] == "identity":
            assert relative(applied[name], given[name]) < 1e-12


@every_variant
def test_applied_is_the_mean_of_sent(section: Given) -> None:
    compressor = compressor_of(section)
    for restart in (False, True):
        results = one_step(compressor, [drawn(1, k)["tall"] for k in range(3)], restart=restart)
        mean = torch.stack([sent_of(result) for result in results]).mean(0)
        torch.testing.assert_close(mean, applied_of(results[0]), rtol=1e-12, atol=1e-12)
        for other in results[1:]:
            assert torch.equal(applied_of(other), applied_of(results[0]))


@every_variant
def test_linear_where_claimed_and_only_there(section: Given) -> None:
    """At a shared state and draw, what is applied depends on the mean of the workers'
    matrices only.
    """
    compressor = compressor_of(section)
    deltas = [drawn(1, k)["wide"] for k in range(3)]
    means = [torch.stack(deltas).mean(0)] * 3
    for restart in (False, True):
        one, other = (
            applied_of(one_step(compressor, d, restart=restart)[0]) for d in (deltas, means)
        )
        if compressor.linear:
            assert relative(one, other) < 1e-11
        else:
            assert relative(one, other) > 1e-2


# --- contraction, unbiasedness ---

DRAWS = 600
SPECTRA = {
    "1/k": 1.0 / np.arange(1, 7),
    "flat": np.ones(6),
    "one": np.array([1.0, 0, 0, 0, 0, 0]),
    "repeated": np.array([2.0, 2, 1, 1, 1, 1e-3]),
}


@every_variant
def test_contractive_where_claimed(section: Given) -> None:
    """E||C(x) - x||^2 <= (1 - r/min(m, n)) ||x||^2 at a restart (at every step, for
    those without), within 3 standard errors; an ordinary step with a stale subspace
    never makes it longer. Every spectrum; on the accelerator's path one, by turns.
    """
    compressor = compressor_of(section)
    if not compressor.contractive:
        pytest.skip("claims unbiasedness instead")
    turn = sections().index(section) % len(SPECTRA)
    on_path = on_accelerator(torch.device("cpu"))
    for spectrum in [list(SPECTRA)[turn]] if on_path else SPECTRA:
        contracts(compressor, section, SPECTRA[spectrum])


def contracts(compressor: Compressor, section: Given, spectrum: np.ndarray) -> None:
    x = torch.from_numpy(spectrum_matrix(8, 6, spectrum))
    restarts = compressor.schedule({"w": 1}) is not None
    kept = []
    for seed in range(DRAWS // 5):
        at_restart = applied_of(one_step(compressor, [x], restart=restarts, seed=seed)[0])
        kept.append(float((x - at_restart).norm() / x.norm()) ** 2)
        if seed < 20:
            later = applied_of(one_step(compressor, [x], restart=False, seed=seed)[0])
            # a single draw of ATOMO may be longer
            slack = 1.5 if section["compressor"] == "atomo" else 1e-12
            assert float((x - later).norm()) <= float(x.norm()) * (1 + slack)
    standard_error = np.std(kept) / np.sqrt(len(kept))
    # Without restarts, ACP's basis is on one side and then on the other.
    side = (
        8
        if section.get("side") == "long" or (section["compressor"] == "acp" and not restarts)
        else 6
    )
    assert np.mean(kept) <= 1 - 2 / side + 3 * standard_error + 1e-12


@every_variant
def test_unbiased_where_claimed_and_only_there(section: Given) -> None:
    """The mean of many draws is x, within 4.5 standard errors in every entry (48 of
    them); a projection's mean is not, which one path shows.
    """
    compressor = compressor_of(section)
    if section["compressor"] == "identity":
        return
    if not compressor.unbiased and on_accelerator(torch.device("cpu")):
        return
    x = torch.from_numpy(spectrum_matrix(8, 6, SPECTRA["1/k"]))
    restarts = compressor.schedule({"w": 1}) is not None
    draws = torch.stack(
        [
            applied_of(one_step(compressor, [x], restart=restarts, seed=seed)[0])
            for seed in range(DRAWS)
        ]
    )
    error = draws.std(0) / DRAWS**0.5
    off = float(((draws.mean(0) - x).abs() / error.clamp(min=1e-9)).max())
    if compressor.unbiased:
        assert off < 4.5
    elif not torch.allclose(draws[0], x):
        assert off > 6


# --- shapes and values ---


@every_combination
def test_full_rank_is_dense(section: Given) -> None:
    """rank = min(m, n) and above, 1 x n, m x 1: the exact mean, from the first step on;
    with int8, nearly that.
    """
    if section.get("side") == "long" or isinstance(section.get("basis"), int):
        pytest.skip(
            "its subspace is not the whole space at full rank: a basis on the long side, or of few"
            " columns"
        )
    shapes = {
        "tall": (9, 4),
        "wide": (4, 9),
        "square": (5, 5),
        "row": (1, 6),
        "column": (6, 1),
        "one": (1, 1),
    }
    tracking = section.get("error_feedback", {}).get("form", "").startswith("ef21_")
    coded = section.get("quantization", {}).get("factors")
    # a basis holds at least r columns
    wide_enough = {"basis": 8} if "basis" in section else {}
    sim = simulated({**section, "rank": 7, **wide_enough}, shapes, 2)
    for t in range(5):
        gradients = [drawn(t, k, shapes) for k in range(2)]
        out = sim.reduce(gradients)
        # averaged over time, by design
        if tracking:
            continue
        for name in shapes:
            expected = (gradients[0][name] + gradients[1][name]) / 2
            if coded is None:
                assert relative(out[name], expected) < 1e-10, (name, t)
            elif coded == "int8" and t == 0:
                assert relative(out[name], expected) < 0.05, (name, t)


@every_combination
def test_zero_gradients_then_progress(section: Given) -> None:
    """Three steps without any gradient leave nothing broken: then a constant rank-2
    gradient is followed; with error feedback of any form the mean of what is applied
    comes near to what was given.
    """
    x = {"w": torch.from_numpy(spectrum_matrix(8, 6, np.array([3.0, 2.0])))}
    sim = simulated(section, {"w": (8, 6)}, 2)
    for _ in range(3):
        out = sim.reduce([{"w": torch.zeros(8, 6, dtype=torch.float64)}] * 2)["w"]
        assert torch.count_nonzero(out) == 0
    total = torch.zeros(8, 6, dtype=torch.float64)
    steps = 60 if "quantization" in section else 30
    for _ in range(steps):
        out = sim.reduce([x, x])["w"]
        assert bool(torch.isfinite(out).all())
        total += out
    assert float(total.norm()) > 0
    if feedback_of(section) == "none":
        # a subspace may miss it for a period, and an unbiased scheme is right on
        # average only
        return
    assert relative(total / steps, x["w"]) < 0.35


@every_combination
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_rank_deficient_and_extreme_scales(section: Given, scale: float) -> None:
    """Rank 1 at rank 2, huge and tiny in float32: what comes out at scale 1 (a power of
    two moves no rounding).
    """
    x = torch.from_numpy(spectrum_matrix(8, 6, np.array([1.0]))).float()
    outs = []
    for factor in (1.0, scale):
        sim = simulated(section, {"w": (8, 6)}, 2, torch.float32)
        for _ in range(4):
            out = sim.reduce([{"w": x * factor}, {"w": x * factor}])["w"]
            assert bool(torch.isfinite(out).all())
        outs.append(out / factor)
    assert relative(outs[1].double(), outs[0].double()) < 1e-5


@every_combination
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(section: Given, dtype: torch.dtype) -> None:
    """Gradients of half types, on a wire of the same: finite, of their own dtype, and a
    memory in float32.
    """
    sim = simulated({**section, "wire_dtype": str(dtype).removeprefix("torch.")}, SHAPES, 2, dtype)
    for t in range(6):
        out = sim.reduce([drawn(t, k, dtype=dtype) for k in range(2)])
        assert all(
            value.dtype == dtype and bool(torch.isfinite(value).all()) for value in out.values()
        )
    errors = sim.error_memory(0)
    assert all(error.dtype == torch.float32 for error in errors.values())


# --- the same on all, and again ---


@every_combination
def test_determinism_and_the_global_generator(section: Given) -> None:
    """The same seed gives the same bits; no global random state is read or moved."""
    outs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002 - the global state is what is looked at
        numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
        before = (torch.get_rng_state(), random.getstate(), numpy_state)
        sim = simulated(section, SHAPES, 2, seed=5)
        for t in range(5):
            out = sim.reduce([drawn(t, k) for k in range(2)])
        outs.append(out)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in SHAPES)


@every_combination
def test_a_batch_gives_what_its_members_give_alone(section: Given) -> None:
    """With codes, in the first step: which worker books what the second rounding took
    depends on the others in the packet, and later codes on that.
    """
    shapes = {f"w{k}": (9, 6) for k in range(3)}
    together = simulated(section, shapes, 2)
    alone = {name: simulated(section, {name: (9, 6)}, 2) for name in shapes}
    if section.get("stagger"):
        pytest.skip("staggering is about the company that a matrix keeps")
    for t in range(1 if "quantization" in section else 5):
        gradients = [drawn(t, k, shapes) for k in range(2)]
        out = together.reduce(gradients)
        for name, sim in alone.items():
            torch.testing.assert_close(
                sim.reduce([{name: g[name]} for g in gradients])[name],
                out[name],
                rtol=1e-10,
                atol=1e-12,
            )


@every_combination
def test_one_workers_nan_changes_nothing_anywhere(section: Given) -> None:
    sim = simulated(section, SHAPES, 2)
    for t in range(4):
        sim.reduce([drawn(t, k) for k in range(2)])
    before = [state_of(reducer) for reducer in sim.reducers]
    bad = [drawn(4, k) for k in range(2)]
    bad[1]["wide"][3, 4] = torch.nan
    assert sim.reduce(bad) == {}
    for reducer, state in zip(sim.reducers, before, strict=True):
        after = state_of(reducer)
        assert after.keys() == state.keys()
        assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize("kind", ["plain", "around"])
def test_simulation_equals_gloo(gloo: GlooPool, kind: str) -> None:
    """Three real processes hold the simulation's numbers after 4 steps, and the same
    bits as each other; their ledgers agree with the simulation's.
    """
    path = "accelerator" if on_accelerator(torch.device("cpu")) else "cpu"
    chosen = [
        section
        for where, section in combinations()
        if where == path and (section in sections()) == (kind == "plain")
    ]
    by_rank = gloo.run(over_gloo, 3, chosen)
    for k, section in enumerate(chosen):
        sim = simulated(section, SHAPES, 3)
        for t in range(4):
            out = sim.reduce([drawn(t, worker) for worker in range(3)])
        ledger = sim.reducers[0].ledger
        for worker, results in enumerate(by_rank):
            applied, sent = results[k]
            for name in SHAPES:
                np.testing.assert_allclose(
                    applied[name],
                    out[name].numpy(),
                    rtol=1e-10,
                    atol=1e-12,
                    err_msg=f"{label(section)} {name}",
                )
                assert (applied[name] == by_rank[0][k][0][name]).all(), (
                    f"{label(section)}: {name} differs on worker {worker}"
                )
            assert {kind: n for kind, n in sent.items() if kind != "fingerprint"} == dict(
                ledger.bytes
            ), label(section)


def over_gloo(rank: int, chosen: list[Given]) -> list[tuple[dict[str, Any], dict[str, int]]]:
    results = []
    for section in chosen:
        parameters = {
            name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            for name, shape in SHAPES.items()
        }
        base = torch.optim.SGD(parameters.items(), lr=0.0)
        optimizer = CompressedOptimizer.from_config(base, {"min_compression_rate": 0, **section})
        for t in range(4):
            for name, g in drawn(t, rank).items():
                parameters[name].grad = g
            optimizer.step()
        results.append(
            (
                {name: p.grad.numpy().copy() for name, p in parameters.items()},
                dict(optimizer.ledger.bytes),
            )
        )
    return results


# --- state and bytes ---


def handed_over(sims: Simulation, other: Simulation) -> None:
    """The state of the first worker of one simulation, given to all workers of another,
    as a checkpoint would.
    """
    source = sims.reducers[0]
    tag = tag_of(source)
    tensors = {
        name: {k: v.clone() for k, v in parts.items()} for name, parts in tensors_of(source).items()
    }
    for reducer in other.reducers:
        check_fits(reducer, tag, tensors)
        restore(reducer, tag, tensors)


@every_combination
@pytest.mark.parametrize("workers", [1, 3])
def test_state_goes_round_at_another_world_size(section: Given, workers: int) -> None:
    """Two workers' mean state, consolidated, goes on in one and in three workers:
    exactly where the scheme is linear; where it is not, as a valid start that keeps the
    mass.
    """
    old, new = simulated(section, SHAPES, 2), simulated(section, SHAPES, workers)
    for t in range(5):
        old.reduce([drawn(t, k) for k in range(2)])
    consolidate(old)
    handed_over(old, new)
    linear = old.reducers[0].assignment.linear and "dense" not in section.get("quantization", {})
    before = sum_of_errors(new)
    for t in range(5, 9):
        mean = {name: (drawn(t, 0)[name] + drawn(t, 1)[name]) / 2 for name in SHAPES}
        expected, actual = old.reduce([mean] * 2), new.reduce([mean] * workers)
        for name in SHAPES:
            if linear:
                torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)
        if t == 5:
            after = sum_of_errors(new)
            for name in before:
                torch.testing.assert_close(
                    actual[name] + after[name], mean[name] + before[name], rtol=1e-10, atol=1e-12
                )


def sum_of_errors(sim: Simulation) -> dict[str, Tensor]:
    """The mean of the workers' errors."""
    errors = [sim.error_memory(k) for k in range(len(sim.reducers))]
    return {name: (sum(e[name] for e in errors) / len(errors)).clone() for name in errors[0]}


def consolidate(sim: Simulation) -> None:
    """What `consolidate_error_memory` does, for workers that share a process."""
    for batches in zip(*(reducer.state.batches for reducer in sim.reducers), strict=True):
        if batches[0].memory.kept:
            mean = torch.stack([batch.memory.tensor for batch in batches]).mean(0)
            for batch in batches:
                batch.memory.store(mean, shared=True)
        for symbol in batches[0].compressor.private:
            mean = torch.stack([batch.state[symbol] for batch in batches]).mean(0)
            for batch in batches:
                batch.state[symbol] = mean.clone()
    for reducer in sim.reducers:
        reducer.state.mark_consolidated()


@every_combination
def test_resume_of_the_same_run_is_bit_equal(section: Given) -> None:
    straight, resumed = (simulated(section, SHAPES, 2, torch.float32) for _ in range(2))
    for t in range(4):
        straight.reduce([drawn(t, k, dtype=torch.float32) for k in range(2)])
    for one, other in zip(straight.reducers, resumed.reducers, strict=True):
        tensors = {
            name: {k: v.clone() for k, v in parts.items()}
            for name, parts in tensors_of(one).items()
        }
        other.state.worker = (other.workers.global_rank, other.workers.world_size)
        restore(other, tag_of(one), tensors)
    for t in range(4, 9):
        gradients = [drawn(t, k, dtype=torch.float32) for k in range(2)]
        expected, actual = straight.reduce(gradients), resumed.reduce(gradients)
        assert all(torch.equal(expected[name], actual[name]) for name in SHAPES)


@every_combination
def test_reset_is_a_fresh_start(section: Given) -> None:
    """Back to the first step, with every symbol of the state, whether there is an error
    memory or none.
    """
    used, fresh = (simulated(section, SHAPES, 2) for _ in range(2))
    for t in range(4):
        used.reduce([drawn(t, k) for k in range(2)])
    for reducer, other in zip(used.reducers, fresh.reducers, strict=True):
        reducer.reset()
        state, expected = state_of(reducer), state_of(other)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    gradients = [drawn(9, k) for k in range(2)]
    one, other = used.reduce(gradients), fresh.reduce(gradients)
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


@every_variant
def test_bytes_are_the_formula(section: Given) -> None:
    """Over two periods, kind by kind added up: what the ledger counted is elements x 8
    bytes, restarts included, and the control numbers. (ATOMO with independent draws
    sends what it drew.)
    """
    if section.get("sampling") == "bernoulli":
        pytest.skip("its count is random; see test_atomo")
    compressor = compressor_of(section)
    sim = simulated(section, {"w": (12, 7)}, 2)
    every = section.get("restart_every")
    for t in range(2 * (every or 3)):
        sim.reduce([{"w": drawn(t, k)["tall"]} for k in range(2)])
        sent = {kind: n for kind, n in sim.last_reports[0].bytes.items() if kind != "control"}
        restart = every is not None and t % every == 0
        if section["compressor"] == "identity":
            expected = 12 * 7
        else:
            expected = elements_at(compressor, 12, 7, 2, t, restart)
        assert sum(sent.values()) == 8 * expected, (t, sent)
