"""The hash of the sources that made a result: with it, a result names the version of
the code that it was measured with, also where that was never committed.

It needs the standard library only, so that benchmarks and checks on a bare machine can
use it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

NOT_NOTED = "not noted"
"""In the place of a hash, where a result was made before hashes were noted."""


@functools.cache
def sources_hash(*beside: Path) -> str:
    """Return 16 hexadecimal digits of the sha256 of the package's Python files.

    It is read once in a process, since sources may be edited while a run goes on.

    Args:
        beside: further files that made the result, as a benchmark's script, and folders
            whose Python files did, as `integrations/`. They count with their names
            below the folder, wherever it lies.

    Example:
        >>> from lowrank_comm.lab.runner.sources import sources_hash
        >>> len(sources_hash())
        16
    """
    package = Path(__file__).parents[2]
    contents = list(_contents(package)) + [
        [f"{root.name}/{name}", text] for root in beside for name, text in _contents(root)
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _contents(root: Path) -> Iterator[list[str]]:
    """Yield [name, text] of a file, or of a folder's Python files in order."""
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        yield [path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")]
