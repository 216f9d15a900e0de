"""Which compressor a parameter has: by rules, by size, and for what is sent whole."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lowrank_comm import PowerSGD, Rule
from lowrank_comm.numerics.quantization import FORMATS, Quantization
from lowrank_comm.simulation import Simulation
from tests.support.dense_model import MODEL, dense_embedding
from tests.support.matrices import drawn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(t: int, worker: int) -> dict[str, Tensor]:
    return {
        name: normal(*shape, seed=100 * t + 10 * worker + k).float()
        for k, (name, shape) in enumerate(MODEL.items())
    }


def test_dense_as_int8() -> None:
    """12 000 and 512 numbers in blocks of 256: a quarter; few numbers, which would
    grow, stay as they are.
    """
    plain, coded = dense_embedding(), dense_embedding(quantization=Quantization(dense="int8"))
    for sim in (plain, coded):
        sim.reduce([given(0, k) for k in range(2)])
    bytes_of = {sim: sim.last_reports[0].bytes for sim in (plain, coded)}
    few = 4 * (64 + 1)
    assert bytes_of[plain]["dense"] == 4 * (12_000 + 512) + few
    assert bytes_of[coded]["dense"] == (47 + 2) * 260 + few
    low = 4 * 2 * 2 * (80 + 64)
    assert bytes_of[coded]["factors"] == bytes_of[plain]["factors"] == low
    assert 3.8 < bytes_of[plain]["dense"] / bytes_of[coded]["dense"] < 4
    assert set(coded.error_memory(0)) == {"a", "b", "embed", "norm"}
    assert set(plain.error_memory(0)) == {"a", "b"}
    full = sum(4 * torch.Size(shape).numel() for shape in MODEL.values())
    for sim in (plain, coded):
        plan = sim.reducers[0].plan
        control = bytes_of[sim]["control"]
        assert plan.step_bytes == sum(bytes_of[sim].values()) - control
        assert plan.uncompressed_bytes == full
        assert sim.last_reports[0].ratio == full / sum(bytes_of[sim].values())
    ledgers = [sim.reducers[0].ledger for sim in (plain, coded)]
    assert (
        ledgers[1].ratio_without_codes
        == ledgers[0].ratio_without_codes
        == ledgers[0].ratio
        < ledgers[1].ratio
    )
    text = str(coded.reducers[0].plan)
    before, after = (full / sim.reducers[0].plan.step_bytes for sim in (plain, coded))
    assert f"an ordinary step ({after:.1f}x)" in text
    assert re.search(rf"without codes it would be [\d.]+ kB \({before:.1f}x\)", text)
    assert "without codes" not in str(plain.reducers[0].plan)


@pytest.mark.parametrize("treatment", ["int8", "int4", "sign", "dense", "row_sparse", "low_rank"])
def test_an_embedding_by_rule(treatment: str) -> None:
    """A rule wins over `quantization.dense`; codes and low rank have an error memory,
    the exact ways have none.
    """
    sim = Simulation(
        MODEL,
        PowerSGD(rank=2),
        2,
        rules=(Rule("embed", treatment=treatment),),
        quantization=Quantization(dense="sign"),
    )
    kept, exact = treatment not in ("dense", "row_sparse"), treatment in ("dense", "row_sparse")
    assert ("embed" in sim.error_memory(0)) == kept
    out = sim.reduce([given(0, k) for k in range(2)])["embed"]
    mean = (given(0, 0)["embed"] + given(0, 1)["embed"]) / 2
    assert torch.allclose(out, mean, atol=1e-6) == exact
    if kept:
        error = (sim.error_memory(0)["embed"] + sim.error_memory(1)["embed"]) / 2
        torch.testing.assert_close(out + error, mean, rtol=1e-5, atol=1e-5)
    row = {row.name: row for row in sim.reducers[0].plan.rows}["embed"]
    assert row.scheme == treatment
    assert "rule 'embed'" in row.reason or treatment == "low_rank"
    if treatment in FORMATS:
        assert row.bytes == FORMATS[treatment].bytes(12_000)


def test_what_is_not_worth_compressing_goes_dense() -> None:
    """A matrix is compressed when m n / (r (m + n)) > min_compression_rate; vectors and
    scalars never are. What goes dense has no error.
    """
    shapes = {
        "row": (1, 40),
        "column": (40, 1),
        "edge": (16, 16),
        "big": (17, 16),
        "vector": (64,),
        "scalar": (),
        "filter": (16, 4, 3, 3),
    }
    # 16 x 16 at rank 4: exactly 2, not more
    sim = Simulation(shapes, PowerSGD(4), 2, dtype=torch.float64)
    assert set(sim.error_memory(0)) == {"big", "filter"}
    for t in range(3):
        gradients = [drawn(t, worker, shapes) for worker in range(2)]
        applied = sim.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
        for name in shapes:
            distance = float((applied[name] - (gradients[0][name] + gradients[1][name]) / 2).norm())
            assert (distance > 1e-3) if name in ("big", "filter") else (distance < 1e-14), name
