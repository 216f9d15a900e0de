"""Settings, written once: a dataclass whose types say which values a setting may have,
and whose docstring says what it means.

    @dataclass(frozen=True)
    class Example:
        \"\"\"...

        Args:
            rank: r of the factors.
            side: of the basis.
        \"\"\"

        rank: PositiveInt = 4
        side: Literal["short", "long"] = "short"

        def __post_init__(self) -> None:
            check_options(self, "Example: ")

The checks below, the JSON section (`config.section`), its JSON Schema (`config.schema`)
and the table of settings in the docs (`config.table`) are derived from the two.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

from pydantic import AllowInfNan, ConfigDict, Field, TypeAdapter, ValidationError

from lowrank_comm.errors import ConfigError, nearest

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
"""A number above 0 and at most 1."""


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "True or False",
    "string": "a string",
    "array": "a list of objects",
    "null": "None",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""How error messages say the types and bounds of JSON Schema."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """Metadata of a setting's type: what to do about a value that it cannot have.

    Args:
        text: a clause of the error message, a format string for `value` as JSON.
        when: which of these values it is for; None for all.
    """

    text: str
    when: Callable[[Any], bool] | None = None


Rate = Annotated[float, Field(ge=0), AllowInfNan(False), Advice("0 compresses every matrix")]
Seed = Annotated[
    int,
    Field(ge=-(2**63), lt=2**63),
    Advice("it has 64 bits, the same on all workers; write for example seed=0"),
]


def check_options(options: Any, where: str) -> None:
    """Check every field of a dataclass against its type.

    Args:
        options: a dataclass instance.
        where: stands before the names in error messages: "PowerSGD: " or
            "quantization.".

    Raises:
        ConfigError: naming the key, the value found, and the values that are possible.
    """
    kind: Any = type(options)
    for key, hint, default in settings_of(kind):
        check(f"{where}{key}", getattr(options, key), hint, default)


def check(name: str, value: Any, hint: Any, default: Any = None) -> None:
    """Raise a ConfigError that names `name` unless `value` is of the type `hint`.

    No type is converted into another: True is no integer, 4.0 neither, and 4 is a
    number.
    """
    try:
        _adapter(hint).validate_python(value)
    except ValidationError:
        raise ConfigError(complaint(name, value, hint, default)) from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True))


@functools.cache
def settings_of(options: type) -> tuple[tuple[str, Any, Any], ...]:
    """Return (name, type, default) of each field of a dataclass; `dataclasses.MISSING`
    where it has no default.
    """
    hints = get_type_hints(options, include_extras=True)
    fields = dataclasses.fields(cast(Any, options))
    return tuple((field.name, hints[field.name], field.default) for field in fields)


def complaint(name: str, value: Any, hint: Any, default: Any = None) -> str:
    """Return what is wrong with a value that is not of the type `hint`: the name, the
    value, what would be possible, and advice, the nearest word or an example.
    """
    # of the JSON section, or of an argument in Python
    none, quoted = ("None", repr) if ": " in name else ("null", json.dumps)
    parts = _parts(hint)
    words = [word for part in parts for word in _words(part)] if isinstance(value, str) else []
    if words:
        others = [_in_words(part).replace("None", none) for part in parts if not _words(part)]
        allowed = ", ".join([*map(quoted, words), *others])
        text = f"{name}={value!r} is unknown; choose one of {allowed}"
    else:
        possible = " or ".join(map(_in_words, parts)).replace("None", none)
        text = f"{name}={value!r} is not possible: expected {possible}, got {value!r}"
    advice = [
        one.text.format(value=json.dumps(value, default=repr))
        for one in _metadata(hint)
        if isinstance(one, Advice) and (one.when is None or one.when(value))
    ]
    if advice:
        return f"{text}; {'; '.join(advice)}."
    if words:
        return text + nearest(value, words)
    if isinstance(default, int | float) and not isinstance(default, bool):
        return f"{text}; write for example {re.split(r'[.: ]', name)[-1]}={default!r}."
    return f"{text}."


def members(hint: Any) -> list[str]:
    """Return the values of a type one by one, as JSON writes them: '"svd"', "null", "an
    integer of at least 1".
    """
    in_json = {"None": "null", "True or False": "true, false"}
    found = []
    for part in _parts(hint):
        said = _in_words(part)
        found += [f'"{word}"' for word in _words(part)] or [in_json.get(said, said)]
    return found


def _parts(hint: Any) -> list[dict[str, Any]]:
    """Return the JSON Schema of each member of a union; of another type, its own."""
    schema = TypeAdapter(hint).json_schema()
    return schema.get("anyOf", [schema])


def _words(part: dict[str, Any]) -> list[str]:
    """Return the words that a setting may be by this schema."""
    return part.get("enum", [part["const"]] if "const" in part else [])


def _in_words(part: dict[str, Any]) -> str:
    """Return the values that fit a schema: "an integer of at least 1"."""
    words = [repr(word) for word in _words(part)]
    if words:
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    bounds = [f"{said} {part[key]}" for key, said in _BOUNDS.items() if key in part]
    kind = _KINDS.get(part.get("type", ""), "an object")
    return f"{kind} {' and '.join(bounds)}".rstrip().replace(str(2**63), "2^63")


def _metadata(hint: Any) -> Iterator[Any]:
    """Yield all metadata of a type and of the members of its union."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        yield from metadata
        yield from _metadata(inner)
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _metadata(part)


@functools.cache
def descriptions(options: type) -> dict[str, str]:
    """Return what each setting means, from the Args of the class's docstring and of the
    classes that it inherits from.
    """
    found: dict[str, str] = {}
    for one in options.__mro__:
        for key, text in _described(one.__doc__ or ""):
            found.setdefault(key, text)
    return found


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the entries under "Args:" of a docstring, each on one line."""
    _, _, behind = inspect.cleandoc(docstring).partition("\nArgs:\n")
    arguments = re.split(r"\n\S", behind, maxsplit=1)[0]
    for entry in re.split(r"\n(?= {4}\w)", f"\n{arguments}"):
        keys, colon, text = entry.strip().partition(": ")
        if colon:
            for key in keys.split(", "):
                yield key, " ".join(text.split())
