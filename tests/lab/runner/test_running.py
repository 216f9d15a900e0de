"""The lab's framework: presets, resumable runs, pages that are functions of the
published rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from lowrank_comm import ConfigError, LowRankCommError
from lowrank_comm.config import Section
from lowrank_comm.lab.__main__ import main
from lowrank_comm.lab.experiment import Case, Experiment, LabSettings
from lowrank_comm.lab.experiments import EXPERIMENTS
from lowrank_comm.lab.experiments.formulas import evaluate
from lowrank_comm.lab.runner import pages as pages
from lowrank_comm.lab.runner import running as running
from lowrank_comm.lab.runner.pages import published_text
from lowrank_comm.lab.runner.preset import FOLDER, Preset, checked, load, names
from lowrank_comm.lab.runner.rows import Rows, line, plain, read_lines
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from tests.support import ROOT

PRESETS = [
    name
    for name in names()
    if importlib.util.find_spec("lowrank_comm.lab.experiments." + name.rpartition("_")[0])
    is not None
]


class ToySettings(LabSettings):
    n: int = 3
    scale: float = 1.0
    broken: int | None = None
    seeds: tuple[int, ...] = (0, 1)


class Toy(Experiment):
    """Squares."""

    name, title, Settings = "toy", "A toy", ToySettings
    ran: list[str] = []  # noqa: RUF012

    def cases(self, settings: ToySettings) -> list[Case]:
        return [Case(f"case{k}", {"k": k}) for k in range(settings.n)]

    def run(self, settings: ToySettings, case: Case, progress: Any) -> dict[str, Any]:
        progress(0.5, "half")
        self.ran.append(case.key)
        if case.params["k"] == settings.broken:
            raise ValueError("broken on purpose")
        return {
            "square": settings.scale * case.params["k"] ** 2,
            "third": 1 / 3,
            "lost": float("nan"),
        }

    def figures(self, settings: ToySettings, rows: Any) -> dict[str, Figure]:
        figure = Figure()
        figure.subplots().plot([row["result"]["square"] for row in rows])
        return {"squares": figure}

    def page(self, settings: ToySettings, rows: Any) -> str:
        values = ", ".join(str(row["result"]["square"]) for row in rows)
        return (
            f"Squares: {values}; a third: {rows[0]['result']['third']}.\n\n![the"
            " squares](squares.png)"
        )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    module = types.ModuleType("lowrank_comm.lab.experiments.toy")
    module.Toy = Toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(EXPERIMENTS, "toy", "toy:Toy")
    Toy.ran = []
    return Toy


def toy_preset(**settings: Any) -> Preset:
    return checked(
        {"experiment": "toy", "description": "Squares.", "settings": settings}, "toy_small", "toy"
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(toy: type[Toy], tmp_path: Path) -> None:
    first = run_preset(toy_preset(), tmp_path, only="case[01]")
    assert (first.finished, first.total, toy.ran) == (2, 3, ["case0", "case1"])
    again = run_preset(toy_preset(), tmp_path)
    assert (again.finished, again.failed, toy.ran) == (3, {}, ["case0", "case1", "case2"])
    rows = ordered_rows(toy_preset(), tmp_path)
    assert [(row["key"], row["result"]["square"]) for row in rows] == [
        ("case0", 0.0),
        ("case1", 1.0),
        ("case2", 4.0),
    ]
    # not finite
    assert rows[0]["result"]["lost"] is None


def test_a_case_that_fails_is_run_again_and_does_not_stop_the_others(
    toy: type[Toy], tmp_path: Path
) -> None:
    ended = run_preset(toy_preset(broken=1), tmp_path)
    assert ended.finished == 2
    assert "broken on purpose" in ended.failed["case1"]
    toy.ran.clear()
    run_preset(toy_preset(broken=1), tmp_path)
    assert toy.ran == ["case1"]


def test_a_line_that_a_kill_has_cut_off_is_run_again(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    toy.ran.clear()
    assert run_preset(toy_preset(), tmp_path).finished == 3
    assert toy.ran == ["case2"]
    assert len(read_lines(file)) == 3
    assert [row["key"] for row in read_lines(file)] == ["case0", "case1", "case2"]


def test_rows_of_other_settings_are_refused_with_the_fix(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"3 rows that were made for other settings.*--output-dir.*delete that file",
    ):
        run_preset(toy_preset(scale=2.0), tmp_path)


def test_rows_of_another_version_are_kept_and_named(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_preset(toy_preset(), tmp_path, only="case[01]")
    monkeypatch.setattr(running, "code", lambda: "another")
    console = Console(record=True, width=300)
    toy.ran.clear()
    run_preset(toy_preset(), tmp_path, console=console)
    assert toy.ran == ["case2"]
    assert (
        "2 of 2 finished cases were run by another version of the sources (the first: case0)"
        in console.export_text()
    )
    rows = read_lines(tmp_path / "rows.jsonl")
    assert len({row["code"] for row in rows}) == 2
    told = json.loads(published_text({}, rows).splitlines()[0])["meta"]["code"]
    assert told == sorted({row["code"] for row in rows})
    (tmp_path / "rows.jsonl").write_text(
        "".join(line({k: v for k, v in row.items() if k != "code"}) for row in rows)
    )
    run_preset(toy_preset(), tmp_path, console=console)
    assert "3 of 3 finished cases were run by another version" in console.export_text()


def test_under_torchrun_a_case_that_fails_ends_the_call(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that went on to the next case would meet the others in another
    collective.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LowRankCommError, match=r"case1 failed(.|\n)*broken on purpose"):
        run_preset(toy_preset(broken=1), tmp_path)
    assert toy.ran == ["case0", "case1"]
    assert [row["key"] for row in read_lines(tmp_path / "rows.jsonl")] == ["case0"]
    with pytest.raises(ConfigError, match="--jobs 2 under torchrun"):
        run_preset(toy_preset(), tmp_path, jobs=2)


def test_a_note_that_was_cut_off_is_named(toy: type[Toy], tmp_path: Path) -> None:
    run_preset(toy_preset(), tmp_path)
    note = tmp_path / "run.json"
    note.write_text(note.read_text()[:40])
    with pytest.raises(ConfigError, match=r"run\.json is no JSON.*delete it"):
        run_preset(toy_preset(), tmp_path)
    note.unlink()
    assert run_preset(toy_preset(), tmp_path).finished == 3
    assert not list(tmp_path.glob("*.new"))


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    Rows(tmp_path).append({"key": "a"})
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"key": \n' + file.read_bytes())
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        read_lines(file)


def test_bad_calls_are_refused(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="'nothing' fits no case; the keys are case0, case1, case2"
    ):
        run_preset(toy_preset(), tmp_path, only="nothing")
    with pytest.raises(ConfigError, match="--jobs 0 must be at least 1"):
        run_preset(toy_preset(), tmp_path, jobs=0)
    monkeypatch.setattr(toy, "cases", lambda self, settings: [Case("a"), Case("a")])
    with pytest.raises(ConfigError, match="two cases have the key 'a'"):
        run_preset(toy_preset(), tmp_path)


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must be a mapping"),
        (
            {"experiment": "speedup", "setings": {}},
            "'setings' is not a known key; did you mean 'settings'",
        ),
        ({"settings": {}}, "does not name its experiment"),
        ({"experiment": "speedap"}, "'speedap' is unknown; did you mean 'speedup'"),
        (
            {"experiment": "speedup", "settings": {"stepps": 3}},
            "settings.stepps is not a known key; did you mean 'steps'",
        ),
        ({"experiment": "speedup", "settings": {}}, "settings.methods is missing"),
        (
            {"experiment": "speedup", "settings": {"methods": [{"name": "a", "section": {}}] * 2}},
            "two methods have the name 'a'",
        ),
    ],
)
def test_a_preset_with_a_mistake_is_refused(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(content, "mine", "mine.yaml")


def test_presets_are_found_by_experiment_by_name_and_by_file(tmp_path: Path) -> None:
    assert load("traffic").name == load("traffic_small").name == "traffic_small"
    assert load("traffic", "paper").name == "traffic_paper"
    file = tmp_path / "mine.yaml"
    file.write_text((FOLDER / "traffic_small.yaml").read_text())
    assert load(str(file)).settings == load("traffic").settings
    for name, message in (
        ("traffik", "did you mean 'traffic'"),
        (str(tmp_path / "none.yaml"), "is not there"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(name)
    with pytest.raises(ConfigError, match="--preset large is unknown; use small or paper"):
        load("traffic", "large")
    file.write_text("experiment: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        load(str(file))


def sections(value: Any) -> list[dict[str, Any]]:
    """Every value of a key "section", wherever it stands."""
    if isinstance(value, dict):
        here = [value["section"]] if isinstance(value.get("section"), dict) else []
        return here + [found for item in value.values() for found in sections(item)]
    return [found for item in value for found in sections(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run(name: str) -> None:
    """It fits its experiment's schema, its keys differ, and every section in it is one
    that the library accepts.
    """
    preset = load(name)
    keys = [case.key for case in preset.experiment.cases(preset.settings)]
    assert len(keys) == len(set(keys)) > 0
    assert preset.description.endswith(".")
    for section in sections(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())):
        Section.parse(section)


# --- pages -----------------------------------------------------------------------------------------------------------


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


def test_numbers_that_json_does_not_have() -> None:
    assert (
        line({"a": float("inf"), "b": [1.23456789, (1, None)]}, digits=3)
        == '{"a":null,"b":[1.23,[1,null]]}\n'
    )
    assert plain({"x": True, "n": 12345678}, digits=3) == {"x": True, "n": 12345678}


# --- formulas --------------------------------------------------------------------------------------------------------


def test_formulas() -> None:
    values = {"m": 7, "n": 4, "tau": 3}
    assert evaluate("(m + n) * 2 - m * n / tau", values) == Fraction(22) - Fraction(28, 3)
    assert evaluate("min(m, 2 * n) + max(m, n) + m // 2", values) == 7 + 7 + 3


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "m.real", "q + 1", "m ** n", "min()", "1.5 * m", "m +", "-m", "True"],
)
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(ConfigError, match="formula"):
        evaluate(formula, {"m": 1, "n": 2})


# --- the command line ------------------------------------------------------------------------------------------------


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "lowrank_comm.lab", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


TINY = """
experiment: speedup
description: Tiny.
settings:
  workers: [1, 2]
  steps: 3
  seeds: [0]
  methods:
    - {name: SGD, section: {compressor: identity}}
    - {name: PowerSGD+, section: {compressor: powersgd_plus, rank: 1, restart_every: 2}}
"""


@pytest.mark.slow
def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes side by side, then nothing left to do, then published; errors are
    one line and exit code 2.
    """
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = command("run", "tiny.yaml", "--output-dir", "out", "--jobs", "2", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 cases are finished" in done.stdout
    assert (tmp_path / "out" / "speedup.md").is_file()
    assert (tmp_path / "out" / "speedup" / "speedup.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, "publish", "out", "results") == 0
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    assert "tiny.yaml" in (tmp_path / "results" / "README.md").read_text()
    capsys.readouterr()
    assert here(monkeypatch, "run", "speedap") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: experiment 'speedap' is unknown; did you mean 'speedup'")
