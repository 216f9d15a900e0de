"""Where the package `powersgd` of PowerSGD's authors is (github.com/epfml/powersgd)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSION = "0.0.2"
_MODULE = Path("powersgd") / "powersgd.py"


def find(folder: Path) -> Path | str:
    """Return the folder to import the package from, or why it cannot be had.

    Args:
        folder: a checkout of its repository, or where the package index' version is to
            be installed, apart from this environment (it asks for torch 1.10).
    """
    if not (folder / _MODULE).is_file():
        wanted = f"powersgd=={VERSION}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--upgrade", "--target", str(folder), wanted],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            return f"not installed: {last}"
        if not (folder / _MODULE).is_file():
            return f"the package index' powersgd {VERSION} holds no module"
    return folder.resolve()
