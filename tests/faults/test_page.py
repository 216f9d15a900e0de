"""docs/reliability.md is what the published rows give."""

from __future__ import annotations

import json

import pytest

from tests.faults.page import PAGE, PUBLISHED, text
from tests.faults.plan import SEEDS, cells

FOUND = json.loads(PUBLISHED.read_text(encoding="utf-8"))


def test_the_page_matches_its_rows() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(FOUND), "python -m tests.faults.campaign report"


def test_no_cell_has_fewer_than_three_seeds_and_none_stands_twice() -> None:
    keys = [(row["engine"], row["kind"], row["seed"]) for row in FOUND["rows"]]
    assert len(set(keys)) == len(keys) >= 200
    for cell in cells():
        assert 3 <= sum(key[:2] == cell for key in keys) <= SEEDS, cell


@pytest.mark.parametrize("wrong", ["hang", "diverged", "ranks differ"])
def test_what_the_library_answers_for_did_not_happen(wrong: str) -> None:
    """Where it did, the engine alone does the same."""
    bad = [row for row in FOUND["rows"] if wrong in row["wrong"]]
    assert all(wrong in row["wrong without compression"] for row in bad), bad
