"""The byte ledger: the payload by kind is exact, and equals what passes through
torch.distributed's collectives.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lowrank_comm import CompressedOptimizer, Identity, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

MATRICES = {
    "tall": (40, 12),
    "tall_too": (40, 12),
    "wide": (12, 40),
    "filter": (16, 4, 3, 3),
    "thin": (50, 3),
}
DENSE = {"bias": (5,), "scale": ()}
SHAPES = MATRICES | DENSE
RANK, TAU = 4, 3
CONTROL = 1 + len(SHAPES)
"""Elements of the control numbers: one finite flag, and for each parameter whether it
has a gradient.
"""


def sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """m, n, and the rank after the cut."""
    m, n = shape[0], math.prod(shape[1:])
    return m, n, min(RANK, m, n)


FACTORS = sum(r * (m + n) for m, n, r in map(sides, MATRICES.values()))
WHOLE = sum(m * n for m, n, _ in map(sides, MATRICES.values()))
SINGULAR_VECTORS = sum(m * r for m, _, r in map(sides, MATRICES.values()))
IN_DENSE = sum(math.prod(shape) for shape in DENSE.values())


def payload(compressor: Compressor, step: int, element: int = 4) -> dict[str, int]:
    """The formulas: what one worker hands over at a step, without the control
    numbers.
    """
    if isinstance(compressor, Identity):
        return {"dense": (WHOLE + IN_DENSE) * element}
    sent = {"dense": IN_DENSE * element}
    if not isinstance(compressor, PowerSGDPlus) or step % TAU:
        return sent | {"factors": FACTORS * element}
    if compressor.restart != "randomized":
        return sent | {"restart": WHOLE * element, "broadcast": SINGULAR_VECTORS * element}
    return sent | {"restart": 2 * FACTORS * element}


COMPRESSORS = [
    PowerSGD(RANK),
    PowerSGDPlus(RANK, restart_every=TAU),
    PowerSGDPlus(RANK, restart_every=TAU, restart="randomized"),
    PowerSGDPlus(RANK, restart_every=TAU, exact_restart=True),
    PowerSGDPlus(RANK, restart_every=TAU, consensus_restart=True),
    Identity(),
]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


@every_compressor
@pytest.mark.parametrize(
    ("dtype", "wire", "element"),
    [(torch.float32, None, 4), (torch.float64, None, 8), (torch.float32, "bfloat16", 2)],
)
def test_payload_by_kind_over_two_periods(
    compressor: Compressor, dtype: torch.dtype, wire: str | None, element: int
) -> None:
    workers = 2
    sim = Simulation(
        SHAPES, compressor, workers, dtype=dtype, min_compression_rate=0, wire_dtype=wire
    )
    total: Counter[str] = Counter()
    for t in range(2 * TAU):
        sim.reduce(
            [
                {
                    name: torch.as_tensor(gradient(shape, t, k), dtype=dtype)
                    for name, shape in SHAPES.items()
                }
                for k in range(workers)
            ]
        )
        expected = payload(compressor, t, element)
        total.update(expected)
        for report in sim.last_reports:
            control = report.bytes["control"]
            assert {
                kind: count for kind, count in report.bytes.items() if kind != "control"
            } == expected
            assert control == CONTROL * element
            assert report.uncompressed_bytes == (WHOLE + IN_DENSE) * dtype.itemsize
            assert report.ratio == report.uncompressed_bytes / (sum(expected.values()) + control)
    for reducer in sim.reducers:
        ledger = reducer.ledger
        assert {kind: ledger.bytes[kind] for kind in total} == total
        assert set(ledger.bytes) <= set(total) | {"control", "fingerprint"}
        assert ledger.uncompressed_bytes == 2 * TAU * (WHOLE + IN_DENSE) * dtype.itemsize
        assert ledger.ratio == ledger.uncompressed_bytes / sum(ledger.bytes.values())
        assert ledger.restarts == (2 * len(MATRICES) if isinstance(compressor, PowerSGDPlus) else 0)


def counted(rank: int, compressor: Compressor) -> dict[str, Any]:
    """Count at torch.distributed's own functions: bytes of every tensor that a
    collective is called with, step by step.
    """
    calls: list[tuple[str, int]] = []

    def watch(name: str, tensor_at: int) -> None:
        original = getattr(dist, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            tensor = arguments[tensor_at]
            tensors = tensor if isinstance(tensor, list) else [tensor]
            calls.append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return original(*arguments, **keywords)

        setattr(dist, name, watched)
        originals[name] = original

    originals: dict[str, Any] = {}
    places = {
        "all_reduce": 0,
        "broadcast": 0,
        "all_gather": 1,
        "all_gather_into_tensor": 1,
        "reduce_scatter_tensor": 1,
        "reduce": 0,
    }
    try:
        for name, tensor_at in places.items():
            watch(name, tensor_at)
        parameters = {
            name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
        }
        optimizer = CompressedOptimizer(
            torch.optim.SGD(parameters.items(), lr=0.1),
            compressor=compressor,
            min_compression_rate=0,
        )
        per_step, reports = [], []
        for t in range(2 * TAU):
            for k, p in enumerate(parameters.values()):
                p.grad = torch.as_tensor(gradient(tuple(p.shape), t, rank, k), dtype=torch.float32)
            before = len(calls)
            optimizer.step()
            per_step.append(calls[before:])
            reports.append(optimizer.last_report)
        of_steps = len(calls)
        of_the_ledger = (dict(optimizer.ledger.bytes), optimizer.ledger.collectives)
        optimizer.consolidate_error_memory()
        return {
            "consolidation": calls[of_steps:],
            "consolidation in the ledger": optimizer.ledger.bytes["consolidation"],
            "consolidation's collectives": optimizer.ledger.collectives - of_the_ledger[1],
            "start": calls[: of_steps - sum(map(len, per_step))],
            "steps": per_step,
            "bytes": [dict(report.bytes) for report in reports],
            "collectives": [report.collectives for report in reports],
            "ledger": of_the_ledger[0],
            "ledger_collectives": of_the_ledger[1],
        }
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@every_compressor
@pytest.mark.parametrize("workers", [2, 3])
def test_ledger_equals_what_the_collectives_carried(
    gloo: GlooPool, compressor: Compressor, workers: int
) -> None:
    phases = {PowerSGD: 2, Identity: 1}
    for seen in gloo.run(counted, workers, compressor):
        all_calls = seen["start"] + [call for step in seen["steps"] for call in step]
        assert sum(size for _, size in all_calls) == sum(seen["ledger"].values())
        of_gradients = [
            [size for name, size in step if name == "all_reduce"] for step in seen["steps"]
        ]
        for t, (step, report, collectives) in enumerate(
            zip(of_gradients, seen["bytes"], seen["collectives"], strict=True)
        ):
            assert sum(step) == sum(report.values())
            assert {kind: size for kind, size in report.items() if kind != "control"} == payload(
                compressor, t
            )
            assert report["control"] == 4 * CONTROL
            restart = isinstance(compressor, PowerSGDPlus) and t % TAU == 0
            expected = (
                (4 if compressor.restart == "randomized" else 2)
                if restart
                else phases.get(type(compressor), 2)
            )
            # as many as there are phases, however many matrices
            assert collectives == len(step) == expected
        assert seen["ledger_collectives"] == sum(seen["collectives"])
        assert sum(size for _, size in seen["consolidation"]) == seen["consolidation in the ledger"]
        assert len(seen["consolidation"]) == seen["consolidation's collectives"]
        matrices = sum(math.prod(shape) for shape in SHAPES.values() if len(shape) > 1)
        assert seen["consolidation in the ledger"] == (
            # the step, for the agreement that all are there
            8 + 4 * matrices if compressor.low_rank else 0
        )
        fingerprint = sum(size for _, size in all_calls) - sum(map(sum, of_gradients))
        # once, and small
        assert fingerprint == seen["ledger"]["fingerprint"] < 100
        assert all(name == "all_reduce" for step in seen["steps"][1:] for name, _ in step)


def test_a_vetoed_step_is_counted_for_what_it_sent() -> None:
    """Phase one travelled, the second did not."""
    sim = Simulation({"w": (40, 12)}, PowerSGD(RANK), 2, min_compression_rate=0)
    sim.reduce([{"w": torch.full((40, 12), torch.inf)}, {"w": torch.ones(40, 12)}])
    report = sim.last_reports[0]
    assert not report.applied
    assert report.bytes["factors"] == 4 * RANK * 40
    assert sim.reducers[0].ledger.bytes["factors"] == 4 * RANK * 40
