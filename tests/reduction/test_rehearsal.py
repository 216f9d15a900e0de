"""What steps, a save and a load hold is what the rehearsal says: a plain model of two
ranks, under many settings, measured from allocations. The engines' ranks:
`tests/integrations/test_engine_memory.py`.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_comm import (
    CompressedOptimizer,
    ErrorFeedback,
    GaLore,
    GoLore,
    GreedyLore,
    PowerSGD,
    PowerSGDPlus,
    RandomProjection,
)
from lowrank_comm.communication import Group
from lowrank_comm.communication.group import PretendedGroup
from lowrank_comm.compressors import REGISTRY
from lowrank_comm.compressors.base import Compressor, Context, Delta, State
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.numerics.device import (
    accelerator_path,
    as_if_on_accelerator,
    on_accelerator,
)
from lowrank_comm.numerics.linalg import leading_left_singular_vectors
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.numerics.shapes_only import ShapesOnly
from lowrank_comm.reduction.batches import DECODED
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import human_bytes
from lowrank_comm.reduction.reducer import Reducer
from tests.reduction.test_plan import llama_3_8b
from tests.support.gloo import GlooPool
from tests.support.memory_cases import CLOSE, Figures, plain

# 2^20 elements and more, small ones of two shapes, and vectors
SHAPES: list[tuple[int, ...]] = [(512, 256)] * 6 + [(256, 512)] * 3 + [(256,)] * 4 + [(1040, 1024)]
# bytes of texts and checks, and in a save of what is written, which are in no plan
APART = {"save": 20_000}
TEXTS = 1_000
Settings = tuple[Compressor, dict[str, Any]]
SETTINGS: dict[str, Settings] = {
    "PowerSGD": (PowerSGD(4), {}),
    "PowerSGD, buckets": (PowerSGD(4), {"bucket_cap_mb": 1.0}),
    "PowerSGD+, auto": (PowerSGDPlus(4), {}),
    "PowerSGD+, tau 3": (PowerSGDPlus(4, restart_every=3), {}),
    "PowerSGD+, auto, rank 16": (PowerSGDPlus(16), {}),
    "PowerSGD+, SVD": (PowerSGDPlus(4, restart="svd"), {}),
    "PowerSGD+, SVD, bfloat16 wire": (
        PowerSGDPlus(4, restart="svd"),
        {"wire_dtype": "bfloat16", "bucket_cap_mb": 2.0},
    ),
    "PowerSGD+, exact restarts": (PowerSGDPlus(4, exact_restart=True), {}),
    "PowerSGD+, consensus restarts": (PowerSGDPlus(4, consensus_restart=True), {}),
    "PowerSGD+, greedy restarts": (PowerSGDPlus(4, restart="greedy"), {}),
    "bfloat16 memory": (PowerSGDPlus(4), {"error_feedback": ErrorFeedback(dtype="bfloat16")}),
    "bfloat16 memory, stochastic": (
        PowerSGDPlus(4),
        {"error_feedback": ErrorFeedback(dtype="bfloat16", rounding="stochastic")},
    ),
    "offload": (PowerSGDPlus(4), {"error_feedback": ErrorFeedback(offload=True)}),
    "bfloat16 gradients": (PowerSGDPlus(4), {"dtype": torch.bfloat16}),
    "EF21": (PowerSGD(4), {"error_feedback": ErrorFeedback(form="ef21")}),
    "EF21-SGDM": (PowerSGD(4), {"error_feedback": ErrorFeedback(form="ef21_sgdm")}),
    "int8 factors": (PowerSGD(4), {"quantization": Quantization(factors="int8")}),
    "warm-up": (PowerSGDPlus(4), {"warmup_steps": 1}),
    "warm-up in int8": (PowerSGD(4), {"warmup_steps": 1, "warmup_wire": "int8"}),
    "GreedyLore": (GreedyLore(4), {}),
    "GaLore": (GaLore(4), {}),
    "GoLore": (GoLore(4), {}),
    "random projection": (RandomProjection(4), {}),
    "ACP": (REGISTRY["acp"](4), {}),
}


# the others' steps differ on the two paths in nothing that these have not
ON_CPU = [
    "PowerSGD",
    "PowerSGD, buckets",
    "PowerSGD+, auto",
    "PowerSGD+, SVD, bfloat16 wire",
    "bfloat16 memory, stochastic",
    "bfloat16 gradients",
    "EF21",
    "int8 factors",
]


def case(rank: int, on_accelerator: bool, folder: Path) -> dict[str, Figures]:
    found = {}
    with contextlib.ExitStack() as stack:
        if on_accelerator:
            stack.enter_context(accelerator_path())
        for name in SETTINGS if on_accelerator else ON_CPU:
            compressor, options = SETTINGS[name]
            found[name] = plain(SHAPES, compressor, str(folder / name), **options)
    return found


@pytest.fixture(scope="module")
def found(
    gloo: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Figures]]]:
    """Path -> by rank."""
    return {
        path: gloo.run(case, 2, path == "accelerator", tmp_path_factory.mktemp(path), timeout=180)
        for path in ("cpu", "accelerator")
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [*(("cpu", name) for name in ON_CPU), *(("accelerator", name) for name in SETTINGS)],
)
def test_a_rank_holds_what_the_plan_says(
    found: dict[str, list[dict[str, Figures]]], path: str, name: str
) -> None:
    for rank, figures in enumerate(one[name] for one in found[path]):
        assert figures.keys() == {"step", "restart", "save", "load"}
        for phase, (measured, planned) in figures.items():
            assert planned == pytest.approx(measured, rel=CLOSE, abs=APART.get(phase, TEXTS)), (
                rank,
                phase,
            )


class _OfTwo(PretendedGroup):
    """Two workers, of whom the other one would wait for a collective for ever."""

    def start(self, exchanges: Any) -> list[Any]:
        raise AssertionError("a rehearsal has no collectives")


def test_nothing_else_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    """A rehearsal of a compressor that is not linear, whose save warns."""
    slots = [ParamInfo("w", (64, 48), torch.float32, torch.device("cpu"))]
    random, reducer = torch.get_rng_state(), Reducer(slots, PowerSGD(4), _OfTwo(2, 0), **CODES)
    with caplog.at_level(logging.INFO):
        assert reducer.plan.needs.save > 0
    assert not caplog.messages
    assert torch.equal(random, torch.get_rng_state())
    assert (reducer.step, reducer.ledger.collectives) == (0, 0)
    assert not any(error.is_meta for error in reducer.state.error_memory().values())
    assert not on_accelerator(torch.device("cpu"))


# which make the mean of errors inexact
CODES: dict[str, Any] = {"quantization": Quantization(factors="int8"), "min_compression_rate": 0}


def test_a_plan_is_the_same_anywhere_and_can_be_sent() -> None:
    plan = _optimizer(PowerSGDPlus(4)).plan
    with torch.inference_mode():
        needs = _optimizer(PowerSGDPlus(4)).plan.needs
    assert needs == plan.needs == pickle.loads(pickle.dumps(plan)).needs


def test_other_threads_go_on_with_numbers() -> None:
    """While one rehearses, which takes torch's modes of its own thread only."""
    given = torch.randn(1, 30, 20, generator=torch.Generator().manual_seed(1))
    expected, found = leading_left_singular_vectors(given, 2), []
    with ShapesOnly(), as_if_on_accelerator(True):
        leading_left_singular_vectors(torch.empty(1, 30, 20), 2)
        thread = threading.Thread(
            target=lambda: found.append(
                (leading_left_singular_vectors(given, 2), on_accelerator(given.device))
            )
        )
        thread.start()
        thread.join()
    assert torch.equal(found[0][0], expected)
    assert not found[0][1]


def _optimizer(compressor: Compressor) -> CompressedOptimizer:
    model = nn.ParameterList([torch.zeros(64, 48), torch.zeros(48)])
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    return CompressedOptimizer(base, compressor, min_compression_rate=0)


class _Reads(PowerSGD):
    """Reads numbers otherwise than by a request."""

    def step(self, delta: Delta, state: State, context: Context) -> Any:
        mean, _ = yield Mean(delta.tensor)
        return mean[mean > 0]


def test_what_cannot_be_rehearsed_is_said() -> None:
    told = str(_optimizer(_Reads(4)).plan)
    assert "memory on this worker: error memory 12.29 kB; what a step needs beside is not" in told


def test_the_plan_tells_memory_and_where_it_is() -> None:
    model = nn.ParameterList([torch.zeros(60, 50)])

    def told(**options: Any) -> tuple[str, int]:
        base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        plan = CompressedOptimizer(base, PowerSGD(4), **options).plan
        line = next(one for one in str(plan).splitlines() if "memory on this" in one)
        return line, max(plan.needs.step, plan.needs.restart, plan.needs.save, plan.needs.load)

    line, most = told()
    assert line.startswith("  memory on this worker: error memory 12.00 kB; beside it ")
    assert line.endswith(f" in a load; in all {human_bytes(12_000 + most)} of this library's")
    assert "restarts" not in line
    with accelerator_path():
        line, most = told(error_feedback=ErrorFeedback(offload=True))
    assert "error memory 12.00 kB (on the host); beside it " in line
    # of the device's memory, so without it
    assert line.endswith(f"; on the device {human_bytes(most)} of this library's")


def test_an_llm_on_the_meta_device_is_as_on_an_accelerator() -> None:
    """Two matrices of a shape and one more hold Delta and little beside."""
    reducer = Reducer(llama_3_8b()[:12], PowerSGDPlus(4), Group())
    needs, errors = reducer.plan.needs, reducer.plan.error_bytes
    assert errors < needs.step < 1.01 * errors
    assert errors < needs.restart < 1.02 * errors
    assert needs.between < 0.01 * errors


def test_gradients_are_not_cloned() -> None:
    """An ordinary step holds Delta and little beside; where gradients are of another
    dtype, 64 MB of decoded ones, whatever the size of the model.
    """
    for dtype in (torch.float32, torch.bfloat16):
        slots = [ParamInfo(str(k), (4096, 4096), dtype, torch.device("meta")) for k in range(8)]
        plan = Reducer(slots, PowerSGD(4), Group()).plan
        assert plan.needs.step < 1.01 * plan.error_bytes + 2 * 4 * DECODED
