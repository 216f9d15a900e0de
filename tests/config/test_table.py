"""The tables of settings in the docs are as the options are."""

from __future__ import annotations

import pytest

from lowrank_comm.config.table import filled
from tests.support import ROOT


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms.md"])
def test_the_tables_are_what_the_command_writes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert filled(text) == text, "run make schema"
    assert "python -m lowrank_comm.config tables" in text
