"""Presets: all can be run, mistakes are named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_comm import ConfigError
from lowrank_comm.config import Section
from lowrank_comm.lab.runner.preset import FOLDER, checked, load, names

PRESETS = [
    name
    for name in names()
    if importlib.util.find_spec("lowrank_comm.lab.experiments." + name.rpartition("_")[0])
    is not None
]


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
