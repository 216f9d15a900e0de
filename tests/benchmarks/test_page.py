"""docs/benchmarks.md is what `make benchmarks-page` makes of the files of figures: byte
by byte, plots by the file that they were drawn from, and no number in a table that is
not in its file.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import RESULTS, read
from benchmarks.page import building, demo
from benchmarks.page.building import BUSY, EARLIER, PAGE, PARTS, PLOTS, Part, page, without_notes
from lowrank_comm.lab.runner.pages import source_of

MEASURED = [part for part in PARTS if part.file.is_file()]
UNITS = (1.0, 1e-3, 1e-6, 1e-9, 1e3, 1e2)
"""A table may show seconds as ms, bytes as MB, a share as percent."""


def test_the_page_matches_the_files() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert without_notes(written) == without_notes(page()), "run `make benchmarks-page`"
    old = building.not_current()
    if old:
        warnings.warn(f"measured on an earlier tree: {', '.join(old)}", stacklevel=1)


def test_the_plots_are_of_the_files() -> None:
    drawn = {path.name: source_of(path) for path in PLOTS.glob("*.png")}
    expected: dict[str, str] = {}
    for part in MEASURED:
        if part.plots:
            shown = re.findall(rf"\]\({PLOTS.name}/([\w-]+\.png)\)", page())
            expected |= dict.fromkeys(shown, building.sha256(part.file))
    assert drawn == expected, "run `make benchmarks-page`"


def test_the_files_are_of_whole_runs_and_nothing_lies_beside() -> None:
    files = {part.file.name for part in (*PARTS, demo.PART)}
    assert {path.name for path in RESULTS.iterdir()} <= files
    for part in MEASURED:
        evidence = read(part.file)
        assert not evidence["quick"]
        assert evidence["benchmark"] == part.benchmark
        assert evidence["command"].startswith(f"python -m benchmarks.{part.benchmark}")
        assert re.fullmatch("[0-9a-f]{16}", evidence["sources"])


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers of a file, and those within its keys and words."""
    match value:
        case bool() | None:
            pass
        case int() | float():
            yield float(value)
        case str():
            yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
        case list():
            for one in value:
                yield from numbers_in(one)
        case dict():
            for key, one in value.items():
                yield from numbers_in(key)
                yield from numbers_in(one)


def strange_numbers(section: str, evidence: dict[str, Any]) -> list[str]:
    """Numbers of a section's tables that no figure of its file is, rounded; a row's
    first cell is its name.
    """
    rounded = {
        f"{value * unit:.{digits}e}"
        for value in numbers_in(evidence["results"])
        for unit in UNITS
        for digits in range(5)
    }
    found = []
    for line in section.splitlines():
        if line.startswith("|"):
            cells = line.split("|", 2)[2]
            for text in re.findall(r"(?<![\w.^])\d+(?:\.\d+)?", cells):
                digits = max(0, len(text.replace(".", "").lstrip("0")) - 1)
                if float(text) and f"{float(text):.{digits}e}" not in rounded:
                    found.append(text)
    return found


def section_of(part: Part) -> str:
    return next(text for text in page().split("\n## ") if part.file.name in text)


@pytest.mark.parametrize("part", MEASURED, ids=lambda part: part.benchmark)
def test_every_number_of_a_table_is_in_the_file(part: Part) -> None:
    assert strange_numbers(section_of(part), read(part.file)) == []


def test_a_number_that_is_not_in_the_file_is_found() -> None:
    evidence = {"results": {"rows": [{"ours": 0.0123456, "bytes": 4_321_000}]}}
    assert strange_numbers("| 7 x | 12.3 | 4.32 |\n| y | 12.35 MB | 4 |", evidence) == []
    assert strange_numbers("| x | 12.4 | 4.32 |", evidence) == ["12.4"]


@pytest.mark.parametrize("part", MEASURED[:1], ids=lambda part: part.benchmark)
def test_figures_of_another_tree_are_told(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "current", lambda evidence: False)
    assert page().count(EARLIER) == len(MEASURED)
    assert section_of(part).count(EARLIER) == 1
    monkeypatch.setattr(building, "current", lambda evidence: True)
    assert EARLIER not in page()


def test_a_busy_machine_is_told_where_times_depend_on_it(tmp_path: Path) -> None:
    for part in MEASURED:
        evidence = read(part.file)
        evidence["load"]["before"][0] = 10.0 * evidence["machine"]["cores"]
        (tmp_path / part.file.name).write_text(json.dumps(evidence), encoding="utf-8")
    assert page(tmp_path).count(BUSY) == sum(part.timed for part in MEASURED)


def test_what_has_not_been_measured_is_said(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "Nothing has been measured on a GPU" in text
    assert text.count("\n## ") == len(PARTS) + 1


def test_a_changed_figure_changes_the_page(tmp_path: Path) -> None:
    part = next(part for part in MEASURED if part.benchmark == "bench_launches")
    target = tmp_path / part.file.name
    target.write_bytes(part.file.read_bytes())
    same = page(tmp_path)
    changed = copy.deepcopy(read(target))
    changed["results"]["rows"][0]["launches"] += 1
    target.write_text(json.dumps(changed), encoding="utf-8")
    assert page(tmp_path) != same
