"""docs/results is what the lab makes of its files: pages byte by byte, figures by the
data that they were drawn from.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowrank_comm.lab.experiments import EXPERIMENTS
from lowrank_comm.lab.runner import pages
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.rows import plain
from lowrank_comm.lab.runner.sources import NOT_NOTED
from tests.support import ROOT

RESULTS = ROOT / "docs" / "results"
FILES = pages.published_files(RESULTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_matches_its_file(file: Path) -> None:
    published = pages.read_published(file)
    text = pages.page_of(published)
    assert (RESULTS / f"{file.stem}.md").read_text(encoding="utf-8") == text, "run `make results`"
    pictures = {path.name: pages.source_of(path) for path in (RESULTS / file.stem).glob("*.png")}
    shown = re.findall(rf"\]\({file.stem}/([\w-]+\.png)\)", text)
    assert pictures == dict.fromkeys(shown, published.sha256), "run `make results`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_names_its_sources_or_says_that_they_are_not_known(file: Path) -> None:
    published = pages.read_published(file)
    text, hashes = pages.page_of(published), published.meta.get("code", [NOT_NOTED])
    assert hashes
    for value in hashes:
        if value == NOT_NOTED:
            assert "The sources were not noted" in text
        else:
            assert re.fullmatch("[0-9a-f]{16}", value)
            assert f"`{value}`" in text


def test_the_index_matches_and_nothing_lies_beside() -> None:
    assert FILES
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == pages.index_of(RESULTS), (
        "run `make results`"
    )
    known = {"README.md"} | {
        f"{file.stem}{suffix}" for file in FILES for suffix in ("", ".md", ".jsonl")
    }
    assert {path.name for path in RESULTS.iterdir()} == known
    assert {file.stem for file in FILES} <= set(EXPERIMENTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_rows_are_of_the_preset_that_is_named(file: Path) -> None:
    """No row of a case that the settings in the file do not have, and none twice."""
    published = pages.read_published(file)
    keys = [row["key"] for row in published.rows]
    assert len(keys) == len(set(keys)) > 0
    assert set(keys) <= {
        case.key for case in published.preset.experiment.cases(published.preset.settings)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_preset_is_still_the_one_that_was_run(file: Path) -> None:
    published = pages.read_published(file)
    now = load(published.meta["preset"])
    assert now.settings.model_dump(mode="json") == published.meta["settings"], (
        f"run {published.meta['command']} anew"
    )


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem == "traffic"], ids=lambda file: file.stem
)
def test_what_can_be_run_again_in_seconds_still_comes_out(file: Path) -> None:
    published = pages.read_published(file)
    kind, settings = published.preset.experiment, published.preset.settings
    rows = {row["key"]: row["result"] for row in published.rows}
    for case in kind.cases(settings):
        assert (
            plain(kind.run(settings, case, lambda share, text: None), pages.DIGITS)
            == rows[case.key]
        ), case.key
