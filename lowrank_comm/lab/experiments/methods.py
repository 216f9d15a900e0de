"""A method in a preset: a name for tables and the section that configures it, as in a
configuration file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from lowrank_comm.lab.experiment import LabSettings


class SectionOf(LabSettings):
    """A section with a name.

    Attributes:
        name: in tables and case keys.
        section: as in a configuration file; see `config.Section`.
    """

    name: str
    section: dict[str, Any]


def names_differ(methods: Sequence[SectionOf]) -> Sequence[SectionOf]:
    """Return the methods; raise ValueError if two have the same name."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two methods have the name {name!r}")
    return methods


class WithMethods(LabSettings):
    """Settings with a list of methods whose names differ."""

    methods: list[SectionOf] = Field(min_length=1)

    @field_validator("methods")
    @classmethod
    def _names_differ(cls, methods: list[SectionOf]) -> list[SectionOf]:
        names_differ(methods)
        return methods

    def method(self, name: str) -> Any:
        return next(method for method in self.methods if method.name == name)

    def section(self, name: str) -> dict[str, Any]:
        """Return the section of the method with that name."""
        return dict(self.method(name).section)
