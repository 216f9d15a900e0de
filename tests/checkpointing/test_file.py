"""Files of compressed state: saved once, loaded at any number of workers, refused by
all workers together.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as read_safetensors
from safetensors.torch import save_file as plain_save

from lowrank_comm import PowerSGD, StateMismatchError
from lowrank_comm.checkpointing import file as library_checkpoint
from lowrank_comm.compressors.base import Compressor
from tests.support.checkpointed import (
    FIRST,
    MORE,
    Arrays,
    Trainer,
    equal,
    every_compressor,
    everything,
    largest_difference,
    read,
    saved,
)
from tests.support.gloo import GlooPool


def save_file(rank: int, compressor: Compressor, folder: str) -> dict[str, Any]:
    trainer = Trainer(compressor)
    trainer.train(0, FIRST, rank)
    library_checkpoint.save(trainer.optimizer.reducer, folder)
    torch.distributed.barrier()
    return {
        "weights": saved(trainer.model.state_dict()),
        "base": saved(trainer.optimizer.base.state_dict()),
        "seen": trainer.train(FIRST, MORE, rank, common=True),
    }


def load_file(
    rank: int, compressor: Compressor, folder: str, weights: bytes, base: bytes
) -> list[Arrays]:
    trainer = Trainer(compressor)
    trainer.model.load_state_dict(read(weights))
    trainer.optimizer.load_state_dict(read(base))
    assert library_checkpoint.load(trainer.optimizer.reducer, folder)
    return trainer.train(FIRST, MORE, rank, common=True)


@every_compressor
def test_the_file_resumes_at_any_world_size(
    gloo: GlooPool, compressor: Compressor, tmp_path: Path
) -> None:
    first = gloo.run(save_file, 2, compressor, str(tmp_path))
    # one file, nothing half-written beside it
    assert [path.name for path in tmp_path.iterdir()] == ["lowrank_comm.safetensors"]
    with safe_open(tmp_path / "lowrank_comm.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            f"{symbol}/{name}" for symbol in ("error", "Q") for name in ("0.weight", "1.weight")
        }
        assert '"mean"' in file.metadata()["tag"]
    for world in (1, 2, 3):
        for seen in gloo.run(
            load_file, world, compressor, str(tmp_path), first[0]["weights"], first[0]["base"]
        ):
            assert largest_difference(seen, first[0]["seen"]) < 1e-10


def test_a_missing_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(PowerSGD(2))
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        trainer.train(0, 2, 0)
        assert library_checkpoint.load(trainer.optimizer.reducer, tmp_path) is False
    assert str(tmp_path) in caplog.text
    assert not any(e.any() for e in trainer.optimizer.error_memory().values())
    assert trainer.optimizer.reducer.step == 0


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    plain_save({"error/0.weight": torch.ones(12, 9)}, tmp_path / "lowrank_comm.safetensors")
    with pytest.raises(StateMismatchError, match="lowrank_comm"):
        library_checkpoint.load(Trainer(PowerSGD(2)).optimizer.reducer, tmp_path)


def broken_files(rank: int, folder: str, what: str) -> str:
    """A checkpoint that one rank cannot use: all ranks must say so, and go on as
    before.
    """
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    mine = Path(folder) / (f"rank_{rank}" if what == "missing on one" else "all")
    name = library_checkpoint.save(trainer.optimizer.reducer, mine)
    torch.distributed.barrier()
    file = mine / "lowrank_comm.safetensors"
    if rank == 0:
        # save() has returned on all ranks, so all find it
        assert file.is_file()
        if what == "truncated":
            file.write_bytes(file.read_bytes()[:100])
        if what == "a later format":
            tensors = read_safetensors(file)
            plain_save(tensors, file, metadata={"tag": '{"format": 99, "new": 1}', "name": name})
    torch.distributed.barrier()
    before = everything(trainer)
    try:
        library_checkpoint.load(
            trainer.optimizer.reducer, mine, "another" if what == "left by another save" else name
        )
    except StateMismatchError as error:
        assert equal(everything(trainer), before)
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", ["cannot be read", "lowrank_comm.safetensors"]),
        ("a later format", ["format 99", "update"]),
        ("left by another save", ["does not belong to this checkpoint"]),
        ("missing on one", ["of step 2 on rank 0, missing on rank 1"]),
    ],
)
def test_a_file_that_one_worker_cannot_use_is_refused_by_all(
    gloo: GlooPool, tmp_path: Path, what: str, words: list[str]
) -> None:
    if what == "missing on one":
        (tmp_path / "rank_1").mkdir()
    texts = gloo.run(broken_files, 2, str(tmp_path), what)
    for text in texts:
        assert all(word in text for word in words), text


def fails_to_save(rank: int, folder: str, disk_is_full: bool) -> str:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    # as safetensors says it
    if disk_is_full:

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("No space left on device")

        library_checkpoint.save_file = full
    try:
        library_checkpoint.save(trainer.optimizer.reducer, folder)
    except StateMismatchError as error:
        return str(error)
    finally:
        library_checkpoint.save_file = plain_save
    return "no error"


@pytest.mark.parametrize(
    "disk_is_full", [False, True], ids=["the folder is a file", "the disk is full"]
)
def test_a_save_that_fails_on_rank_0_is_told_by_all(
    gloo: GlooPool, tmp_path: Path, disk_is_full: bool
) -> None:
    folder = tmp_path / "taken"
    if not disk_is_full:
        folder.write_text("a file")
    texts = gloo.run(fails_to_save, 2, str(folder), disk_is_full, timeout=20.0)
    assert texts[0] == texts[1]
    assert "could not be saved" in texts[0]


def test_the_file_that_a_checkpoint_was_saved_with_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match="missing, and with it the error memory"):
        library_checkpoint.load(Trainer(PowerSGD(2)).optimizer.reducer, tmp_path, "a name")
