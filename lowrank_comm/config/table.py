"""Writes the tables of settings in the docs, between two markers of a page:

<!-- settings: written by python -m lowrank_comm.config tables FILE... -->
<!-- end of the settings -->
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.config.section import OPTIMIZERS, Section, every_setting, inner_type
from lowrank_comm.options import descriptions, members, settings_of


def filled(page: str) -> str:
    """Return a page of Markdown with what stands between its markers written again."""
    for name, rows in (("settings", _settings()), ("options of the compressors", _options())):
        start, end = rf"<!-- {name}: [^\n]*-->\n", f"<!-- end of the {name} -->"
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        page = re.sub(rf"({start}).*?({end})", _around(table), page, flags=re.DOTALL)
    return page


def _around(table: str) -> Callable[[re.Match[str]], str]:
    return lambda found: found[1] + table + found[2]


def _settings() -> Iterable[list[str]]:
    """Yield the keys of a section with the default compressor, and those of its
    objects.
    """
    yield from (["key", "default", "values", "meaning"], ["---"] * 4)
    default = REGISTRY[Section.model_fields["compressor"].default]
    said = descriptions(default) | descriptions(Section)
    settings = every_setting(default)
    first = ["compressor", "enabled", "rank"]
    keys = [*first, *default.options(), *settings]
    for key, (hint, value) in {key: settings[key] for key in keys}.items():
        options = inner_type(hint)
        of_object = dataclasses.is_dataclass(options)
        if key == "compressor":
            values = ", ".join(f'`"{name}"`' for name in [*REGISTRY, *OPTIMIZERS])
        else:
            values = "a list of objects" if key == "rules" else _values(hint)
        yield [f"`{key}`", _default(key, value), values, _meaning(said[key])]
        if of_object:
            for inner, inner_hint, inner_value in settings_of(options):
                meaning = _meaning(descriptions(options)[inner])
                written = _written(inner_value)
                yield [f"`{key}.{inner}`", written, _values(inner_hint), meaning]


def _options() -> Iterable[list[str]]:
    """Yield the options that compressors have beside `rank`, one row for those that
    mean the same.
    """
    yield from (["key", "default", "of", "values", "meaning"], ["---"] * 5)
    owners: dict[tuple[str, str, str, str], list[str]] = {}
    for name, kind in REGISTRY.items():
        for key, hint, value in settings_of(kind):
            row = (f"`{key}`", _written(value), _values(hint), _meaning(descriptions(kind)[key]))
            owners.setdefault(row, []).append(name)
    for (key, default, values, meaning), names in sorted(owners.items()):
        if key != "`rank`":
            yield [key, default, ", ".join(names), values, meaning]


def _default(key: str, value: Any) -> str:
    """Return the default of a common key; the objects' own keys say theirs."""
    if key in Section.model_fields and Section.model_fields[key].default_factory:
        return {"enabled": "true", "rules": "[]"}.get(key, "")
    return _written(value)


def _written(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _values(hint: Any) -> str:
    """Return the values of a type as JSON writes them."""
    return ", ".join(f"`{part}`" if part.startswith('"') else part for part in members(hint))


def _meaning(text: str) -> str:
    return text.removesuffix(".").replace("|", "\\|")
