"""Pages and figures are functions of the published rows."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_comm import ConfigError
from lowrank_comm.lab.runner import pages
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from lowrank_comm.lab.runner.sources import sources_hash
from tests.support.toy_experiment import Toy, toy_preset


def publish(folder: Path, results: Path, **settings: Any) -> list[Path]:
    preset = toy_preset(**settings)
    run_preset(preset, folder)
    return pages.publish(
        json.loads((folder / "run.json").read_text()), ordered_rows(preset, folder), results
    )


def test_a_page_is_a_function_of_the_published_file(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "published_files", lambda folder: sorted(folder.glob("*.jsonl")))
    written = publish(tmp_path / "run", tmp_path / "results")
    file, page, picture, index = written
    text = page.read_text()
    # six digits
    assert "Squares: 0.0, 1.0, 4.0; a third: 0.333333." in text
    assert "![the squares](toy/squares.png)" in text
    assert "`python -m lowrank_comm.lab run toy`" in text
    assert "Seeds 0, 1. 3 cases" in text
    assert f"Sources `{sources_hash(Path(inspect.getfile(Toy)))}`." in text
    assert "| [A toy](toy.md) | Squares. |" in index.read_text()
    assert pages.source_of(picture) == pages.read_published(file).sha256
    page.unlink()
    picture.unlink()
    pages.regenerate(tmp_path / "results")
    assert page.read_text() == text
    assert picture.is_file()
    # Another number in the file is another page, and another figure.
    file.write_text(file.read_text().replace('"square":4.0', '"square":5.0'))
    assert pages.page_of(pages.read_published(file)) != text
    assert pages.source_of(picture) != pages.read_published(file).sha256


def test_missing_cases_are_named(toy: type[Toy], tmp_path: Path) -> None:
    _, page, *_ = publish(tmp_path / "run", tmp_path / "results", broken=2)
    assert "Not run, or failed: `case2`." in page.read_text()


def test_a_page_must_show_its_figures(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "page", lambda self, settings, rows: "![another](other.png)")
    with pytest.raises(
        ConfigError, match=r"shows the figures \['other'\], drawn are \['squares'\]"
    ):
        publish(tmp_path / "run", tmp_path / "results")


def test_a_page_says_where_sources_are_not_known() -> None:
    def sentence(*codes: str | None) -> str:
        rows = [
            {"key": "a", "params": {}, "result": {}, "seconds": 1}
            | ({"code": code} if code else {})
            for code in codes
        ]
        return pages._sources(json.loads(pages.published_text({}, rows).splitlines()[0])["meta"])

    assert sentence("b" * 16, "a" * 16) == f"Sources `{'a' * 16}`, `{'b' * 16}`."
    assert sentence(None) == "The sources were not noted."
    assert sentence(None, "a" * 16).startswith("The sources were not noted for all rows; of the")
    # files from before hashes were noted
    assert pages._sources({}) == "The sources were not noted."
