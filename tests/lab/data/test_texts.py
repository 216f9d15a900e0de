"""Texts that are dealt to the workers: blocks, streams of documents, data sets of the
package.
"""

from __future__ import annotations

import gzip
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.lab.data.texts import TextSettings, load_text
from tests.support.language_model_runs import settings_of


def test_workers_share_the_blocks_and_the_seed_gives_the_order(text_file: Path) -> None:
    text = load_text(settings_of(text_file).text)

    def epoch(seed: int) -> list[tuple[int, ...]]:
        steps = 40
        streams = [list(islice(text.batches(worker, 2, 1, seed), steps)) for worker in (0, 1)]
        return [tuple(block.tolist()) for stream in streams for batch in stream for block in batch]

    first = epoch(1)
    # no block twice in an epoch, whichever the worker
    assert len(set(first)) == len(first) == 80
    assert epoch(1) == first
    assert epoch(2) != first
    judged = [{tuple(block.tolist()) for block in text.held_out(part)} for part in (0, 1)]
    assert len(judged[0]) == len(judged[1]) == 10
    assert not judged[0] & judged[1]
    assert not (judged[0] | judged[1]) & set(first)


def test_a_stream_of_documents_is_dealt_to_the_workers(documents: TextSettings) -> None:
    text = load_text(documents)

    def numbers(blocks: list[torch.Tensor]) -> set[str]:
        return set(
            re.findall(r"document (\d+) ", text._tokenizer.decode(torch.cat(blocks).flatten()))
        )

    seen = [numbers(list(islice(text.batches(worker, 2, 2, 0), 120))) for worker in (0, 1)]
    # 120 batches are more than one pass over the files
    assert seen[0] == {str(k) for k in range(0, 20, 2)}
    assert seen[1] == {str(k) for k in range(1, 20, 2)}
    parts = [text.held_out(part) for part in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 5
    assert numbers(parts[0]) and numbers(parts[0]) <= {str(k) for k in range(20, 30)}
    assert not torch.equal(torch.stack(parts[0]), torch.stack(parts[1]))


def test_a_data_set_of_the_package_datasets_gives_the_same_blocks(
    documents: TextSettings, tmp_path: Path
) -> None:
    """The code that asks a hub, on a folder in its place."""
    pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (tmp_path / "c4-train.0.json").read_text().splitlines()
    lines += gzip.decompress((tmp_path / "c4-train.1.json.gz").read_bytes()).decode().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "validation.jsonl").write_text((tmp_path / "c4-validation.json").read_text())
    hub = documents.model_copy(
        update={"documents": None, "held_out_documents": None, "hub": str(folder)}
    )
    ours, theirs = load_text(documents), load_text(hub)
    for a, b in zip(
        islice(ours.batches(1, 2, 2, 0), 5), islice(theirs.batches(1, 2, 2, 0), 5), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(torch.stack(ours.held_out(1)), torch.stack(theirs.held_out(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "a.txt", "hub": "allenai/c4"}, "give one of file and hub"),
        ({"hub": "allenai/c4"}, "needs a tokenizer"),
        (
            {"documents": "a.jsonl", "tokenizer": "t5-base"},
            "documents and held_out_documents go together",
        ),
        ({"sequence_length": 64, "held_out_tokens": 100}, "two blocks"),
    ],
)
def test_a_text_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSettings(**changes)


def test_files_that_are_not_there_or_no_json_are_named(
    documents: TextSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no file fits the pattern .*nothing"):
        load_text(documents.model_copy(update={"documents": str(tmp_path / "nothing*.json")}))
    (tmp_path / "c4-train.0.json").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(ConfigError, match=r"c4-train\.0\.json, line 2 is no JSON"):
        next(load_text(documents.model_copy(update={"sequence_length": 40})).batches(1, 2, 2, 0))
    with pytest.raises(ConfigError, match="fewer blocks than held_out_tokens=100000"):
        load_text(documents.model_copy(update={"held_out_tokens": 100_000})).held_out(1)
