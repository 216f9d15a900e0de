"""Two levels under DeepSpeed, against DeepSpeed itself and against the simulation: two
nodes of two gloo processes.

As in test_deepspeed.py, the processes run every case of deepspeed_levels.py once, and
the tests look at one case each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch

from tests.support.deepspeed_found import Found, Look, everything_found, looking_into

pytest.importorskip("deepspeed")
from tests.support import deepspeed_levels as levels
from tests.support import deepspeed_toy as toy

pytestmark = pytest.mark.slow

STAGES = range(4)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Everything that the four processes found."""
    folder = tmp_path_factory.mktemp("deepspeed_levels")
    with everything_found(levels.run, levels.WORLD, folder, 550) as found:
        yield found


@pytest.fixture
def look(results: Found) -> Look:
    """`look(case)`: its values by rank."""
    return looking_into(results)


@functools.cache
def simulated(gas: int, scope: str) -> list[list[float]]:
    return levels.simulated(gas, scope)


def whole(blocks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Parameters of a node from the blocks of its ranks."""
    return {name: torch.cat([rank[name] for rank in blocks]) for name in blocks[0]}


# --- the same training ---


@pytest.mark.timeout(570)
@pytest.mark.shows(
    "full rank", "accumulation", "clipping", "AdamW", engine="DeepSpeed ZeRO-{stage}, two levels"
)
@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_full_rank_is_deepspeeds_own_training(look: Look, stage: int, gas: int) -> None:
    for found in look(f"parity {stage} {gas}"):
        assert found["losses"] < 1e-5
        assert found["moved"] > 1e-2
        ours, theirs = found["norms"]
        # stage 0 in fp32 does not tell its norm
        if stage > 0:
            assert ours > toy.CLIP, "clipping must be at work"
            assert math.isclose(ours, theirs, rel_tol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_with_a_secondary_partition_inside_the_node(
    look: Look, dtype: str, tolerance: float
) -> None:
    for found in look(f"hpz {dtype}"):
        assert found["hpz"] == levels.F
        assert found["losses"] < tolerance
        assert found["moved"] > 1e-2


def test_all_ranks_in_one_node(look: Look) -> None:
    for found in look("one node"):
        assert found["losses"] < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_matrix_that_one_rank_of_one_node_uses(look: Look, stage: int) -> None:
    for found in look(f"some users {stage}"):
        assert found["parameters"] < 1e-5
        assert found["moved"] > 1e-4


RUNS = [f"{stage} {scope} {gas}" for stage in STAGES for scope in levels.SCOPES for gas in (1, 3)]


@pytest.mark.shows("rank r = simulation", engine="DeepSpeed ZeRO-{case[0]}, two levels")
@pytest.mark.parametrize("case", RUNS)
def test_rank_2_gives_the_losses_of_the_simulation_and_equal_parameters(
    look: Look, case: str
) -> None:
    _, scope, gas = case.split()
    found = look(f"rank 2 {case}")
    for rank, expected in zip(found, simulated(int(gas), scope), strict=True):
        assert toy.gap(rank["losses"], expected) < 1e-4
        assert toy.gap(rank["parameters"], found[0]["parameters"]) == 0.0
        assert rank["largest"] > 1e-3


@pytest.mark.parametrize("gas", [1, 3])
def test_the_scopes_differ(gas: int) -> None:
    assert toy.gap(simulated(gas, "shard"), simulated(gas, "matrix")) > 1e-3


# --- memory and bytes ---


@pytest.mark.parametrize("case", RUNS)
def test_error_memory_is_divided_by_the_ranks_of_a_node(look: Look, case: str) -> None:
    found = look(f"rank 2 {case}")
    for first in (0, 2):
        blocks = [rank["errors"] for rank in found[first : first + 2]]
        for name, p in toy.seeded_toy().named_parameters():
            if p.dim() == 2:
                half = -(-p.shape[0] // 2)
                assert [block[name] for block in blocks] == [
                    (half, p.shape[1]),
                    (p.shape[0] - half, p.shape[1]),
                ]


@pytest.mark.shows("bytes = formula", engine="DeepSpeed ZeRO-{case[0]}, two levels")
@pytest.mark.parametrize("case", RUNS)
def test_the_ranks_of_a_node_send_what_the_plan_says(look: Look, case: str) -> None:
    found = look(f"rank 2 {case}")
    for first in (0, 2):
        ordinary = 0
        for steps in zip(*(rank["reports"] for rank in found[first : first + 2]), strict=True):
            if any(restarts for restarts, _, _ in steps):
                continue
            ordinary += 1
            sent = sum(
                size
                for _, by_kind, _ in steps
                for kind, size in by_kind.items()
                if kind != "control"
            )
            assert sent == found[0]["step bytes"]
            for _, by_kind, inside in steps:
                assert 0 < by_kind["control"] < 200
                assert inside["gradients"] > 0
        assert ordinary >= 5


# --- steps that do not count ---

VETOES = [f"{stage} {dtype}" for stage in STAGES for dtype in ("fp32", "bf16")]
VETOES += [f"{stage} {what}" for stage in (1, 3) for what in ("fp16", "bf16 fp32")]


@pytest.mark.shows("NaN on one rank", engine="DeepSpeed ZeRO-{case[0]}, two levels")
@pytest.mark.shows("bf16", when="bf16", engine="DeepSpeed ZeRO-{case[0]}, two levels")
@pytest.mark.shows("fp16 + scaler", when="fp16", engine="DeepSpeed ZeRO-{case[0]}, two levels")
@pytest.mark.parametrize("case", VETOES)
def test_nan_on_one_rank_skips_the_step_on_all_nodes_and_leaves_no_trace(
    look: Look, case: str
) -> None:
    for found in look(f"veto {case}"):
        # parameters, error memory, bases, step counter: bit-equal
        assert found["changed"] == 0.0
        assert not found["applied"]
        assert found["skipped"] == 1
        assert found["scheduled"] == 5
        assert found["moved"] > 1e-3
        assert max(found["later"], found["final"]) < (1e-5 if "fp16" in case else 1e-30)


@pytest.mark.parametrize("scope", levels.SCOPES)
@pytest.mark.parametrize("stage", STAGES)
def test_one_nan_in_the_rows_of_another_rank_is_enough(look: Look, stage: int, scope: str) -> None:
    for found in look(f"one element {stage} {scope}"):
        assert found == {"changed": 0.0, "skipped": 1, "steps": 3, "vetoed": 1, "nan": []}


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_grad_instead_of_a_step_drops_the_pass(look: Look, stage: int) -> None:
    for found in look(f"dropped pass {stage}"):
        assert found == {"changed": 0.0, "parameters": 0.0}


@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_that_only_deepspeed_finds_rolls_the_pass_back(look: Look, stage: int) -> None:
    for found in look(f"late overflow {stage}"):
        expected = {
            "changed": 0.0,
            "applied": False,
            "skipped": 1,
            "scale fell": True,
            "vetoed": 0,
            "steps": 4,
        }
        assert found == expected


# --- checkpoints ---


@pytest.mark.shows("checkpoint", engine="DeepSpeed ZeRO-{stage}, two levels")
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_of_one_and_two_levels(look: Look, stage: int) -> None:
    found = look(f"checkpoints {stage}")
    saved = whole([rank["saved"] for rank in found[:2]])
    back = whole([rank["and back"] for rank in found[:2]])
    assert max(float(error.abs().max()) for error in saved.values()) > 1e-3
    for rank, one in enumerate(found):
        assert one["step"] == 4
        assert one["resumed"] == one["state"] == 0.0
        assert toy.gap(one["by one level"], saved) == 0.0
        assert toy.gap(one["saved by one level"], back) == 0.0
        # the mean of both nodes
        assert toy.gap(one["saved"], found[rank % 2]["saved"]) == 0.0
        assert toy.gap(one["and back"], found[rank % 2]["and back"]) == 0.0
        assert one["step back"] == 8
        assert all(map(math.isfinite, one["goes on"]))


def test_what_ef21_keeps_goes_on_in_other_blocks(look: Look) -> None:
    """y and the mean v of both nodes, whole; `last.weight` has five rows, of which the
    fourth rank of four has none.
    """
    found = look("EF21 in other blocks")
    one = found[0][1]
    for key in one:
        kept, in_four = (
            [rank[size][key] for rank in found if key in rank[size]]
            for size in (levels.F, levels.WORLD)
        )
        assert len(in_four) == (3 if key.startswith("last") else 4)
        assert all(torch.equal(rank[1][key], one[key]) for rank in found)
        if key.endswith("v_started"):
            assert all(bool(flag.all()) == ("sometimes" not in key) for flag in kept + in_four)
            continue
        assert bool(one[key].any()) == ("sometimes" not in key)
        assert torch.equal(torch.cat(in_four), one[key])
        means = torch.cat([(kept[k] + kept[k + levels.F]) / 2 for k in range(levels.F)])
        torch.testing.assert_close(one[key], means)
        # v is each node's own
        assert torch.equal(kept[0], kept[levels.F]) == (key.endswith("y") or "sometimes" in key)


# --- who is a node ---

WRONG = {
    "no divisor": ["lowrank_comm.topology.shard_size=3", "choose a divisor of 4"],
    "node without a launcher": [
        'lowrank_comm.topology.shard_size="node"',
        "LOCAL_WORLD_SIZE",
        "rank 0 has no number there",
    ],
    "node, one rank not told": [
        'lowrank_comm.topology.shard_size="node"',
        "rank 3 has no number there",
        "give the number",
    ],
    "node, no number": ['lowrank_comm.topology.shard_size="node"', "rank 0 has no number there"],
    "no whole node": [
        'lowrank_comm.topology.shard_size="node"',
        "3 ranks were started on each node",
        "(0, 1, 2, 3)",
    ],
    "nodes that differ": [
        'lowrank_comm.topology.shard_size="node"',
        "2 ranks on the node of rank 0 and 1 on that of rank 2",
    ],
}


@pytest.mark.parametrize("case", WRONG)
def test_sizes_that_cannot_be_are_refused_on_all_ranks(look: Look, case: str) -> None:
    assert WRONG.keys() == levels.SIZES.keys()
    for found in look("sizes"):
        assert found[case].startswith("ConfigError: ")
        for words in WRONG[case]:
            assert words in found[case]


def test_the_plan_tells_of_both_levels(look: Look) -> None:
    for found in look("sizes"):
        for words in (
            "over 2 nodes of 2 ranks, DeepSpeed",
            "ZeRO stage 1",
            "1/2 of the error memory",
            "inside a node",
        ):
            assert words in found["node"]
        assert "hint" not in found["node"]
        assert found["node, by deepspeed"] == found["node"]
        assert "over 4 workers, DeepSpeed" in found["hint"]
        assert found["hint"].count("hint: 2 ranks share a node here") == 1


def test_ranks_with_other_models_all_raise(look: Look) -> None:
    for found in look("other models"):
        assert found.startswith("ConfigMismatchError: ")
        assert "second.weight" in found


def test_a_device_mesh_of_deepspeeds_own(look: Look) -> None:
    for found in look("mesh"):
        assert found["losses"] < 1e-5
        assert found["who"] == (2, 2)


def test_an_engine_that_only_some_ranks_have(look: Look) -> None:
    for rank, found in enumerate(look("part of the world")):
        if rank != 1:
            assert found["node"] == ([0, 2, 3].index(rank), 3)
            assert found["workers"] == 1
            assert found["losses"] < 1e-5
            assert "shard_size=2: 3 data-parallel ranks cannot be cut" in found["no divisor"]
        if rank != 0:
            assert "lowrank_comm.topology.shard_size" in found["uneven"]
            assert "only where all are in equally many" in found["uneven"]


@pytest.mark.parametrize("stage", range(3))
def test_a_bit_that_flips_on_one_rank_is_told_on_all_or_mended(look: Look, stage: int) -> None:
    for found in look(f"flipped {stage} error"):
        assert "the parameter first.weight on rank 2 (not on 0, 1, 3)" in found["told"]
        assert not found["moved"]
    mended = look(f"flipped {stage} resync")
    for found in mended:
        assert found["told"] == ""
        assert found["step"] == 6
        for name, p in found["parameters"].items():
            assert torch.equal(p, mended[0]["parameters"][name])
    assert "parameters of rank 0 go to the others" in mended[0]["log"]
