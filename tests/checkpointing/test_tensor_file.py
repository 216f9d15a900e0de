"""Files that are written one tensor at a time are safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowrank_comm.checkpointing.durable import checksum
from lowrank_comm.checkpointing.tensor_file import write_tensors

SHARED = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    # one byte long, and before those that must be aligned
    "a/flag": torch.tensor([True]),
    "b/error": SHARED[0],
    "c/error": SHARED[1].T,
    "d/narrow": torch.arange(5).to(torch.bfloat16),
    "e/wide": torch.arange(3, dtype=torch.float64),
    "f/empty": torch.empty(0, 4),
    "g/number": torch.tensor(7),
    "h/codes": torch.arange(3, dtype=torch.uint8),
}


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path, metadata = tmp_path / "file", {"tag": "a", "name": "b"}
    write_tensors(path, layout(TENSORS), TENSORS.values(), metadata)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert torch.equal(found[key], tensor)
        assert found[key].dtype == tensor.dtype
        assert found[key].data_ptr() % tensor.itemsize == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {**metadata, "checksum": checksum(TENSORS, metadata)}


def test_one_tensor_is_taken_when_the_one_before_is_written(tmp_path: Path) -> None:
    alive = 0

    def one_at_a_time() -> Iterator[Tensor]:
        nonlocal alive
        for tensor in TENSORS.values():
            assert alive == 0
            alive += 1
            yield tensor
            alive -= 1

    write_tensors(tmp_path / "file", layout(TENSORS), one_at_a_time(), {})
    assert load_file(tmp_path / "file").keys() == TENSORS.keys()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "file", layout(TENSORS), TENSORS.values(), {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_what_was_left_by_a_dead_run_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to(tmp_path / "elsewhere")
    write_tensors(path, layout(TENSORS), TENSORS.values(), {})
    assert path.is_file()
    assert not path.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("given", ["fewer", "more", "another shape", "another dtype"])
def test_tensors_that_do_not_follow_the_layout_are_refused(tmp_path: Path, given: str) -> None:
    *others, last = TENSORS.values()
    tensors = {
        "fewer": others,
        "more": [*others, last, last],
        "another shape": [*others, last[None]],
        "another dtype": [*others, last.to(torch.complex64)],
    }[given]
    with pytest.raises(ValueError, match="layout"):
        write_tensors(tmp_path / "file", layout(TENSORS), tensors, {})
