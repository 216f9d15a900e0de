"""The rows of a run: one JSON line a finished case, in a file that only grows, so that
a run can be killed at any time.

A line: {"key", "params", "result", "seconds", "made_for", "code", "versions"}.
`made_for` is a hash of all settings that the result depends on; a row that was made for
other settings is never mixed with new ones. `code` is the hash of the sources that the
experiment imports (`sources`), `versions` are those of this library and torch. Rows of
another version are kept, and a run reports them, since most changes affect no result. A
last line without its end, which a killed run leaves, does not count and is cut off
before the next row is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.experiment import Case, Experiment, Row

FILE = "rows.jsonl"


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits of the sha256 of plain values, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def made_for(experiment: Experiment, settings: Any, case: Case) -> str:
    """Return the fingerprint of all that the case's result depends on."""
    return fingerprint([experiment.name, experiment.depends_on(settings, case), case.params])


def plain(value: Any, digits: int | None = None) -> Any:
    """Return the value in JSON's types: numbers that are not finite become null, and
    floats are cut to `digits` if given.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def line(row: Mapping[str, Any], digits: int | None = None) -> str:
    """Return a row as one compact line."""
    return (
        json.dumps(plain(row, digits), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def read_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines, without a last line that does not end.

    Raises:
        ConfigError: a line that ends is no JSON.
    """
    if not path.is_file():
        return []
    values = []
    text = path.read_bytes()
    for number, raw in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values.append(json.loads(raw))
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number} is no JSON ({error}); delete the line, and its case is run"
                " again."
            ) from None
    return values


class Rows:
    """The rows of one output folder.

    Args:
        folder: of the run; made when the first row is written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def of(self, experiment: Experiment, settings: Any, cases: Iterable[Case]) -> dict[str, Row]:
        """Return key -> row of the cases that are finished.

        Raises:
            ConfigError: a row of one of the cases was made for other settings.
        """
        found = {row["key"]: row for row in read_lines(self.path)}
        rows = {case.key: found[case.key] for case in cases if case.key in found}
        other = [
            case.key
            for case in cases
            if case.key in rows
            and rows[case.key]["made_for"] != made_for(experiment, settings, case)
        ]
        if other:
            raise ConfigError(
                f"{self.path} holds {len(other)} rows that were made for other settings (the first:"
                f" {other[0]}); give another --output-dir, or delete that file to run all cases"
                " again."
            )
        return rows

    def adopt(self, rows: Iterable[Row]) -> None:
        """Append published rows whose cases are not finished here.

        Raises:
            ConfigError: a row does not say what it was made for.
        """
        here = {row["key"] for row in read_lines(self.path)}
        for row in rows:
            if "made_for" not in row:
                raise ConfigError(
                    f"the published row {row['key']} does not say what it was made for; it is from"
                    " before rows did, so run its case again."
                )
            if row["key"] not in here:
                self.append(row)

    def append(self, row: Row) -> None:
        """Write a finished case; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(line(row).encode())
            file.flush()
            os.fsync(file.fileno())
