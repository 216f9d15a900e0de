"""The note that a run leaves in its folder, run.json: what was run, by which command,
on which machine and when.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.runner.machine import machine
from lowrank_comm.lab.runner.preset import Preset
from lowrank_comm.lab.runner.rows import fingerprint

RUN_FILE = "run.json"


def write_note(preset: Preset, folder: Path) -> None:
    """Write the folder's run.json, once for each version of the settings."""
    settings = preset.settings.model_dump(mode="json")
    path = folder / RUN_FILE
    if path.is_file() and read_note(path)["settings_hash"] == fingerprint(settings):
        return
    folder.mkdir(parents=True, exist_ok=True)
    note = {
        "experiment": preset.experiment.name,
        "preset": preset.name,
        "description": preset.description,
        "command": f"python -m lowrank_comm.lab run {preset.argument}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "settings_hash": fingerprint(settings),
        "settings": settings,
    }
    # a killed run leaves the old note or the new one, never half of one
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def read_note(path: Path) -> dict[str, Any]:
    """Return the content of a folder's run.json.

    Raises:
        ConfigError: the file is not complete JSON.
    """
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no JSON ({error}); delete it, and `run` writes it again; the rows stay."
        ) from None
    return note
