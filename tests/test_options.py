"""Settings are checked by their types, and described by the class's docstring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import (
    Advice,
    PositiveInt,
    Rate,
    Share,
    check,
    check_options,
    descriptions,
    members,
)


@dataclass(frozen=True)
class Example:
    """Some settings.

    Args:
        rank, other: how many, in
            two lines.
        side: "short": or "long".

    Raises:
        ConfigError: never: this is no setting.
    """

    rank: PositiveInt = 4
    other: PositiveInt | None = None
    side: Literal["short", "long"] = "short"

    def __post_init__(self) -> None:
        check_options(self, "Example: ")


@dataclass(frozen=True)
class Special(Example):
    """More of them.

    Args:
        side: described here.
    """


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        (0, PositiveInt, "x=0 .*expected an integer of at least 1, got 0; .*example x=4"),
        (True, PositiveInt, "x=True"),
        (2.0, PositiveInt, "x=2.0"),
        (0, Share, "above 0 and at most 1"),
        (float("nan"), Rate, "x=nan"),
        (float("inf"), Rate, "x=inf"),
        ("ab", Literal["abc", "d"] | None, r"one of \"abc\", \"d\", null; did you mean 'abc'\?"),
        (0, PositiveInt | Literal["full"], "an integer of at least 1 or 'full'"),
        (1, bool, "True or False"),
        (None, Annotated[str, Advice("write {value}")], "write null"),
    ],
)
def test_a_value_of_another_type(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check("section.x", value, hint, 4)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(1, PositiveInt), (1, Share), (0, Rate), (None, Rate | None), ("d", Literal["abc", "d"])],
)
def test_a_value_of_the_type(value: Any, hint: Any) -> None:
    check("x", value, hint)


def test_a_dataclass_checks_itself() -> None:
    Example(1, 2, "long")
    with pytest.raises(ConfigError, match=r"Example: side='left' is unknown.*'short', 'long'"):
        Example(side="left")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="integer of at least 1 or None"):
        Example(other=0)


def test_descriptions() -> None:
    twice = "how many, in two lines."
    assert descriptions(Example) == {"rank": twice, "other": twice, "side": '"short": or "long".'}
    assert descriptions(Special) == {"rank": twice, "other": twice, "side": "described here."}
    assert members(PositiveInt | Literal["a"] | None) == ["an integer of at least 1", '"a"', "null"]


def test_every_option_of_a_compressor_is_described() -> None:
    for kind in REGISTRY.values():
        assert set(kind.options()) <= descriptions(kind).keys(), kind
