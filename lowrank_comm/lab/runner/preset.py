"""Presets: an experiment's name with its settings, from a YAML file of the package or
of the user.

Example:
    experiment: speedup
    description: One sentence for `list`.
    settings: {workers: [1, 2, 4]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lowrank_comm.errors import ConfigError, nearest
from lowrank_comm.lab.experiment import Experiment
from lowrank_comm.lab.experiments import EXPERIMENTS, experiment

FOLDER = Path(__file__).parents[1] / "presets"
SIZES = ("small", "paper")
_KEYS = ("experiment", "description", "settings")


@dataclass(frozen=True)
class Preset:
    """A checked preset.

    Attributes:
        name: stem of its file, e.g. speedup_small.
        experiment: the experiment.
        description: one sentence.
        settings: in the experiment's own schema.
        argument: what to write after `lab run` to run it.
    """

    name: str
    experiment: Experiment
    description: str
    settings: BaseModel
    argument: str


def checked(content: Any, name: str, argument: str) -> Preset:
    """Check the content of a preset's file.

    Args:
        content: the mapping.
        name: of the preset.
        argument: see `Preset`.

    Raises:
        ConfigError: a key is unknown or missing, the experiment is unknown, or a
            setting does not fit its schema.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"preset {name} must be a mapping with the keys {', '.join(_KEYS)}, got {content!r}."
        )
    for key in content:
        if key not in _KEYS:
            raise ConfigError(
                f"preset {name}: {key!r} is not a known key{nearest(str(key), _KEYS)}"
            )
    if "experiment" not in content:
        raise ConfigError(
            f"preset {name} does not name its experiment; write experiment: one of"
            f" {', '.join(EXPERIMENTS)}."
        )
    found = experiment(str(content["experiment"]))
    try:
        settings = found.Settings.model_validate(content.get("settings") or {})
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_explain(name, found.Settings, detail) for detail in error.errors())
        ) from None
    return Preset(name, found, str(content.get("description", "")), settings, argument)


def load(name_or_yaml: str, size: str = "small") -> Preset:
    """Load the preset of a file, of an experiment's name and a size, or of its own name
    (speedup_small).

    Raises:
        ConfigError: there is no such preset, it is no YAML, or it does not fit its
            experiment.
    """
    path, argument = Path(name_or_yaml), name_or_yaml
    if path.suffix not in (".yaml", ".yml"):
        if size not in SIZES:
            raise ConfigError(f"--preset {size} is unknown; use {' or '.join(SIZES)}.")
        path = FOLDER / f"{name_or_yaml}.yaml"
        if not path.is_file():
            path = FOLDER / f"{name_or_yaml}_{size}.yaml"
            argument = f"{name_or_yaml} --preset {size}"
    if not path.is_file():
        if path.parent != FOLDER:
            raise ConfigError(
                f"{path} is not there; give a YAML file, or the name of an experiment"
                f" ({', '.join(EXPERIMENTS)})."
            )
        # an unknown experiment is an error that names the known ones
        experiment(name_or_yaml)
        raise ConfigError(
            f"{name_or_yaml} has no preset {size}; `python -m lowrank_comm.lab list` shows the"
            " presets."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    return checked(content, path.stem, argument)


def names() -> list[str]:
    """Return the names of the package's presets, in the order of the experiments."""
    stems = {path.stem for path in FOLDER.glob("*.yaml")}
    ordered = [f"{name}_{size}" for name in EXPERIMENTS for size in SIZES]
    return [name for name in ordered if name in stems] + sorted(stems - set(ordered))


def _explain(preset: str, schema: type[BaseModel], detail: Any) -> str:
    """Return one pydantic error as a sentence with the key, the value and the fix."""
    path = ".".join(str(part) for part in ("settings", *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        known = schema.model_fields if len(detail["loc"]) == 1 else ()
        return f"preset {preset}: {path} is not a known key{nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"preset {preset}: {path} is missing; give it a value."
    return f"preset {preset}: {path}={detail['input']!r} is not possible: {detail['msg'].lower()}."
