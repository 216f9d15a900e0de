"""The warm-up averages everything, whatever compresses later, and hands on a basis that
has followed the means.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    ErrorFeedback,
    GreedyLore,
    Identity,
    PowerSGD,
    PowerSGDPlus,
)
from lowrank_comm.numerics.quantization import FORMATS
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.simulation import Simulation
from tests.support.conformance import SHAPES, drawn, label, sections, simulated
from tests.support.reference import spectrum_matrix

every_combination = pytest.mark.parametrize("section", sections(around=True), ids=label)
on_both_paths = pytest.mark.usefixtures("both_paths")
K = 3


def mean_of(gradients: list[dict[str, Tensor]], name: str) -> Tensor:
    return sum(one[name] for one in gradients) / len(gradients)


@on_both_paths
@every_combination
def test_the_first_steps_are_uncompressed(section: dict[str, Any]) -> None:
    """Every compressor, and all that may be around it: the exact mean for k steps, then
    a compressed one; what was applied and what is kept is what was given.
    """
    sim = simulated({**section, "warmup_steps": K}, SHAPES, 3)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    matrices = section["compressor"] != "identity"
    for t in range(K + 2):
        gradients = [drawn(t, worker) for worker in range(3)]
        out = sim.reduce(gradients)
        report = sim.last_reports[0]
        assert report is not None
        for name in SHAPES:
            given[name] += mean_of(gradients, name)
            applied[name] += out[name]
            if t < K:
                torch.testing.assert_close(out[name], mean_of(gradients, name))
        if t < K:
            assert report.restarts == 0
            assert set(report.bytes) <= {"warmup", "dense", "control"}
            assert ("warmup" in report.bytes) == matrices
        else:
            assert "warmup" not in report.bytes
    for name, error in sim.error_memory(0).items():
        mean_error = sum(sim.error_memory(k)[name] for k in range(3)) / 3
        assert mean_error.shape == error.shape
        torch.testing.assert_close(applied[name] + mean_error, given[name])


@on_both_paths
@pytest.mark.parametrize(
    ("wire", "bytes_of", "close"),
    [
        (None, lambda n: 4 * n, 1e-6),
        ("bfloat16", lambda n: 2 * n, 0.02),
        ("int8", FORMATS["int8"].bytes, 0.05),
    ],
)
def test_what_a_narrow_warmup_rounds_off_is_kept(
    wire: str | None, bytes_of: Any, close: float
) -> None:
    """g + e = sent + e', and the ledger and the plan count the same bytes."""
    shapes = {"a": (40, 30), "b": (30, 40), "c": (40, 30)}
    options = {"warmup_steps": 4, "warmup_wire": wire, "min_compression_rate": 0.0}
    sim = Simulation(shapes, PowerSGD(2), 4, **options)
    total = {name: torch.zeros(shape) for name, shape in shapes.items()}
    kept = 0.0
    for t in range(4):
        gradients = [drawn(t, k, shapes, torch.float32) for k in range(4)]
        out = sim.reduce(gradients)
        for name in shapes:
            total[name] += mean_of(gradients, name) - out[name]
            assert float((out[name] - mean_of(gradients, name)).norm()) < close * 40
        sent = sum(bytes_of(1200) for _ in shapes)
        assert sim.last_reports[0].bytes["warmup"] == sent
        plan = sim.reducers[0].plan
        assert plan.warmup_bytes == sent
        assert (plan.warmup_steps, plan.step_bytes) == (4, 3 * 2 * 70 * 4)
    for name in shapes:
        mean_error = sum(sim.error_memory(k)[name] for k in range(4)) / 4
        # what bfloat16 rounds off the sum of four workers is in no memory
        slack = 0.05 if wire == "bfloat16" else 2e-5
        torch.testing.assert_close(mean_error, total[name], atol=slack, rtol=1e-4)
        kept += float(mean_error.norm())
    assert (kept > 0.01) == (wire is not None)
    captured = sim.last_reports[0].captured_energy
    assert captured == pytest.approx(1.0, abs=1e-12 if wire is None else 0.01)


def test_bases_follow_the_means() -> None:
    """After a warm-up on one matrix of decaying spectrum, Q captures nearly what the
    best subspace does, without a restart; without a warm-up, a Gaussian Q less.
    """
    spectrum = 0.7 ** torch.arange(12.0).double().numpy()
    x = torch.from_numpy(spectrum_matrix(20, 12, spectrum))
    best = float(
        (torch.from_numpy(spectrum)[:2] ** 2).sum() / (torch.from_numpy(spectrum) ** 2).sum()
    )
    captured = {}
    for k in (0, 6):
        sim = Simulation(
            {"w": (20, 12)},
            PowerSGDPlus(2, restart_every=100),
            2,
            dtype=torch.float64,
            warmup_steps=k,
            min_compression_rate=0.0,
        )
        if k == 0:
            sim = Simulation(
                {"w": (20, 12)}, PowerSGD(2), 2, dtype=torch.float64, min_compression_rate=0.0
            )
        for _ in range(k + 1):
            out = sim.reduce([{"w": x}, {"w": x}])["w"]
        captured[k] = float(out.norm() ** 2 / x.norm() ** 2)
        assert sim.last_reports[0].restarts == 0
    assert captured[6] > 0.999 * best > captured[0]


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (PowerSGDPlus(2, restart_every=5), [5]),
        (PowerSGDPlus(2, restart_every=3), [3, 6]),
        (GreedyLore(2, restart_every=5), [3, 5]),
    ],
)
def test_no_restart_falls_inside(compressor: Any, expected: list[int]) -> None:
    """t counts the steps of the warm-up; where no basis has followed, the first
    compressed step restarts.
    """
    shapes = {"w": (12, 8)}
    sim = Simulation(shapes, compressor, 2, warmup_steps=K, min_compression_rate=0.0)
    restarts = []
    for t in range(8):
        sim.reduce([drawn(t, k, shapes, torch.float32) for k in range(2)])
        if sim.last_reports[0].restarts:
            restarts.append(t)
    assert restarts == expected


def test_a_matrix_without_a_gradient_in_the_warmup_restarts() -> None:
    shapes = {"seen": (12, 8), "new": (12, 8)}
    sim = Simulation(
        shapes, PowerSGDPlus(2, restart_every=50), 2, warmup_steps=K, min_compression_rate=0.0
    )
    restarts = []
    for t in range(7):
        gradients: list[dict[str, Any]] = [drawn(t, k, shapes, torch.float32) for k in range(2)]
        if t < 5:
            gradients = [{"seen": one["seen"]} for one in gradients]
        sim.reduce(gradients)
        restarts.append(sim.last_reports[0].restarts)
    assert restarts == [0, 0, 0, 0, 0, 1, 0]


def test_a_veto_in_the_warmup_leaves_no_trace() -> None:
    shapes = {"a": (12, 8), "b": (9, 7)}
    options: dict[str, Any] = {
        "warmup_steps": K,
        "warmup_wire": "int8",
        "min_compression_rate": 0.0,
        "piece_bytes": 400,
    }
    one, other = (Simulation(shapes, PowerSGDPlus(2, 4), 2, **options) for _ in range(2))
    for t in range(6):
        gradients = [drawn(t, k, shapes, torch.float32) for k in range(2)]
        expected = one.reduce(gradients)
        if t == 1:
            # of a later piece
            bad = {"a": gradients[0]["a"], "b": torch.full((9, 7), float("inf"))}
            before = {n: e.clone() for n, e in other.error_memory(0).items()}
            assert other.reduce([bad, gradients[1]]) == {}
            assert other.reducers[0].step == 1
            assert all(torch.equal(before[n], e) for n, e in other.error_memory(0).items())
        out = other.reduce(gradients)
        assert all(torch.equal(out[name], expected[name]) for name in shapes)


def run(optimizer: CompressedOptimizer, model: torch.nn.Module, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        model(torch.randn(4, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def built(steps: int | float = 4, **options: Any) -> tuple[CompressedOptimizer, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Linear(16, 12))
    base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    options = {"warmup_wire": "int8", "min_compression_rate": 0, **options}
    return CompressedOptimizer(base, PowerSGDPlus(2, 50), warmup_steps=steps, **options), model


@pytest.mark.parametrize("saved_at", [2, 4, 6])
def test_a_resume_goes_on(saved_at: int) -> None:
    """Inside the warm-up, at its end, and after it."""
    straight, model = built()
    run(straight, model, range(9))
    first, other = built()
    run(first, other, range(saved_at))
    state, weights = first.state_dict(), other.state_dict()
    resumed, again = built()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    run(resumed, again, range(saved_at, 9))
    for expected, got in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_a_fraction_of_the_run() -> None:
    for total, k in ((100, 5), (1000, 30), (1001, 31), (3, 3)):
        optimizer, _ = built(0.03, training_steps=total)
        assert optimizer.plan.warmup_steps == k
    optimizer, model = built(0.5)
    with pytest.raises(ConfigError, match=r"warmup_steps=0.5 is a fraction.*training_steps"):
        run(optimizer, model, range(1))
    optimizer, model = built(0.5)
    optimizer.attach(model, training_steps=20)
    assert "warm-up:  10 steps first" in str(optimizer.plan)


def test_what_is_exact_needs_no_warmup() -> None:
    """Rows of an embedding go as ever; codes of what is dense wait."""
    shapes = {"rows": (20, 8), "coded": (40, 30)}
    rules = [Rule("rows", treatment="row_sparse"), Rule("coded", treatment="int8")]
    sim = Simulation(shapes, Identity(), 2, rules=rules, warmup_steps=1)
    for t in range(2):
        gradients = [drawn(t, k, shapes, torch.float32) for k in range(2)]
        for one in gradients:
            one["rows"][2:] = 0
        sim.reduce(gradients)
        sent = sim.last_reports[0].bytes
        assert sent["rows"] > 0
        assert ("warmup" in sent) == (t == 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5"),
        ({"warmup_steps": True}, "warmup_steps=True"),
        ({"warmup_wire": "int8"}, "has no effect without a warm-up"),
        ({"warmup_steps": 3, "warmup_wire": "int4"}, "warmup_wire='int4'"),
        ({"warmup_steps": 0.1, "training_steps": 0}, "training_steps=0"),
        (
            {
                "warmup_steps": 3,
                "warmup_wire": "int8",
                "error_feedback": ErrorFeedback(form="ef21"),
            },
            'warmup_wire="int8" needs an error memory',
        ),
    ],
)
def test_bad_values(options: dict[str, Any], words: str) -> None:
    base = torch.optim.SGD(torch.nn.Linear(4, 4).named_parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        CompressedOptimizer(base, PowerSGD(1), **options)
