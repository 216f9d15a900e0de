"""Hugging Face Trainer, really trained for fifty steps under each engine, with
clipping, accumulation and checkpoints; where compression at full rank is held against
none, number by number, for half as many.

Losses of ranks differ in nothing here: every comparison is between runs of the same
engine, with and without compression, or interrupted and not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gloo import CaseFailed, GlooPool

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from tests.support import trainer_mishaps as mishaps
from tests.support import trainers
from tests.support.deepspeed_found import Found, Look, everything_found, looking_into

pytestmark = pytest.mark.slow

WRAPPED = {
    "plain": (1, "LlamaForCausalLM", "plain model"),
    "ddp": (2, "DistributedDataParallel", "DDP"),
    "lora": (2, "DistributedDataParallel", "DDP"),
    "dora": (2, "DistributedDataParallel", "DDP"),
    "fsdp2": (2, "FSDPLlamaForCausalLM", "FSDP2, flat"),
    "hsdp": (4, "FSDPLlamaForCausalLM", "FSDP2, HSDP"),
    "fsdp2-plugin": (2, "FSDPLlamaForCausalLM", "FSDP2, flat"),
    "hsdp-plugin": (4, "FSDPLlamaForCausalLM", "FSDP2, HSDP"),
}
"""Engine -> processes, class of trainer.model_wrapped, engine in the plan."""
FORM = {
    "plain": "compressor",
    "ddp": "optimizer",
    "lora": "optimizer",
    "fsdp2": "optimizer",
    "hsdp": "compressor",
}
"""How the callback is told, where it is not by a section; with accelerate's plugin,
Trainer takes no optimizer.
"""
ZERO = ("zero1", "zero2", "zero3")
SAVING = {"save_strategy": "steps", "save_steps": 25}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs save."""
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def run(gloo: GlooPool, folder: Path) -> Run:
    """`run(engine, section=None, form="section", **more)`: what each rank found; each
    run is made once.
    """

    @functools.cache
    def once(
        engine: str, section: str | None, form: str, more: tuple[tuple[str, Any], ...]
    ) -> list[dict[str, Any]]:
        given = None if section is None else json.loads(section)
        return gloo.run(
            functools.partial(trainers.case, **dict(more)), WRAPPED[engine][0], engine,
            str(folder / engine), given, form, timeout=200,
        )  # fmt: skip

    def made(
        engine: str, section: dict[str, Any] | None = None, form: str = "section", **more: Any
    ) -> list[dict[str, Any]]:
        return once(
            engine,
            None if section is None else json.dumps(section),
            form,
            tuple(sorted(more.items())),
        )

    return made


@pytest.fixture(scope="module")
def zero(folder: Path) -> Iterator[Found]:
    """Everything that the DeepSpeed processes found."""
    pytest.importorskip("deepspeed")
    with everything_found(trainers.run_zero, 2, folder, 550) as found:
        yield found


@pytest.fixture
def look(zero: Found) -> Look:
    """`look(case)`: its values by rank."""
    return looking_into(zero)


def same_training(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Steps of AdamW, in which a last bit may grow by itself."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], abs=1e-4)
        assert mine["norms"] == pytest.approx(other["norms"], rel=1e-3, abs=1e-5)
        for name, value in mine["parameters"].items():
            torch.testing.assert_close(
                value, other["parameters"][name], rtol=1e-3, atol=1e-3, msg=name
            )


def clips(found: dict[str, Any], engine: str) -> None:
    """Whoever compares must know that there was something to clip."""
    norms = found["norms"]
    assert sum(norm > trainers.CLIP.get(engine, 0.5) for norm in norms) > 0.4 * len(norms)


def compressed_training(ranks: list[dict[str, Any]], engine: str, name: str) -> None:
    """The loss falls, all ranks log one norm, and the figures are in the logs of one of
    them.
    """
    for found in ranks:
        assert name in found["engine"]
        assert len(found["losses"]) == trainers.STEPS
        assert sum(found["losses"][-5:]) < (0.98 if engine in ("lora", "dora") else 0.6) * sum(
            found["losses"][:5]
        )
        assert found["norms"] == ranks[0]["norms"]
        assert found["error"] > 0
        assert found["steps"] == trainers.STEPS
    last = ranks[0]["logs"][-1]
    assert last["compression/ratio"] > 2
    assert last["compression/steps"] == 1
    assert last["compression/skipped_steps"] == 0
    assert 0 < last["compression/captured_energy"] < 1
    assert last["compression/error_norm"] > 0
    assert last["compression/ms/communicate"] > 0
    assert [log["step"] for log in ranks[0]["logs"] if log["compression/restarts"] > 0] == [
        1,
        21,
        41,
    ]


@pytest.mark.parametrize("engine", WRAPPED)
def test_full_rank_is_uncompressed(run: Run, engine: str) -> None:
    theirs = run(engine, steps=trainers.FULL_STEPS)
    # it cannot say 'compress all'
    form = "section" if FORM.get(engine) == "compressor" else FORM.get(engine, "section")
    ours = run(engine, trainers.FULL, form, steps=trainers.FULL_STEPS)
    for found in (*theirs, *ours):
        assert len(found["losses"]) == trainers.FULL_STEPS
        assert found["wrapped"] == WRAPPED[engine][1]
        clips(found, engine)
    assert all(found["error"] >= 0 and found["engine"] == WRAPPED[engine][2] for found in ours)
    same_training(ours, theirs)


@pytest.mark.parametrize("engine", WRAPPED)
def test_rank_2(run: Run, engine: str) -> None:
    ranks = run(
        engine,
        trainers.RANK_2,
        FORM.get(engine, "section"),
        **({} if engine in ("fsdp2", "hsdp") else SAVING),
    )
    compressed_training(ranks, engine, WRAPPED[engine][2])
    # each rank of a node compresses its rows
    blocks = 2 if engine.startswith("hsdp") else 1
    for found in ranks:
        assert found["wrapped"] == WRAPPED[engine][1]
        clips(found, engine)
        # What the optimizer got is of low rank and has the norm of clipping: the
        # averaged gradient was clipped, and nothing was averaged afterwards.
        assert 0 < found["largest_rank"] <= 2 * blocks
        assert found["clipped_norm"] == pytest.approx(trainers.CLIP.get(engine, 0.5), rel=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "lora", "fsdp2-plugin", "hsdp-plugin"])
def test_a_resumed_run_continues(run: Run, folder: Path, engine: str) -> None:
    form = FORM.get(engine, "section")
    whole = run(engine, trainers.RANK_2, form, **SAVING)
    resumed = run(
        engine, trainers.RANK_2, form, resume=str(folder / engine / "checkpoint-25"), steps=50
    )
    for one, other in zip(whole, resumed, strict=True):
        # the first half is read from trainer_state.json
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-3)
        assert other["steps"] == trainers.STEPS
        assert other["error"] > 0


def test_engines_agree(run: Run) -> None:
    ways = [
        run(engine, trainers.RANK_2, form, **more)[0]["losses"][:10]
        for engine, form, more in (
            ("ddp", "optimizer", SAVING),
            ("ddp", "section", {}),
            ("fsdp2", "optimizer", {}),
            ("fsdp2-plugin", "section", SAVING),
        )
    ]
    for other in ways[1:]:
        assert other == pytest.approx(ways[0], abs=1e-4)


def test_two_levels_through_a_section(gloo: GlooPool, folder: Path) -> None:
    own = str(folder / "levels")
    two = trainers.RANK_2 | {"topology": {"shard_size": 2, "shard_scope": "matrix"}}

    def ran(section: dict[str, Any], **more: Any) -> dict[str, Any]:
        return gloo.run(
            functools.partial(trainers.case, steps=12, **more), 4, "ddp", own, section, timeout=100
        )[0]

    whole = ran(two, save_strategy="steps", save_steps=6)
    assert ran(two, resume=f"{own}/checkpoint-6")["losses"] == pytest.approx(
        whole["losses"], abs=1e-5
    )
    assert ran(trainers.RANK_2)["losses"] == pytest.approx(whole["losses"], abs=1e-5), (
        "the algorithm of whole matrices"
    )
    assert whole["logs"][-1]["compression/inside_bytes"] > whole["logs"][-1]["compression/bytes"]


def test_the_figures_are_in_the_state_that_trainer_saves(run: Run, folder: Path) -> None:
    run("ddp", trainers.RANK_2, "optimizer", **SAVING)
    state = json.loads((folder / "ddp" / "checkpoint-50" / "trainer_state.json").read_text())
    assert all("compression/ratio" in log for log in state["log_history"] if "loss" in log)


def test_adapters_are_saved_by_save_pretrained(run: Run, folder: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    trained = run("lora", trainers.RANK_2, "optimizer", **SAVING)[0]["parameters"]
    saved = folder / "lora" / "checkpoint-50"
    assert set(load_file(saved / "adapter_model.safetensors")) == {
        name.replace(".default.", ".") for name in trained if "lora_" in name
    }
    again = PeftModel.from_pretrained(trainers.new_model("ddp", folder), saved)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trained[name]), name


# --- DeepSpeed ---


@pytest.mark.timeout(570)
@pytest.mark.parametrize("engine", ZERO)
def test_full_rank_is_uncompressed_zero(look: Look, engine: str) -> None:
    theirs, ours = look(f"{engine} uncompressed"), look(f"{engine} full rank")
    for found in (*theirs, *ours):
        assert len(found["losses"]) == trainers.FULL_STEPS
        assert found["wrapped"] == "DeepSpeedEngine"
        clips(found, engine)
    same_training(ours, theirs)


@pytest.mark.timeout(570)
@pytest.mark.parametrize("engine", ZERO)
def test_rank_2_zero(look: Look, engine: str) -> None:
    ranks = look(f"{engine} rank 2")
    compressed_training(ranks, engine, f"ZeRO stage {engine[-1]}")
    for found in ranks:
        clips(found, engine)


@pytest.mark.timeout(570)
@pytest.mark.parametrize("engine", ZERO)
def test_a_resumed_run_continues_zero(look: Look, engine: str) -> None:
    for one, other in zip(look(f"{engine} rank 2"), look(f"{engine} resumed"), strict=True):
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-3)
        assert other["steps"] == trainers.STEPS


@pytest.mark.timeout(570)
def test_trainer_is_the_same_under_ddp_and_zero(look: Look, run: Run) -> None:
    ddp = run("ddp", trainers.RANK_2, "section")[0]["losses"][:10]
    for engine in ZERO:
        assert look(f"{engine} rank 2")[0]["losses"][:10] == pytest.approx(ddp, abs=1e-4)


@pytest.mark.timeout(570)
def test_wrong_use_with_deepspeed(look: Look) -> None:
    for said in look("wrong use"):
        for case in ("optimizer in the callback", "optimizer and no callback"):
            assert said[case].startswith("ConfigError")
            assert "CompressedOptimizer cannot go with" in said[case]
            assert '"lowrank_comm"' in said[case]
        assert "no section" in said["nothing"]
        assert "PowerSGDPlus(rank=4)" in said["nothing"]
        assert "has a section" in said["two sections"]
        assert "'rank': 8" in said["two sections"]


# --- wrong use ---


def test_attach_forgotten(gloo: GlooPool, folder: Path) -> None:
    with pytest.raises(CaseFailed) as failed:
        gloo.run(mishaps.without_the_callback, 2, str(folder / "forgotten"))
    assert (
        str(failed.value).count(
            "LowRankCommError: all 2 ranks came to the first step with the same gradients"
        )
        == 2
    )
    assert "callbacks=[CompressionCallback(optimizer)]" in str(failed.value)


def test_wrong_use_is_said_when_trainer_is_built(gloo: GlooPool, folder: Path) -> None:
    for said in gloo.run(mishaps.wrong_use, 2, str(folder / "wrong"), timeout=120):
        assert "is not the optimizer of this Trainer" in said["another optimizer"]
        assert "optimizers=(optimizer, None)" in said["another optimizer"]
        assert "needs something to compress with" in said["nothing"]
        assert "has a CompressedOptimizer already" in said["twice"]
        assert "WORLD_SIZE=2" in said["one process of two"]
        assert "ACCELERATE_USE_CPU" in said["one process of two"]
        assert "callback.connect(trainer)" in said["added late"]
        assert said["added late, and connected"] == "no error"
        assert 'reduce_at="step"' in said["reduces too late"]
        assert "belongs to another Trainer" in said["reused"]
        assert said["a subclass that returns no optimizer"] == "no error"
        assert "made a SGD in the place" in said["a subclass with an optimizer of its own"]
        assert "auto_find_batch_size=True) is not possible" in said["batch sizes found out"]
        assert "enable_jit_checkpoint=True) is not possible" in said["saving by timers"]
        assert "FSDP2" in said["fsdp1"]
        assert "UnsupportedError" in said["fsdp1"]
        assert "did you mean 'rank'" in said["unknown key"]
        assert "must be a CompressedOptimizer, a compressor" in said["not a compressor"]


def test_fsdp_that_becomes_ddp_is_told(gloo: GlooPool, folder: Path) -> None:
    for warned, wrapped in gloo.run(mishaps.fsdp_on_a_cpu, 2, str(folder / "silent")):
        assert wrapped == "DistributedDataParallel"
        assert any("fsdp=...) has no effect" in line for line in warned)


def test_nothing_worth_compressing(gloo: GlooPool, folder: Path) -> None:
    plan, losses = gloo.run(mishaps.nothing_worth_it, 2, str(folder / "small"))[0]
    assert "nothing is compressed" in plan
    assert len(losses) == 3


def test_frozen_parts(gloo: GlooPool, folder: Path) -> None:
    plan, moved, frozen_moved = gloo.run(mishaps.frozen_parts, 2, str(folder / "frozen"))[0]
    assert "embed_tokens" not in plan
    assert moved > 0
    assert frozen_moved == 0


def test_nothing_is_averaged_outside_of_training(gloo: GlooPool, folder: Path) -> None:
    for after, alone, later in gloo.run(mishaps.outside_of_training, 2, str(folder / "outside")):
        assert after == alone == later == 3


def test_every_trial_has_an_optimizer_of_its_own(gloo: GlooPool, folder: Path) -> None:
    for steps in gloo.run(mishaps.trials, 2, str(folder / "trials")):
        assert steps == [3, 3]


def test_a_second_train_goes_on(gloo: GlooPool, folder: Path) -> None:
    for steps, again in gloo.run(mishaps.two_trains, 2, str(folder / "twice")):
        assert (steps, again) == (3, 6)


def test_trainers_on_one_model_one_after_another(gloo: GlooPool, folder: Path) -> None:
    """An earlier one is still there, and may train again."""
    for steps in gloo.run(mishaps.trainers_one_after_another, 2, str(folder / "in turn")):
        assert steps == [6, 1, 3]


def test_deepspeed_settings_of_another_run_refuse_nothing(gloo: GlooPool, folder: Path) -> None:
    cases = gloo.run(mishaps.deepspeed_settings_of_another_run, 2, str(folder / "another"))
    assert cases == [[3, 3], [3, 3]]
