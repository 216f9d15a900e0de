"""The rows of a run: JSON lines, by which an interrupted run goes on.

    {"kind": "setup", "network", "model", "sources", "methods": {key: ...}}
    {"kind": "round", "network", "model", "sources", "round", "methods": {key: ...}}

A round's line holds every method once, by key, with lists over the hosts. Lines of
other sources, or without a method that is asked for, do not count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """What the hosts of one network are to do.

    Attributes:
        network: a key of `bench_network.NETWORKS`.
        methods: keys of `methods.METHODS`.
        rounds: model -> numbers of the rounds that are missing.
        seconds: that a repetition of a fast method lasts.
        epfml: the folder with epfml's package, if that is among the methods.
        sources: hash that every row gets.
        rows: the file.
    """

    network: str
    methods: list[str]
    rounds: dict[str, list[int]]
    seconds: float
    epfml: str | None
    sources: str
    rows: str


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, after one that a kill may have cut off."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))


def load(path: Path, sources: str, network: str, model: str) -> list[dict[str, Any]]:
    """Return the rows of a network and a model that these sources have made."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # empty, or cut off by a kill
            continue
        if (row["sources"], row["network"], row["model"]) == (sources, network, model):
            found.append(row)
    return found


def setup(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is known of each method, by the latest run that had it."""
    known: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "setup":
            known |= {
                key: {"barrier": row["barrier"], **one} for key, one in row["methods"].items()
            }
    return known


def rounds(rows: list[dict[str, Any]], methods: list[str]) -> dict[int, dict[str, Any]]:
    """Return the rounds that hold all of these methods: number -> method -> values."""
    return {
        row["round"]: row["methods"]
        for row in rows
        if row["kind"] == "round" and set(methods) <= row["methods"].keys()
    }
