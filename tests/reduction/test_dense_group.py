"""What does not go low-rank: dense, as codes, or (an embedding) row by row; its bytes,
and what the plan says.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGD, Rule
from lowrank_comm.communication import Group
from lowrank_comm.numerics.quantization import FORMATS, Quantization
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODEL = {
    "embed": (300, 40),
    "a": (80, 64),
    "b": (64, 80),
    "norm": (512,),
    "bias": (64,),
    "scale": (),
}
DENSE = ("embed", "norm", "bias", "scale")


def dense_embedding(**more: Any) -> Simulation:
    return Simulation(
        MODEL, PowerSGD(rank=2), 2, rules=(Rule("embed", min_compression_rate=1e9),), **more
    )


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
    # 49 blocks are shares of 25 and 24
    for sim, filling in ((plain, 0), (coded, 260)):
        plan = sim.reducers[0].plan
        control = bytes_of[sim]["control"]
        assert plan.step_bytes == sum(bytes_of[sim].values()) - control
        assert plan.uncompressed_bytes == full
        assert sim.last_reports[0].ratio == full / (sum(bytes_of[sim].values()) + filling)
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


def test_the_plan_knows_what_factors_were_before_codes() -> None:
    plain = dense_embedding().reducers[0].plan
    coded = (
        dense_embedding(quantization=Quantization(factors="int8", dense="int8")).reducers[0].plan
    )
    assert sum(row.plain_bytes for row in coded.rows) == plain.step_bytes


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


def test_llama_3_8b() -> None:
    """From the shapes alone, on the meta device: 7.6x with dense embeddings, though the
    matrices have 666x.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (128_256, 4096),
        "lm_head": (128_256, 4096),
        "norm": (4096,),
    }
    block = {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "o": (4096, 4096),
        "gate": (14_336, 4096),
    }
    block |= {"up": (14_336, 4096), "down": (4096, 14_336), "norm_1": (4096,), "norm_2": (4096,)}
    shapes |= {f"{k}.{name}": shape for k in range(32) for name, shape in block.items()}
    slots = [
        ParamInfo(name, shape, torch.float32, torch.device("meta"))
        for name, shape in shapes.items()
    ]
    ratios = {}
    for treatment in ("dense", "int8", "sign", "low_rank"):
        rules = (Rule("embed", treatment=treatment), Rule("lm_head", treatment=treatment))
        plan = Reducer(slots, PowerSGD(rank=4), Group(), rules=rules).plan
        ratios[treatment] = plan.uncompressed_bytes / plan.step_bytes
    assert sum(slot.numel for slot in slots) == 8_030_261_248
    assert ratios == pytest.approx(
        {"dense": 7.566, "int8": 28.92, "sign": 180.0, "low_rank": 679.9}, rel=1e-3
    )


# --- row by row ------------------------------------------------------------------------------------------------------

V, D = 40, 6


def by_rows(workers: int, rows: int = V, copies: int = 1, wire: str | None = None) -> Simulation:
    shapes = {f"embed_{k}": (rows, D) for k in range(copies)}
    rules = (Rule("embed*", treatment="row_sparse"),)
    return Simulation(
        shapes, PowerSGD(), workers, dtype=torch.float64, rules=rules, wire_dtype=wire
    )


def touching(rows: list[int], seed: int, size: int = V) -> Tensor:
    """A gradient of these rows; of a row that is named twice, the sum."""
    ids = torch.tensor(rows, dtype=torch.long)
    return torch.zeros(size, D, dtype=torch.float64).index_add_(
        0, ids, normal(len(rows), D, seed=seed)
    )


@pytest.mark.parametrize(
    ("touched", "sent"),
    [
        # the union over the workers; not 4, and not each worker's own
        ([[3, 7], [7, 39]], 3),
        ([[3, 3, 3], [3]], 1),
        ([[], [0, 5]], 2),
        # 2 N k = m: still row by row
        ([list(range(10)), list(range(10, 20))], 20),
        # 2 N k > m, though the union is of few rows
        ([list(range(11)), [0]], None),
        ([[], []], 0),
    ],
    ids=["union", "duplicates", "one worker", "half", "above half", "none"],
)
def test_rows_that_were_touched_travel_and_no_others(
    touched: list[list[int]], sent: int | None
) -> None:
    gradients = [touching(rows, seed) for seed, rows in enumerate(touched)]
    sim = by_rows(2)
    out = sim.reduce([{"embed_0": g} for g in gradients])["embed_0"]
    torch.testing.assert_close(out, (gradients[0] + gradients[1]) / 2, rtol=1e-15, atol=1e-16)
    k = max(len(set(rows)) for rows in touched)
    bytes_of = sim.last_reports[0].bytes
    assert bytes_of.get("dense", 0) == 8 * D * (V if sent is None else sent)
    assert bytes_of["rows"] == 4 * (1 if sent is None else 1 + k)
    assert sim.error_memory(0) == {}


def test_several_embeddings_each_have_a_union_of_their_own() -> None:
    """Of one shape, thus of one batch; and on a narrow wire, what was rounded is as for
    a dense parameter.
    """
    sim = by_rows(3, rows=60, copies=2)
    given = [
        {f"embed_{k}": touching([worker, 10 * k + 7], 5 * worker + k, 60) for k in range(2)}
        for worker in range(3)
    ]
    out = sim.reduce(given)
    for name in out:
        torch.testing.assert_close(
            out[name], sum(g[name] for g in given) / 3, rtol=1e-14, atol=1e-15
        )
    assert sim.last_reports[0].bytes["dense"] == 8 * D * 2 * 4
    narrow = by_rows(3, rows=60, copies=2, wire="bfloat16").reduce(given)
    assert all(torch.count_nonzero(narrow[name]) == torch.count_nonzero(out[name]) for name in out)
    assert all(torch.allclose(narrow[name], out[name], atol=0.03) for name in out)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [[4], list(range(30))], ids=["row by row", "dense"])
def test_a_row_that_is_not_finite_vetoes(bad: float, rows: list[int]) -> None:
    sim = by_rows(2)
    wrong = touching(rows, 0)
    wrong[4, 2] = bad
    assert sim.reduce([{"embed_0": touching([1], 1)}, {"embed_0": wrong}]) == {}
    assert sim.reducers[0].ledger.vetoed == 1
    assert sim.reduce([{"embed_0": touching([1], 1)}] * 2) != {}


def rows_over_gloo(rank: int) -> tuple[Any, dict[str, int]]:
    embedding = torch.nn.Parameter(torch.zeros(V, D, dtype=torch.float64))
    base = torch.optim.SGD([("embed_0", embedding)], lr=0.0)
    optimizer = CompressedOptimizer(
        base, PowerSGD(), rules=(Rule("embed*", treatment="row_sparse"),)
    )
    embedding.grad = touching([rank, 9], rank)
    optimizer.step()
    return embedding.grad.numpy().copy(), dict(optimizer.ledger.bytes)


def test_row_by_row_over_gloo(gloo: GlooPool) -> None:
    sim = by_rows(3)
    out = sim.reduce([{"embed_0": touching([rank, 9], rank)} for rank in range(3)])[
        "embed_0"
    ].numpy()
    for applied, sent in gloo.run(rows_over_gloo, 3):
        assert abs(applied - out).max() < 1e-15
        assert {kind: n for kind, n in sent.items() if kind != "fingerprint"} == dict(
            sim.reducers[0].ledger.bytes
        )


def test_row_by_row_needs_rows() -> None:
    with pytest.raises(ConfigError, match=r"rule 'b'.*row_sparse.*shape \(5,\)"):
        Simulation({"b": (5,)}, PowerSGD(2), 2, rules=[Rule("b", treatment="row_sparse")])
