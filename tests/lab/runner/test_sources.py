"""The hash of the sources changes with every byte that can change a result, and with
nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_comm.lab.runner import sources
from lowrank_comm.lab.runner.sources import sources_hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two files in the place of the library's."""
    folder = tmp_path / "package"
    (folder / "lab" / "runner").mkdir(parents=True)
    (folder / "a.py").write_text("a = 1\n")
    (folder / "lab" / "b.py").write_text("b = 1\n")
    monkeypatch.setattr(sources, "__file__", str(folder / "lab" / "runner" / "sources.py"))
    return folder


def now(*beside: Path) -> str:
    sources_hash.cache_clear()
    return sources_hash(*beside)


def test_it_is_of_the_contents_and_names_of_python_files(package: Path) -> None:
    first = now()
    assert now() == first
    (package / "notes.md").write_text("no source")
    assert now() == first
    (package / "lab" / "b.py").write_text("b = 2\n")
    second = now()
    (package / "lab" / "b.py").rename(package / "lab" / "c.py")
    assert len({first, second, now()}) == 3


def test_what_lies_beside_counts_wherever_it_lies(package: Path, tmp_path: Path) -> None:
    script, folder = tmp_path / "bench.py", tmp_path / "integrations"
    folder.mkdir()
    script.write_text("print()\n")
    (folder / "ddp.py").write_text("ddp = 1\n")
    alone, both = now(script), now(script, folder)
    assert len({now(), alone, both}) == 3
    (tmp_path / "elsewhere").mkdir()
    moved = script.rename(tmp_path / "elsewhere" / "bench.py")
    assert now(moved) == alone
    (folder / "ddp.py").write_text("ddp = 2\n")
    assert now(moved, folder) != both


def test_it_needs_nothing_but_the_standard_library() -> None:
    """The lab's own dependencies are missing on a bare machine."""
    extra = ["typer", "rich", "yaml", "matplotlib", "PIL", "scipy", "sklearn"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extra!r}))
from lowrank_comm.lab.runner.sources import sources_hash
print(sources_hash())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == now(), done.stderr
