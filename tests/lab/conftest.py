"""Small files that the experiments read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from lowrank_comm.lab.data.corpora import load_corpus
from lowrank_comm.lab.data.sentence_tasks import GLUE
from lowrank_comm.lab.data.texts import TextSettings
from tests.support.fine_tuning_runs import WORDS


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{k} to be or not {k * k}\n" for k in range(400)), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path, text_file: Path) -> TextSettings:
    """C4's files in small: JSON lines, one of them compressed, and a tokenizer in a
    folder.
    """
    load_corpus(text_file.parent / "cache", str(text_file), 300).tokenizer.save_pretrained(
        tmp_path / "tokenizer"
    )
    rows = [json.dumps({"text": f"document {k} " * 12, "url": "x"}) for k in range(30)]
    (tmp_path / "c4-train.0.json").write_text("\n".join(rows[:10]) + "\n")
    with gzip.open(tmp_path / "c4-train.1.json.gz", "wt") as file:
        file.write("\n".join(rows[10:20]) + "\n")
    (tmp_path / "c4-validation.json").write_text("\n".join(rows[20:]) + "\n")
    return TextSettings(
        documents=str(tmp_path / "c4-train.*"),
        held_out_documents=str(tmp_path / "c4-validation.json"),
        tokenizer=str(tmp_path / "tokenizer"), sequence_length=16, held_out_tokens=160,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with random weights and its tokenizer, as `transformers` saves them."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
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
