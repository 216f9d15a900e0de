"""Checksums and files that come to the disk as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_comm.checkpointing.durable import (
    checksum,
    make_folder,
    put_in_place,
    removed_on_failure,
    sync,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float64)}
METADATA = {"tag": "{}", "name": "x"}


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return TENSORS | tensors


def test_the_checksum_is_one_of_content_and_not_of_order_or_layout() -> None:
    found = checksum(TENSORS, METADATA)
    assert found.startswith("sha256:")
    assert found == checksum(dict(reversed(TENSORS.items())), METADATA | {"checksum": "any"})
    assert found == checksum(changed(a=TENSORS["a"].t().contiguous().t()), METADATA)


@pytest.mark.parametrize(
    "tensors",
    [
        changed(a=TENSORS["a"].reshape(3, 2)),
        changed(a=TENSORS["a"].view(torch.int32)),
        changed(a=TENSORS["a"] + torch.eye(2, 3) * 1e-6),
        changed(a=-TENSORS["a"]),
        changed(c=torch.empty(0)),
        {"a": TENSORS["a"]},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["b"], "b": TENSORS["a"]},
    ],
    ids=["shape", "dtype", "a bit", "a sign", "one more", "one less", "renamed", "swapped"],
)
def test_the_checksum_sees(tensors: dict[str, Tensor]) -> None:
    assert checksum(tensors, METADATA) != checksum(TENSORS, METADATA)


@pytest.mark.parametrize(
    "metadata", [{}, {"tag": "{}"}, METADATA | {"new": ""}, METADATA | {"tag": ""}]
)
def test_the_checksum_sees_text(metadata: dict[str, str]) -> None:
    assert checksum(TENSORS, metadata) != checksum(TENSORS, METADATA)


def test_file_and_folder_come_to_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content before the name: else a power cut may leave a right name on
    nothing.
    """
    order: list[str] = []
    real_sync, real_rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(f'/proc/self/fd/{descriptor}').resolve().name}")
        real_sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append(f"rename {self.name}")
        real_rename(self, target)
        return target

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    folder = tmp_path / "new" / "folder"
    make_folder(folder)
    unfinished = folder / "unfinished"
    unfinished.write_text("content")
    put_in_place(unfinished, folder / "file")
    assert order == [
        f"sync {tmp_path.name}", "sync new", "sync unfinished", "rename unfinished", "sync folder"
    ]  # fmt: skip
    assert (folder / "file").read_text() == "content"


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")


def test_what_fails_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("half")
    with pytest.raises(KeyboardInterrupt), removed_on_failure(path):
        raise KeyboardInterrupt
    assert not path.exists()
