"""The DeepSpeed adapter against DeepSpeed itself and against the simulation, on two
gloo processes.

The processes run every case of deepspeed_worker.py once; the tests look at one case
each. What `moved` and the like guard against is a test that would also pass if nothing
had happened.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.deepspeed_found import Found, Look, everything_found, looking_into
from tests.support.gloo import GlooPool

pytest.importorskip("deepspeed")
from tests.support import deepspeed_cases
from tests.support import deepspeed_toy as toy
from tests.support import deepspeed_worker as worker

pytestmark = pytest.mark.slow

STAGES = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases save."""
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[Found]:
    """Everything that the two processes found."""
    with everything_found(worker.run, toy.WORLD, folder, 700) as found:
        yield found


@pytest.fixture
def look(results: Found) -> Look:
    """`look(case)`: its values by rank."""
    return looking_into(results)


@pytest.mark.timeout(720)
def test_the_processes_ran_every_case(results: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    for found in results.values():
        assert list(found) == list(worker.cases(str(tmp_path)))


# --- the same training ---


@pytest.mark.shows(
    "full rank", "accumulation", "clipping", "AdamW", engine="DeepSpeed ZeRO-{stage}"
)
@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_full_rank_is_the_uncompressed_engine(look: Look, stage: int, gas: int) -> None:
    for found in look(f"parity {stage} {gas}"):
        assert found["adamw"]["losses"] < 1e-5
        assert found["sgd"]["parameters"] < 1e-5
        # stage 0 in fp32 does not tell its norm
        if stage > 0:
            ours, theirs = found["norms"]
            assert ours > toy.CLIP, "clipping must be at work"
            assert math.isclose(ours, theirs, rel_tol=1e-5)


@functools.cache
def simulated(gas: int) -> list[list[float]]:
    return deepspeed_cases.simulated(gas)


@pytest.mark.shows("rank r = simulation", engine="DeepSpeed ZeRO-{stage}")
@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_rank_2_gives_the_losses_of_the_simulation(look: Look, stage: int, gas: int) -> None:
    expected = simulated(gas)
    for losses, of_worker in zip(look(f"rank 2 {stage} {gas}"), expected, strict=True):
        assert len(losses) == 20 * gas
        assert toy.gap(losses, of_worker) < 1e-4


@functools.cache
def simulated_algorithm(name: str) -> list[list[float]]:
    section = {**toy.RANK_2, **deepspeed_cases.ALGORITHMS[name]}
    return deepspeed_cases.simulated(1, section, steps=8)


@pytest.mark.parametrize("name", deepspeed_cases.ALGORITHMS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_algorithm_gives_the_losses_of_the_simulation(
    look: Look, stage: int, name: str
) -> None:
    for losses, of_worker in zip(
        look(f"algorithms {stage}"), simulated_algorithm(name), strict=True
    ):
        assert toy.gap(losses[name], of_worker) < 1e-4
    others = [
        simulated_algorithm(other)
        for other in deepspeed_cases.ALGORITHMS
        if other not in (name, "row_sparse")
    ]
    # the comparison can fail
    assert all(toy.gap(other[0], simulated_algorithm(name)[0]) > 1e-4 for other in others)


@pytest.mark.shows("bf16", when="bf16", engine="DeepSpeed ZeRO-{stage}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_hold_the_same_bits_after_50_steps(look: Look, stage: int, dtype: str) -> None:
    first, second = look(f"identical {stage} {dtype}")
    start = dict(toy.seeded_toy().named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in start)
    assert toy.gap(first["first.weight"], start["first.weight"].detach()) > 0.1


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        *(
            (f"{what} {stage}", 1e-5)
            for what in ("variant offload", "variant buckets", "variant overlap")
            for stage in (1, 2, 3)
        ),
        ("variant secondary partition", 1e-5),
        ("variant offload of parameters", 1e-5),
        ("variant round robin", 1e-5),
        # bfloat16 activations, and DeepSpeed's own reduction in bfloat16
        ("variant autocast", 1e-2),
    ],
)
def test_other_settings_of_deepspeed_train_the_same(
    look: Look, case: str, tolerance: float
) -> None:
    for found in look(case):
        assert found["losses"] < tolerance
        assert found["parameters"] < tolerance


@pytest.mark.parametrize("who", ["nobody", "rank 1"])
def test_fp32_accumulation_of_bfloat16_gradients_is_kept_at_every_stage(
    look: Look, who: str
) -> None:
    for found in look(f"float accumulation {who}"):
        kinds = {stage: value.pop("optimizer") for stage, value in found.items()}
        assert kinds[1] == "BF16_Optimizer"
        assert kinds[2] == "DeepSpeedZeroOptimizer"
        assert all(toy.gap(found[1], other) == 0.0 for other in found.values())


OWN_BOUNDARIES = [f"owned boundary {stage}" for stage in STAGES] + [
    f"own coalescing {stage}" for stage in (1, 2, 3)
]
OWN_BOUNDARIES += ["no_sync 0", "no_sync 1"]


@pytest.mark.parametrize("case", OWN_BOUNDARIES)
def test_boundaries_that_the_caller_owns(look: Look, case: str) -> None:
    for found in look(case):
        assert found["parameters"] < 1e-5
        assert found.get("passes", 4) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_loss_backward_is_as_good_as_engine_backward(look: Look, stage: int) -> None:
    for found in look(f"direct {stage}"):
        if stage == 0:
            # DeepSpeed's own words
            assert "engine.backward(loss)" in found["refused"]
        else:
            assert found == {"losses": 0.0}


# --- which parameters ---


USERS = [
    f"{stage} {who}"
    for stage in STAGES
    for who in deepspeed_cases.USERS
    if (stage, who) != (3, "rank 1")
]


@pytest.mark.parametrize("case", USERS)
def test_a_matrix_that_only_some_ranks_use(look: Look, case: str) -> None:
    for found in look(f"detour {case}"):
        assert found["parameters"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_missing_on_one_rank(look: Look, stage: int) -> None:
    for found in look(f"dropped {stage}"):
        assert found["parameters"] < 1e-5
        assert found["moved"] > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_that_calls_backward_within_backward(
    look: Look, stage: int
) -> None:
    for found in look(f"recomputed {stage}"):
        assert found["parameters"] < 1e-5
        assert found["moved"] > 1e-3


def test_a_model_that_was_built_partitioned(look: Look) -> None:
    for found in look("partitioned from birth"):
        assert found["parameters"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_tied_parameters(look: Look, stage: int) -> None:
    for found in look(f"frozen and tied {stage}"):
        assert found["parameters"] < 1e-5
        assert found["names"] == [
            "first.weight",
            "first.bias",
            "sometimes.weight",
            "last.weight",
            "last.bias",
        ]


# --- steps that do not count ---

VETOES = [f"{stage} {dtype}" for stage in STAGES for dtype in toy.DTYPES] + [
    f"{stage} bf16 fp32" for stage in (1, 2, 3)
]


@pytest.mark.shows("NaN on one rank", engine="DeepSpeed ZeRO-{case[0]}")
@pytest.mark.parametrize("case", VETOES)
def test_nan_on_one_rank_skips_the_step_everywhere_and_leaves_no_trace(
    look: Look, case: str
) -> None:
    for found in look(f"veto {case}"):
        # parameters, error memory, bases, step counter: bit-equal
        assert found["changed"] == 0.0
        assert not found["applied"]
        assert found["skipped"] == 1
        # six steps, one skipped
        assert found["scheduled"] == 5
        assert found["moved"] > 1e-3
        if "fp16" not in case:
            assert found["later"] == found["final"] == 0.0
        elif case != "0 fp16":
            # the skip lowered the loss scale, so the smallest gradients round otherwise
            assert max(found["later"], found["final"]) < 1e-5
        # At stage 0 this DeepSpeed divides by a loss scale that it never multiplied by.


@pytest.mark.parametrize("stage", STAGES)
def test_skipped_steps_are_told_and_end_the_run_on_all_ranks(look: Look, stage: int) -> None:
    for rank, found in enumerate(look(f"stuck {stage}")):
        whose = "on rank 1 the gradient of " if rank == 1 else "a gradient (with the error memory)"
        for count, lines in ((1, found["one"]), (3, found["said"])):
            assert len(lines) == count
            for k, line in enumerate(lines, start=1):
                assert f"is skipped on all workers ({k} in a row): {whose}" in line
        # the third in a row
        assert found["at"] == 6
        assert found["ended"].startswith("LowRankCommError: ")
        assert "3 times in a row (max_vetoes=3): on rank 1 the gradient of " in found["ended"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_bit_that_flips_on_one_rank_is_told_on_all(look: Look, stage: int) -> None:
    """Of two ranks none is a majority."""
    for found in look(f"flipped {stage}"):
        what = "the state P of " if stage == 3 else "the parameter first.weight on rank 0 against "
        assert found["told"].startswith("DivergenceError")
        assert "before call 4 of step() (check_every=2), ranks differ" in found["told"]
        assert what in found["told"]
        assert "No majority" in found["told"]
        assert not found["moved"]
        assert found["step"] == 3


@pytest.mark.parametrize("shard_size", [1, 2])
def test_a_gradient_of_what_was_frozen_at_first_is_told_on_all_ranks(
    look: Look, shard_size: int
) -> None:
    for told in look(f"unfrozen later {shard_size}"):
        assert told.startswith("LowRankCommError: ")
        assert "on rank 1 the gradient of sometimes.weight would not be averaged" in told


@pytest.mark.parametrize("stage", STAGES)
def test_a_layer_that_is_frozen_in_mid_run_moves_as_without_the_section(
    look: Look, stage: int
) -> None:
    for found in look(f"frozen midway {stage}"):
        if stage == 0:
            assert found["without"]["first.weight"] == found["with"]["first.weight"] == 0.0
        else:
            # DeepSpeed itself lets AdamW go on with its moments
            assert found["with"]["first.weight"] < 1.1 * found["without"]["first.weight"] + 1e-6
        assert found["error memory"] == 0.0
        assert found["with"]["last.weight"] > 1e-3


@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.shows("fp16 + scaler", engine="DeepSpeed ZeRO-{stage}")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_scale_that_is_too_high_comes_down_and_never_enters_the_error_memory(
    look: Look, stage: int
) -> None:
    for found in look(f"high scale {stage}"):
        applied, skipped, vetoed = found["counted"]
        assert applied + skipped == 20
        assert skipped == vetoed > 2
        # a gradient's size; the scale is above 10 000
        assert 0 < found["largest error"] < 10


@pytest.mark.parametrize(
    "case",
    [f"{stage} {what}" for stage in (1, 2, 3) for what in ("fp32 1", "fp32 2", "bf16 1", "fp16 1")],
)
def test_a_skipped_step_leaves_no_nan_behind_where_the_optimizer_is_on_the_cpu(
    look: Look, case: str
) -> None:
    """DeepSpeed keeps gradients there from step to step, and applies what it finds."""
    for found in look(f"offloaded veto {case}"):
        assert found == {"unused": (1, []), "used": (1, [])}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_matrix_without_a_gradient_does_not_get_its_last_one_again(
    look: Look, stage: int
) -> None:
    for found in look(f"unused later {stage}"):
        assert found["parameters"] < 1e-5


# --- mishaps ---


@pytest.mark.parametrize("whose", ["engine", "optimizer"])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_instead_of_a_step_drops_the_pass(look: Look, stage: int, whose: str) -> None:
    for found in look(f"dropped pass {stage} {whose}"):
        assert found == {"changed": 0.0, "parameters": 0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_between_micro_steps_is_told(look: Look, stage: int) -> None:
    for found in look(f"dropped micro-steps {stage}"):
        assert found["before"] == ""
        assert "zero_grad() between micro-steps drops" in found["said"]


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_after_a_step_is_not_told(look: Look, stage: int) -> None:
    assert look(f"zero_grad after own boundaries {stage}") == ["", ""]


def test_a_torch_optimizer_that_serves_two_engines(look: Look) -> None:
    for found in look("reused optimizer"):
        # what Accelerate asks for after the step, too
        assert found["skipped"] == (1, True, False)
        assert found["after"] is False
        assert found["nan"] == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_users_own_coalescing_and_then_ordinary_steps(look: Look, stage: int) -> None:
    for found in look(f"coalescing and plain {stage}"):
        assert found["parameters"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_after_the_parameters_had_their_step(look: Look, stage: int) -> None:
    for found in look(f"raising scheduler {stage}"):
        assert found == {"parameters": 0.0, "steps": 6}


def test_engines_that_only_some_ranks_have(look: Look) -> None:
    for found in look("engines of their own"):
        assert found == {"found": [(2, False), (2, True)]}


def test_a_part_of_the_model_that_is_called_module(look: Look) -> None:
    for found in look("a part called module"):
        assert found == ["module.weight", "weight"]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_of_other_runs(look: Look, stage: int) -> None:
    for found in look(f"other runs {stage}"):
        said, *client_state = found["loaded without the section"]
        assert "its error memory is lost" in said
        assert client_state == [7, False]
        assert found["weights only"] == 0
        said, step, largest = found["left by another run"]
        assert "was left there by another run, and is ignored" in said
        assert "was saved without compression" in said
        assert (step, largest) == (0, 0.0)
        assert found["after a second save that died"] == 0.0
        assert found["beside a universal one"] == 0.0
        assert "missing, and with it the error memory" in found["lost"]


# --- checkpoints ---


@pytest.mark.shows("checkpoint", engine="DeepSpeed ZeRO-{case[0]}")
@pytest.mark.parametrize("case", [*(f"{stage} fp32" for stage in STAGES), "1 bf16 fp32", "3 fp16"])
def test_a_resumed_run_goes_on_as_if_uninterrupted(look: Look, case: str) -> None:
    for found in look(f"resume {case}"):
        assert found["resumed"] == found["parameters"] == 0.0
        assert found["never saved"] < (1e-5 if "16" not in case else 2e-2)
        assert found["step"] == 4
        assert found["owed"] == ["sometimes.weight"]
        assert found["module only"] == 0
        (file,) = found["files"]
        assert re.fullmatch(r"lowrank_comm-4-[0-9a-f]{16}\.safetensors", file)


def test_one_process_resumes_what_two_have_saved(look: Look, folder: Path) -> None:
    """Every worker starts from the mean error of all, at any number of workers."""
    saved = [found["saved"] for found in look("resume 0 fp32")]
    pool = GlooPool(1)
    try:
        (found,) = pool.run(worker.alone, 1, str(folder))
    finally:
        pool.close()
    assert toy.gap(saved[0], saved[1]) == 0.0
    assert toy.gap(found["loaded"], saved[0]) == 0.0
    assert max(float(error.abs().max()) for error in saved[0]["errors"].values()) > 1e-3
    assert found["steps"] == 8
    assert all(map(math.isfinite, found["losses"]))


# --- bytes ---


@pytest.mark.shows("bytes = formula", engine="DeepSpeed ZeRO-{stage}")
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_sent_is_what_the_ledger_says_and_nothing_else(look: Look, stage: int) -> None:
    gradients = {"factors", "restart", "broadcast", "dense", "control"}
    for found in look(f"traffic {stage}"):
        for step, seen in enumerate(found["steps"]):
            # micro-steps only accumulate
            assert seen["early"] == []
            reductions = [one for one in seen["backward"] if one[0] in toy.REDUCTIONS]
            assert {name for name, _, _ in reductions} == {"all_reduce"}
            assert sum(size for _, _, size in reductions) == sum(
                seen["ledger"].get(kind, 0) for kind in gradients
            )
            assert len(reductions) == seen["collectives"] == 2
            # norm and overflow flag
            assert all(elements <= 2 for _, elements, _ in seen["step"])
            assert {kind: count for kind, count in seen["report"].items() if count} == {
                kind: count
                for kind, count in seen["ledger"].items()
                if count and kind != "fingerprint"
            }
            fingerprint = [
                size
                for name, _, size in seen["backward"]
                if name == "all_gather" and size in (8, 32)
            ]
            assert sum(fingerprint if step == 0 else []) == seen["ledger"].get("fingerprint", 0)
        matrices = sum(m * n for m, n in ((24, 12), (20, 24), (20, 20), (5, 20)))
        assert found["numel"] == matrices + 24 + 5
        # nobody has a gradient for it: its restart is sent once, and owed from then on
        unused = (20, 20, 2)
        for step, seen in enumerate(found["steps"]):
            sizes = [(24, 12, 2), (20, 24, 2), (5, 20, 2), *([unused] if step == 0 else [])]
            assert seen["ledger"]["dense"] == 4 * (24 + 5)
            if step % 3 == 0:
                assert seen["ledger"]["restart"] == 4 * sum(m * n for m, n, _ in sizes)
                assert seen["ledger"]["broadcast"] == 4 * sum(m * r for m, _, r in sizes)
            else:
                assert seen["ledger"]["factors"] == 4 * sum(r * (m + n) for m, n, r in sizes)


# --- refusals ---

REFUSED = {
    "unknown key": ["lowrank_comm.restart_evry", "did you mean 'restart_every'"],
    "rank": ["rank", "got 0"],
    "tau": ["lowrank_comm.restart_every=2.5"],
    "compressor": ["lowrank_comm.compressor='powersdg'", "did you mean 'powersgd'"],
    "shard_size": ["lowrank_comm.topology.shard_size=3", "choose a divisor of 2"],
    "no object": ["lowrank_comm must be an object"],
    "no JSON": ["lowrank_comm.wire_dtype=torch.bfloat16"],
    "misspelt section": [
        "'lowrank_com' in the DeepSpeed configuration is not a section",
        "did you mean 'lowrank_comm'",
    ],
    "zero_quantized_gradients": [
        "zero_optimization.zero_quantized_gradients=True",
        "Set it to false",
    ],
    "zenflow": ["zero_optimization.zenflow", "Remove the section"],
    "super_offload": ["zero_optimization.offload_optimizer.super_offload=True"],
    "deepcompile": ["compile.deepcompile=True"],
    "contiguous_gradients": ["zero_optimization.contiguous_gradients=False", "Set it to true"],
    "ignore_unused_parameters": [
        "zero_optimization.ignore_unused_parameters=False",
        "Set it to true",
    ],
    "check_grad_overflow": ["bf16.check_grad_overflow=False", "Set it to true"],
    "compute_grad_norm": ["zero_optimization.compute_grad_norm=False", "Set it to true"],
    "gradient_allreduce_op": ["gradient_allreduce_op='sum'", "mean"],
    "torch_autocast": ["torch_autocast.dtype='float16'", "bfloat16"],
    "hybrid_engine": ["hybrid_engine.enabled=True"],
    "autotp": ["tensor_parallel.autotp_size=2"],
    "sequence": ["sequence_parallel_size=2"],
    "muon": ["optimizer.type='muon'"],
    "expert_parallel": ["expert_parallel.enabled=True"],
    "node_local": ["checkpoint.use_node_local_storage=True"],
    "pipeline": ["model='PipelineModule'"],
    "mixture of experts": ["MoE"],
    "sparse": ["words.sparse=True", "sparse=False"],
    "client optimizer": ["CompressedOptimizer", 'section "lowrank_comm"'],
    "client optimizer, no section": ["CompressedOptimizer", 'section "lowrank_comm"'],
    "client callable": ["CompressedOptimizer", 'section "lowrank_comm"'],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_cannot_be_are_refused_by_name(look: Look, setting: str) -> None:
    for found in look("refusals"):
        assert found[setting].startswith("ConfigError: ")
        for words in REFUSED[setting]:
            assert words in found[setting]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("value", "lowrank_comm.rank: 2 on rank 0, 3 on rank 1"),
        ("absent", "section 'lowrank_comm': 'present' on rank 0, 'absent' on rank 1"),
        ("typo", "lowrank_comm.rnk: '(absent)' on rank 0, 3 on rank 1"),
    ],
)
def test_ranks_that_read_different_files_all_raise(look: Look, case: str, words: str) -> None:
    for found in look("mismatch"):
        assert found[case].startswith("ConfigMismatchError: ")
        assert words in found[case]


@pytest.mark.parametrize("stage", STAGES)
def test_calls_in_the_wrong_order_say_so(look: Look, stage: int) -> None:
    expected = {
        "second backward": "second backward at the accumulation boundary",
        "step without backward": "no backward did",
        "reduction of DeepSpeed's own": "about to average gradients by itself",
        "save between backward and step": "call engine.step() first",
    }
    if stage > 0:
        expected["hook"] = "about to average gradients by itself"
    for found in look(f"misuse {stage}"):
        assert found.keys() == expected.keys()
        for name, words in expected.items():
            assert words in found[name]


def test_an_engine_without_the_section_or_without_an_optimizer_is_left_alone(look: Look) -> None:
    for found in look("left alone"):
        assert found == {"no section": (None, [], False), "no optimizer": (None, [], False)}


def test_a_missing_private_name_is_reported_with_the_version() -> None:
    import deepspeed

    from lowrank_comm.errors import UnsupportedError
    from lowrank_comm.integrations._deepspeed import internals as seams

    class Engine:
        _take_model_step = None

    with pytest.raises(UnsupportedError) as raised:
        seams.check(
            Engine(), ("_take_model_step", "_flush_coalesced_reduction_zero3"), "the engine"
        )
    assert f"DeepSpeed {deepspeed.__version__} has no _flush_coalesced_reduction_zero3" in str(
        raised.value
    )
    assert f"tested with DeepSpeed {seams.TESTED}" in str(raised.value)
    assert "_take_model_step" not in str(raised.value)


# --- what is said ---


def test_what_deepspeed_compiles_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a host, if it is not there; and that a lock may be left over."""
    from lowrank_comm.integrations import deepspeed as adapter

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ops = {"deepspeed_shm_comm": True}
    monkeypatch.setattr(adapter.deepspeed.ops, "__compatible_ops__", ops)
    build = adapter._telling(lambda: "built")

    def said() -> str:
        assert build() == "built"
        return capsys.readouterr().out

    assert "skip_shm_extension()" in said()
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    assert "'lock' is there" in said()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert said() == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    (folder / "deepspeed_shm_comm.so").touch()
    assert said() == ""
    (folder / "deepspeed_shm_comm.so").unlink()
    adapter.skip_shm_extension()
    assert said() == ""


def test_experts_are_refused_by_name() -> None:
    from types import SimpleNamespace

    from lowrank_comm.integrations._deepspeed.unsupported import of_engine

    class ToyMoE(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = torch.nn.ModuleList([torch.nn.Linear(1, 1)])

    engine = SimpleNamespace(module=ToyMoE(), has_moe_layers=True)
    _, found, *_ = next(iter(of_engine(engine)))
    assert found == "MoE layers ToyMoE"
