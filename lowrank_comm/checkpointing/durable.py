"""Files that are there as a whole or not at all, also after a kill or a power cut.

A file or folder is written under another name in the same folder, brought to the disk,
and renamed; then the folder, which holds the name, is brought to the disk as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# what a file system answers that cannot bring a folder to the disk by itself
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _CANNOT:
            raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and bring their names to the
    disk.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync(one.parent)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Rename a file or folder that is complete, after it has come to the disk."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Any:
    """Remove a file that was being written when something failed."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor on the CPU, to be used while it is there:
    without a copy, and without NumPy, which need not be there.
    """
    if not tensor.numel():
        return b""
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())


class Checksum:
    """The SHA-256 of named tensors and of the text beside them; names, dtypes, shapes
    and bytes count.

    Args:
        metadata: the text; its entry "checksum" does not count.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._found = hashlib.sha256()
        for key in sorted(metadata.keys() - {"checksum"}):
            self._found.update(repr((key, metadata[key])).encode())

    def update(self, key: str, tensor: Tensor) -> None:
        """Take in a tensor on the CPU; tensors come in the order of their keys."""
        self._found.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        held = tensor.detach().contiguous()
        self._found.update(bytes_of(held))

    @property
    def text(self) -> str:
        """Of what has been taken in so far; always as long."""
        return f"sha256:{self._found.hexdigest()}"


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the `Checksum` of tensors on the CPU, in any order."""
    found = Checksum(metadata)
    for key, tensor in sorted(tensors.items()):
        found.update(key, tensor)
    return found.text
