"""What a language model is trained on: blocks of tokens for N workers, and held-out
blocks to evaluate on.

Two kinds. `BlockText` is a text that fits on the disk (Shakespeare's plays, or a file
of the user's): its blocks are dealt in an order that depends on the seed alone, so that
every method sees the same batches. `DocumentText` is a stream of documents, too long to
be kept: worker i reads the documents i, i + N, i + 2N, ..., concatenates their tokens
and cuts blocks from them. The documents come from JSON lines (C4's own files,
`{"text": ...}`, gzip or not) or from a hub by the package `datasets`.

The held-out blocks fall into two parts of one size: learning rates are chosen on part
0, results are reported on part 1.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import model_validator
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.data.corpora import Blocks, load_corpus
from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.numerics.randomness import stream


class TextSettings(LabSettings):
    """Where the text comes from: Shakespeare's plays by default.

    Attributes:
        file: a text file.
        hub, config: name of a data set with a field "text", and which of its
            configurations, for `datasets`.
        documents, held_out_documents: JSON-lines files (.gz or not) with a field
            "text"; the last part of the path may be a pattern.
        tokenizer: name or folder of a tokenizer for `transformers`; without one, a
            byte-level BPE is trained on the text.
        vocabulary: of the trained one.
        sequence_length: tokens of a block.
        held_out_tokens: in both parts together.
        cache: folder of tokenizers and token ids; null for ~/.cache/lowrank_comm.
    """

    file: str | None = None
    hub: str | None = None
    config: str | None = None
    documents: str | None = None
    held_out_documents: str | None = None
    tokenizer: str | None = None
    vocabulary: int = 2048
    sequence_length: int = 128
    held_out_tokens: int = 40_000
    cache: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TextSettings:
        given = [key for key in ("file", "hub", "documents") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not several")
        if (self.hub or self.documents) and self.tokenizer is None:
            raise ValueError("a stream of documents needs a tokenizer, e.g. tokenizer: t5-base")
        if (self.documents is None) != (self.held_out_documents is None):
            raise ValueError("documents and held_out_documents go together")
        if self.held_out_tokens < 2 * self.sequence_length:
            raise ValueError("held_out_tokens must hold two blocks of sequence_length at least")
        return self

    def what_it_says(self) -> dict[str, Any]:
        """Return what the blocks depend on: the settings without the cache, and a hash
        of a file's content (of `documents` and `hub`, which may be large or far away,
        the names only).

        Raises:
            ConfigError: the file is not there.
        """
        content = {} if self.file is None else {"sha256": _digest(self.file)}
        return self.model_dump(mode="json", exclude={"cache"}) | content


@lru_cache(maxsize=8)
def _digest(file: str) -> str:
    """Return the sha256 of a file, read once in a process."""
    try:
        with Path(file).open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError(
            f"text.file={file!r}: no such file; give the path of the text that the rows were made"
            " from."
        ) from None


class Text(Protocol):
    """A text as blocks of `sequence_length` tokens."""

    vocabulary: int
    token: int | None
    """Ends a text."""

    def batches(self, worker: int, workers: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Yield one worker's batches, (batch, sequence_length), without end."""

    def held_out(self, part: int) -> list[Tensor]:
        """Return the held-out blocks of part 0 or 1."""


class BlockText:
    """Blocks of a text that is kept as token ids; see the top of this file."""

    def __init__(self, settings: TextSettings) -> None:
        cache = Path(settings.cache) if settings.cache else Path.home() / ".cache" / "lowrank_comm"
        own = AutoTokenizer.from_pretrained(settings.tokenizer) if settings.tokenizer else None
        corpus = load_corpus(cache, settings.file, settings.vocabulary, own)
        self.vocabulary, self.token = len(corpus.tokenizer), corpus.tokenizer.eos_token_id
        self._training, self._held_out = corpus.split(
            settings.held_out_tokens, settings.sequence_length
        )

    def batches(self, worker: int, workers: int, batch: int, seed: int) -> Iterator[Tensor]:
        per_step = batch * workers
        if per_step > len(self._training):
            raise ConfigError(
                f"a step takes {per_step} blocks, the text has {len(self._training)}; use a smaller"
                " batch."
            )
        for epoch in itertools.count():
            order = torch.randperm(
                len(self._training), generator=stream(seed, "text", epoch, "order of blocks")
            ).tolist()
            for start in range(worker * batch, len(order) - len(order) % per_step, per_step):
                yield _stacked(self._training, order[start : start + batch])

    def held_out(self, part: int) -> list[Tensor]:
        half = len(self._held_out) // 2
        return [
            self._held_out[index]["input_ids"] for index in range(part * half, (part + 1) * half)
        ]


class DocumentText:
    """Blocks cut from a stream of documents; see the top of this file."""

    def __init__(self, settings: TextSettings) -> None:
        assert settings.tokenizer is not None
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(settings.tokenizer)
        self._settings = settings
        self.vocabulary, self.token = len(self._tokenizer), self._tokenizer.eos_token_id
        self._training = self._documents("train")

    def batches(self, worker: int, workers: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Yield one worker's batches. The documents come in the order of the files; the
        seed changes nothing.
        """

        def documents() -> Iterator[str]:
            while True:
                own = itertools.islice(self._training(), worker, None, workers)
                first = next(own, None)
                if first is None:
                    raise ConfigError(
                        f"{self._name} has no document for worker {worker} of {workers}."
                    )
                yield first
                yield from own

        blocks = self._blocks(documents())
        while True:
            yield torch.stack(list(itertools.islice(blocks, batch)))

    def held_out(self, part: int) -> list[Tensor]:
        count = self._settings.held_out_tokens // self._settings.sequence_length // 2
        blocks = list(
            itertools.islice(
                self._blocks(self._documents("validation")()), part * count, (part + 1) * count
            )
        )
        if len(blocks) < count:
            raise ConfigError(
                f"{self._name}: the held-out documents give fewer blocks than held_out_tokens="
                f"{self._settings.held_out_tokens} asks for; use a smaller number."
            )
        return blocks

    @property
    def _name(self) -> str:
        return str(self._settings.hub or self._settings.documents)

    def _blocks(self, documents: Iterator[str]) -> Iterator[Tensor]:
        """Concatenate the documents' tokens and cut them into blocks."""
        length, ids = self._settings.sequence_length, list[int]()
        for text in documents:
            ids.extend(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if self.token is not None:
                ids.append(self.token)
            while len(ids) >= length:
                yield torch.tensor(ids[:length])
                del ids[:length]

    def _documents(self, split: str) -> Callable[[], Iterator[str]]:
        """Return a function that yields the texts of a split from the first."""
        if self._settings.hub is not None:
            return lambda: (
                row["text"]
                for row in _from_hub(str(self._settings.hub), self._settings.config, split)
            )
        pattern = str(
            self._settings.documents if split == "train" else self._settings.held_out_documents
        )
        path = Path(pattern).expanduser()
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise ConfigError(
                f"no file fits the pattern {pattern!r}; it is one of JSON lines, e.g."
                " c4/en/c4-train.*.json.gz."
            )
        return lambda: (row["text"] for row in json_lines(files))


@lru_cache(maxsize=2)
def load_text(settings: TextSettings) -> Text:
    """Return the text that the settings name; cached for the next case of the process.

    Raises:
        ConfigError: the text is not there, or too short.
    """
    return DocumentText(settings) if settings.hub or settings.documents else BlockText(settings)


def json_lines(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON-lines files, gzip where the name ends in .gz.

    Raises:
        ConfigError: a line is no JSON.
    """
    for name in files:
        with (
            gzip.open(name, "rt", encoding="utf-8")
            if name.suffix == ".gz"
            else name.open(encoding="utf-8")
        ) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ConfigError(f"{name}, line {number} is no JSON ({error}).") from None


def _from_hub(name: str, config: str | None, split: str) -> Any:
    """Return a data set as a stream of rows.

    Raises:
        ConfigError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"hub={name!r} needs the package datasets: pip install datasets."
        ) from None
    return datasets.load_dataset(name, config, split=split, streaming=True)


def _stacked(blocks: Blocks, indices: list[int]) -> Tensor:
    return torch.stack([blocks[index]["input_ids"] for index in indices])
