"""Writes the tables of settings in the docs, between two markers of a page:

<!-- settings: written by python -m lowrank_comm.config tables FILE... -->
<!-- end of the settings -->
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable

from pydantic.fields import FieldInfo

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.config.section import OPTIMIZERS, Section, fields_of, model_of
from lowrank_comm.options import descriptions, members


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
    fields = model_of(default, Section).model_fields
    for key in dict.fromkeys(["compressor", "enabled", "rank", *default.options(), *fields]):
        name, written, values, _ = _row(key, fields[key])
        if key == "compressor":
            values = ", ".join(f'`"{name}"`' for name in [*REGISTRY, *OPTIMIZERS])
        yield [name, written, values, _meaning(said[key])]
        for inner, field in fields_of(fields[key].rebuild_annotation()).items():
            yield _row(f"{key}.{inner}", field)


def _options() -> Iterable[list[str]]:
    """Yield the options that compressors have beside `rank`, one row for those that
    mean the same.
    """
    yield from (["key", "default", "of", "values", "meaning"], ["---"] * 5)
    owners: dict[tuple[str, ...], list[str]] = {}
    for name, kind in REGISTRY.items():
        for key, field in model_of(kind).model_fields.items():
            owners.setdefault(tuple(_row(key, field)), []).append(name)
    for (key, default, values, meaning), names in sorted(owners.items()):
        if key != "`rank`":
            yield [key, default, ", ".join(names), values, meaning]


def _row(key: str, field: FieldInfo) -> list[str]:
    """Return a setting's key, default, values (as JSON writes both) and meaning."""
    parts = members(field.rebuild_annotation())
    values = [f"`{part}`" if part.startswith('"') else part for part in parts]
    return [f"`{key}`", _default(field), ", ".join(values), _meaning(field.description or "")]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if dataclasses.is_dataclass(default):
        # an object, whose keys say theirs
        return ""
    if isinstance(default, str):
        return f'`"{default}"`'
    return f"{default:g}" if isinstance(default, float) else json.dumps(default)


def _meaning(text: str) -> str:
    return text.removesuffix(".").replace("|", "\\|")
