"""The engine matrix: which test shows what of which engine. Written into
docs/engines.md and README.md from the tests.

    python tests/support/engine_matrix.py            writes both
    python tests/support/engine_matrix.py --check    compares both with the tests

A test that carries `@pytest.mark.shows(column, ...)` fills its columns in the row of
the engine that it runs: the id of its parameter `engine`, or `engine="..."` of the
marker with the test's parameters filled in; `when="..."` restricts it to parameters
that say so. A cell links to the test's file and names the test; where no test shows a
thing, the cell says no, or why it cannot be.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- engine matrix, written by tests/support/engine_matrix.py -->"
END = "<!-- end of the engine matrix -->"
FILES = {ROOT / "docs/engines.md": "../tests", ROOT / "README.md": "tests"}

COLUMNS = [
    "full rank", "rank r = simulation", "bytes = formula", "accumulation", "clipping", "AdamW",
    "bf16", "fp16 + scaler", "NaN on one rank", "overlap", "checkpoint", "GPU",
]  # fmt: skip
ROWS = [
    "plain model", "plain model, two levels, shard", "plain model, two levels, matrix",
    "DDP", "DDP, two levels, shard", "DDP, two levels, matrix",
    "FSDP2, flat",
    "FSDP2, HSDP sub-mesh, shard", "FSDP2, HSDP sub-mesh, matrix",
    "FSDP2, HSDP 2-D mesh, shard", "FSDP2, HSDP 2-D mesh, matrix",
    *(f"DeepSpeed ZeRO-{stage}" for stage in range(4)),
    *(f"DeepSpeed ZeRO-{stage}, two levels" for stage in range(4)),
]  # fmt: skip
WHY_NOT = {"GPU": "never run", "overlap": "no"}


class _Collector:
    """Collects the marked tests: (row, column) -> (file, test)."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], tuple[str, str]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            for marker in item.iter_markers("shows"):
                if marker.kwargs.get("when", "") not in item.callspec.id:
                    continue
                row = self._row(item, marker)
                unknown = [column for column in marker.args if column not in COLUMNS]
                if row not in ROWS or unknown:
                    raise pytest.UsageError(
                        f"{item.nodeid}: no row {row!r}, or no columns {unknown}, in"
                        " engine_matrix.py"
                    )
                for column in marker.args:
                    self.cells.setdefault(
                        (row, column),
                        (item.path.relative_to(ROOT / "tests").as_posix(), item.originalname),
                    )

    @staticmethod
    def _row(item: Any, marker: Any) -> str:
        if "engine" in marker.kwargs:
            return str(marker.kwargs["engine"].format(**item.callspec.params))
        names = [
            name
            for name in ROWS
            if item.callspec.id == name or f"-{name}" in f"-{item.callspec.id}"
        ]
        return max(names, key=len, default=item.callspec.id)


def collected() -> dict[tuple[str, str], tuple[str, str]]:
    """(row, column) -> (file, test) of all marked tests. Only the files that hold a
    marker are collected: the others take as long as all the libraries to import.
    """
    collector = _Collector()
    marked = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.shows(" in path.read_text(encoding="utf-8")
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(
            [
                "--collect-only",
                "-q",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                str(ROOT),
                *marked,
            ],
            [collector],
        )
    if code != 0:
        raise SystemExit(said.getvalue())
    return collector.cells


def table(cells: dict[tuple[str, str], tuple[str, str]], folder: str) -> str:
    """The matrix in Markdown, linking to the tests in `folder`."""
    lines = ["| engine | " + " | ".join(COLUMNS) + " |", "| --- |" + " :-: |" * len(COLUMNS)]
    for row in ROWS:
        if not any((row, column) in cells for column in COLUMNS):
            continue
        shown = []
        for column in COLUMNS:
            found = cells.get((row, column))
            # the README's stays readable as text
            title = f' "{found[1]}"' if found and folder.startswith("..") else ""
            shown.append(f"[Y]({folder}/{found[0]}{title})" if found else WHY_NOT.get(column, "no"))
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def written(
    path: Path, folder: str, cells: dict[tuple[str, str], tuple[str, str]]
) -> tuple[str, str]:
    """A file's text as it is, and as it should be."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return text, f"{before}{BEGIN}\n{table(cells, folder)}\n{END}{after}"


def main() -> int:
    cells, stale = collected(), []
    for path, folder in FILES.items():
        text, should_be = written(path, folder, cells)
        if text != should_be:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(should_be, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(
            f"{', '.join(stale)}: the engine matrix is not as the tests are; run python"
            " tests/support/engine_matrix.py"
        )
        return 1
    print("the engine matrix is as the tests are")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
