"""The plan: sizes before and after, ranks, and what it tells."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import PowerSGD, Rule
from lowrank_comm.communication import Group
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.dense_model import dense_embedding
from tests.support.driver import simulation


def test_the_plan_knows_what_factors_were_before_codes() -> None:
    plain = dense_embedding().reducers[0].plan
    coded = (
        dense_embedding(quantization=Quantization(factors="int8", dense="int8")).reducers[0].plan
    )
    assert sum(row.plain_bytes for row in coded.rows) == plain.step_bytes


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


def test_rank_is_cut_and_the_plan_says_so() -> None:
    sim = simulation(PowerSGD(10), {"small": (5, 8), "large": (30, 20)})
    rows = {row.name: row for row in sim.reducers[0].plan.rows}
    assert (rows["small"].rank, rows["large"].rank) == (5, 10)
    assert rows["small"].reason == "rank 10 cut to 5"
    assert rows["large"].reason == ""
    assert "cut to min(m, n) for 1 of" in str(sim.reducers[0].plan)
