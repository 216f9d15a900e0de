"""A check, and how it may end: found, skipped or failed.

A check is made by every rank of a process group together. It returns what it found,
raises `Skipped` with the reason on all ranks alike, or `Failed` with the numbers. Any
other exception is a failure too, after which the ranks may wait for one another: their
processes end, and new ones make the checks that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.device import Device


class Skipped(Exception):
    """A check that cannot be made here; its text is the reason."""


@dataclass
class Found:
    """What a check found.

    Attributes:
        text: the numbers, for the table.
        figures: the same by name, for the file.
    """

    text: str
    figures: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """A check that did not pass."""

    def __init__(self, found: Found) -> None:
        super().__init__(found.text)
        self.found = found


def demand(fine: bool, text: str, **figures: Any) -> Found:
    """Return the numbers of a check as its result, or raise them as its failure."""
    found = Found(text, figures)
    if not fine:
        raise Failed(found)
    return found


@dataclass(frozen=True)
class Check:
    """A row of the table, and what makes it."""

    name: str
    make: Callable[[Device], Found]
