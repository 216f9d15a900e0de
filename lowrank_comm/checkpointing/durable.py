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


def mode_of_a_new_file(path: Path) -> int:
    """Make an empty file and return the mode that it gets, which follows the umask."""
    path.unlink(missing_ok=True)
    with path.open("xb"):
        return path.stat().st_mode & 0o7777


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Any:
    """Remove a file that was being written when something failed."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of named tensors and of the text beside them.

    Args:
        tensors: on the CPU; their names, dtypes, shapes and bytes count, not their
            order.
        metadata: its entry "checksum" does not count.
    """
    found = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        found.update(repr((key, metadata[key])).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        held = tensor.detach().contiguous()
        if held.numel():
            # its bytes without a copy, and without NumPy, which need not be there
            found.update((ctypes.c_ubyte * held.nbytes).from_address(held.data_ptr()))
    return f"sha256:{found.hexdigest()}"
