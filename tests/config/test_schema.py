"""The JSON Schema takes what a section may be, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_comm.config import SECTION
from lowrank_comm.config.schema import json_schema
from tests.support import ROOT

jsonschema = pytest.importorskip("jsonschema")

FILE = ROOT / "configs" / "lowrank_comm.schema.json"
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if path != FILE)


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_is_valid(validator: Any, path: Path) -> None:
    validator.validate(json.loads(path.read_text(encoding="utf-8")))


GOOD: list[dict[str, Any]] = [
    {},
    {"$schema": "lowrank_comm.schema.json", "enabled": False},
    {"compressor": "acp", "restart_every": None},
    {"compressor": "m4", "uplink_fraction": 0.5, "seed": 1},
    {"error_feedback": {"form": "ef21_sgdm", "momentum": 1}, "min_compression_rate": 0},
    {"topology": {"shard_size": "node"}, "rules": [{"match": "a", "rank": 2}]},
]
BAD: list[dict[str, Any]] = [
    {"rnk": 1},
    {"rank": 0},
    {"rank": "4"},
    {"enabled": 1},
    {"compressor": "powersgd+"},
    {"compressor": "powersgd", "restart_every": 3},
    {"compressor": "m4", "rank": 3},
    {"error_feedback": {"form": "ef22"}},
    {"rules": [{"treatment": "dense"}]},
    {"topology": {"shard_size": 0}},
]


@pytest.mark.parametrize("section", GOOD, ids=str)
def test_a_good_section_is_valid(validator: Any, section: dict[str, Any]) -> None:
    validator.validate(section)
    validator.validate({"train_batch_size": 8, SECTION: section})


@pytest.mark.parametrize("section", BAD, ids=str)
def test_a_bad_section_is_not(validator: Any, section: dict[str, Any]) -> None:
    assert not validator.is_valid(section)
    assert not validator.is_valid({"train_batch_size": 8, SECTION: section})


def test_every_key_is_described() -> None:
    for name, definition in json_schema()["$defs"].items():
        if name != "section":
            for key, schema in definition["properties"].items():
                assert key == "compressor" or schema["description"], (name, key)
