"""Files of compressed state: saved once, loaded at any number of workers, refused by
all workers together.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as read_safetensors
from safetensors.torch import save_file as plain_save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    ErrorFeedback,
    PowerSGD,
    Rule,
    StateMismatchError,
)
from lowrank_comm.checkpointing import file as library_checkpoint
from lowrank_comm.checkpointing.durable import checksum
from lowrank_comm.checkpointing.tensor_file import write_tensors
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
    name = library_checkpoint.save(trainer.optimizer.reducer, folder)
    torch.distributed.barrier()
    return {
        "name": name,
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
    (path,) = tmp_path.iterdir()
    assert path.name == f"lowrank_comm-{first[0]['name']}.safetensors"
    with safe_open(path, framework="pt") as file:
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


def test_a_folder_that_is_not_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no checkpoint without compression."""
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert library_checkpoint.load(trained(2).optimizer.reducer, tmp_path / "none") is False
    assert f"{tmp_path / 'none'} is no folder: nothing is loaded" in caplog.text
    assert "without compression" not in caplog.text


@pytest.mark.parametrize("call", ["save", "load"])
def test_an_optimizer_in_the_place_of_its_reducer_is_refused(call: str, tmp_path: Path) -> None:
    optimizer = trained(1).optimizer
    for given in ((optimizer, tmp_path), (tmp_path, optimizer.reducer)):
        with pytest.raises(ConfigError, match=rf"give {call}\(optimizer\.reducer, folder\)"):
            getattr(library_checkpoint, call)(*given)
    assert not list(tmp_path.iterdir())


def test_loaded_is_said_after_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = library_checkpoint.save(trained(2).optimizer.reducer, tmp_path)
    other = Trainer(PowerSGD(2), min_compression_rate=1000)
    with caplog.at_level(logging.INFO, "lowrank_comm"):
        with pytest.raises(StateMismatchError, match="would be lost"):
            library_checkpoint.load(other.optimizer.reducer, tmp_path)
        assert "is loaded" not in caplog.text
        assert library_checkpoint.load(Trainer(PowerSGD(2)).optimizer.reducer, tmp_path)
    assert f"lowrank_comm-{name}.safetensors of step 2 is loaded" in caplog.text


def test_a_file_may_be_named_as_it_stands_in_the_folder(tmp_path: Path) -> None:
    one = trained(2)
    name = library_checkpoint.save(one.optimizer.reducer, tmp_path)
    file = library_checkpoint.file_of(tmp_path, name)
    other = Trainer(PowerSGD(2))
    assert library_checkpoint.load(other.optimizer.reducer, tmp_path, file.name)
    assert equal(other.optimizer.error_memory(), one.optimizer.error_memory())


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
    file = library_checkpoint.file_of(mine, name)
    if rank == 0:
        # save() has returned on all ranks, so all find it
        assert file.is_file()
        if what == "truncated":
            file.write_bytes(file.read_bytes()[:100])
        if what == "a later format":
            tensors = read_safetensors(file)
            plain_save(tensors, file, metadata={"tag": '{"format": 99, "new": 1}', "name": name})
        if what == "one flipped bit":
            data = bytearray(file.read_bytes())
            data[-3] ^= 1
            file.write_bytes(data)
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
        ("truncated", ["cannot be read", "lowrank_comm-2-"]),
        ("one flipped bit", ["lowrank_comm-2-", "damaged: its checksum"]),
        ("a later format", ["format 99", "update"]),
        ("left by another save", ["does not belong to this checkpoint"]),
        ("missing on one", ["of step 2 (lowrank_comm-2-", "on rank 0, missing on rank 1"]),
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
    if disk_is_full:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        library_checkpoint.write_tensors = full
    try:
        library_checkpoint.save(trainer.optimizer.reducer, folder)
    except StateMismatchError as error:
        return str(error)
    finally:
        library_checkpoint.write_tensors = write_tensors
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


# --- saves that follow each other ---


def trained(steps: int) -> Trainer:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, steps, 0)
    return trainer


def names_in(folder: Path) -> set[str]:
    return {path.name.removeprefix("lowrank_comm-")[:-12] for path in folder.iterdir()}


def test_the_save_before_stays_until_the_next(tmp_path: Path) -> None:
    """What the caller keeps beside may still name it, if the caller is killed now."""
    trainer, names = trained(1), []
    for step in range(1, 5):
        names.append(library_checkpoint.save(trainer.optimizer.reducer, tmp_path))
        assert names_in(tmp_path) == set(names[-2:])
        fresh = Trainer(PowerSGD(2))
        assert library_checkpoint.load(fresh.optimizer.reducer, tmp_path, names[-2:][0])
        assert fresh.optimizer.reducer.step == max(step - 1, 1)
        trainer.train(step, 1, 0)


def test_saves_that_died_before_the_rest_was_there_leave_no_heap(tmp_path: Path) -> None:
    """Each run goes on from the first save, saves, and dies: the file that the caller
    names stays, and those of the dead runs go once a run has saved twice.
    """
    kept = library_checkpoint.save(trained(1).optimizer.reducer, tmp_path)
    for _ in range(3):
        run = Trainer(PowerSGD(2))
        library_checkpoint.load(run.optimizer.reducer, tmp_path, kept)
        library_checkpoint.save(run.optimizer.reducer, tmp_path)
        assert kept in names_in(tmp_path)
        assert len(names_in(tmp_path)) == 2


def test_two_optimizers_may_save_into_one_folder(tmp_path: Path) -> None:
    one, other = trained(1), trained(2)
    for step in (3, 4, 5):
        names = [library_checkpoint.save(t.optimizer.reducer, tmp_path) for t in (one, other)]
        assert set(names) <= names_in(tmp_path)
        for trainer, name in zip((one, other), names, strict=True):
            before = everything(trainer)
            trainer.train(step, 1, 0)
            assert library_checkpoint.load(trainer.optimizer.reducer, tmp_path, name)
            assert equal(everything(trainer)["errors"], before["errors"])


def test_without_a_name_the_newest_complete_file_is_loaded_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(3)
    names = [library_checkpoint.save(trainer.optimizer.reducer, tmp_path)]
    trainer.train(3, 2, 0)
    names.append(library_checkpoint.save(trainer.optimizer.reducer, tmp_path))
    older, newer = (library_checkpoint.file_of(tmp_path, name) for name in names)
    # copying a folder gives its files other times
    os.utime(newer, (1, 1))
    loaded = Trainer(PowerSGD(2))
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert library_checkpoint.load(loaded.optimizer.reducer, tmp_path)
    assert loaded.optimizer.reducer.step == 5
    assert f"{newer.name} of step 5 is the newest complete file" in caplog.text
    newer.write_bytes(newer.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert library_checkpoint.load(loaded.optimizer.reducer, tmp_path)
    assert loaded.optimizer.reducer.step == 3
    assert f"passed over: {newer} cannot be read" in caplog.text
    assert f"{older.name} of step 3 is the newest complete file" in caplog.text
    older.write_bytes(b"")
    before = everything(loaded)
    with pytest.raises(StateMismatchError, match="cannot be read"):
        library_checkpoint.load(loaded.optimizer.reducer, tmp_path)
    assert equal(everything(loaded), before)


def test_without_a_name_the_file_of_the_bases_steps_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between the compressor's save and the base's: the base is of step 3, and
    the newest file of step 5.
    """
    trainer = trained(3)
    library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    base, weights = saved(trainer.optimizer.base.state_dict()), saved(trainer.model.state_dict())
    expected = trained(3).train(3, MORE, 0)
    trainer.train(3, 2, 0)
    library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    resumed = Trainer(PowerSGD(2))
    resumed.model.load_state_dict(read(weights))
    resumed.optimizer.base.load_state_dict(read(base))
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert library_checkpoint.load(resumed.optimizer.reducer, tmp_path)
    assert "of step 3 is the newest complete file of 3 steps of the base optimizer" in caplog.text
    assert resumed.optimizer.reducer.step == 3
    assert largest_difference(resumed.train(3, MORE, 0), expected) == 0.0
    # and where there is none, that is said
    other = trained(4)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert library_checkpoint.load(other.optimizer.reducer, tmp_path)
    assert other.optimizer.reducer.step == 5
    assert "of another save than what the base optimizer has loaded: 5 steps there, 4" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("layout", "words"), [("3", "format 3, this version reads 2; update"), ("x", "is damaged")]
)
def test_a_file_of_a_later_format_is_refused(layout: str, words: str, tmp_path: Path) -> None:
    """What is the same by its tag may be another by what is around it."""
    trainer = trained(1)
    name = library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    path = library_checkpoint.file_of(tmp_path, name)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "format": layout}
    tensors = read_safetensors(path)
    metadata["checksum"] = checksum(tensors, metadata)
    plain_save(tensors, path, metadata=metadata)
    with pytest.raises(StateMismatchError, match=words):
        library_checkpoint.load(trainer.optimizer.reducer, tmp_path, name)


@pytest.mark.parametrize("name", ["", "../other", "/etc/passwd", "a/b", 3])
def test_a_name_that_no_save_has(tmp_path: Path, name: Any) -> None:
    with pytest.raises(StateMismatchError, match="is not one that lowrank_comm"):
        library_checkpoint.load(trained(1).optimizer.reducer, tmp_path, name)


def test_a_file_that_was_given_another_files_name_is_refused(tmp_path: Path) -> None:
    trainer = trained(1)
    one = library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    other = library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    library_checkpoint.file_of(tmp_path, one).replace(library_checkpoint.file_of(tmp_path, other))
    with pytest.raises(StateMismatchError, match="does not belong to this checkpoint"):
        library_checkpoint.load(trainer.optimizer.reducer, tmp_path, other)


def test_the_mode_follows_the_umask_and_a_new_folder_is_made(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        name = library_checkpoint.save(trained(1).optimizer.reducer, tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert library_checkpoint.file_of(tmp_path / "a" / "b", name).stat().st_mode & 0o777 == 0o640


# --- state that is not finite ---


def saves_bad_state(rank: int, folder: str, where: str, value: float) -> tuple[str, bool, int]:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    reducer = trainer.optimizer.reducer
    if rank == 1 and where == "error":
        trainer.optimizer.error_memory()["1.weight"].view(-1)[3] = value
    if rank == 1 and where == "Q":
        reducer.state.bases_of("1.weight")["Q"].view(-1)[3] = value
    before, said = everything(trainer), ""
    try:
        library_checkpoint.save(reducer, folder)
    except StateMismatchError as error:
        said = str(error)
    unchanged = repr(everything(trainer)) == repr(before)
    torch.distributed.barrier()
    return said, unchanged, len(list(Path(folder).iterdir()))


@pytest.mark.parametrize("where", ["error", "Q"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1.7e308], ids=str)
def test_state_that_is_not_finite_is_not_saved(
    gloo: GlooPool, tmp_path: Path, where: str, value: float
) -> None:
    """1.7e308 is finite, and the mean over two workers would not be."""
    for said, unchanged, files in gloo.run(saves_bad_state, 2, str(tmp_path), where, value):
        what = "the error memory" if where == "error" else "the state Q"
        assert said.startswith(f"{what} of 1.weight holds "), said
        assert "on rank 1" in said
        assert unchanged
        assert files == 0


@pytest.mark.parametrize("key", ["error/1.weight", "Q/0.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_state_that_is_not_finite_is_not_loaded(tmp_path: Path, key: str, value: float) -> None:
    """In a file of an earlier version, and in one whose checksum is right."""
    trainer = trained(2)
    name = library_checkpoint.save(trainer.optimizer.reducer, tmp_path)
    path = library_checkpoint.file_of(tmp_path, name)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = read_safetensors(path)
    tensors[key].view(-1)[1] = value
    metadata["checksum"] = checksum(tensors, metadata)
    plain_save(tensors, path, metadata=metadata)
    old = tmp_path / "old"
    old.mkdir()
    plain_save(
        tensors, old / "lowrank_comm.safetensors", metadata={"tag": metadata["tag"], "name": "x"}
    )
    before = everything(trainer)
    for folder in (tmp_path, old):
        with pytest.raises(StateMismatchError, match="is not finite") as caught:
            library_checkpoint.load(trainer.optimizer.reducer, folder)
        assert key.split("/")[1] in str(caught.value)
    assert equal(everything(trainer), before)


def saves_without_rows(rank: int, folder: str, form: str) -> tuple[int, bool]:
    """Two nodes of two ranks and a matrix of one row: the second rank of a node holds
    none of it.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    weight = nn.Parameter(torch.zeros(1, 400))
    optimizer = CompressedOptimizer(
        torch.optim.SGD([("w", weight)], lr=0.1),
        PowerSGD(1),
        rules=[Rule("w", treatment="low_rank")],
        error_feedback=ErrorFeedback(form=form),  # type: ignore[arg-type]
        process_group=mesh,
    )
    for t in range(3):
        weight.grad = torch.randn(1, 400, generator=torch.Generator().manual_seed(t * 4 + rank))
        optimizer.step()
        if t == 1:
            library_checkpoint.save(optimizer.reducer, folder)
    held = len(optimizer.reducer.state.batches)
    return held, library_checkpoint.load(optimizer.reducer, folder)


@pytest.mark.parametrize("form", ["ef14", "ef21", "none"])
def test_a_rank_without_rows_takes_part(gloo: GlooPool, tmp_path: Path, form: str) -> None:
    found = gloo.run(saves_without_rows, 4, str(tmp_path), form)
    assert found == [(1, True), (0, True)] * 2
