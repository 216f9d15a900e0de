"""What an experiment is: cases that are run one by one, and a page with figures
computed from their results alone.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[float, str], None]
"""Called with the share of a case that is done, from 0 to 1, and a few words on where
it is.
"""

Row = dict[str, Any]
"""A finished case: {"key", "params", "result", "seconds"}."""


@dataclass(frozen=True)
class Case:
    """One run of an experiment that does not depend on the others, except on cases of
    an earlier stage (`prepared`).

    Attributes:
        key: unique in the experiment; `run --only` selects by it.
        params: what distinguishes the case, plain values for JSON.
    """

    key: str
    params: dict[str, Any] = field(default_factory=dict)


class LabSettings(BaseModel):
    """Base of the settings of an experiment: no unknown keys, not changed after
    reading.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Experiment(abc.ABC):
    """Cases, how one is run, and what is drawn and written from the results.

    Class attributes:
        name: on the command line, and of the page.
        title: heading of the page.
        Settings: schema of a preset's `settings:`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]

    @abc.abstractmethod
    def cases(self, settings: Any) -> list[Case]:
        """All cases, in the order of the page."""

    @abc.abstractmethod
    def run(self, settings: Any, case: Case, progress: Progress) -> dict[str, Any]:
        """One case. The result is made of plain values for JSON; numbers that are not
        finite are kept as null.
        """

    @abc.abstractmethod
    def figures(self, settings: Any, rows: Sequence[Row]) -> dict[str, Figure]:
        """File stem -> figure, drawn from the rows alone; rows are in the order of
        `cases`, and some may be missing.
        """

    @abc.abstractmethod
    def page(self, settings: Any, rows: Sequence[Row]) -> str:
        """Markdown below the heading. Figures are shown as ![what it is](stem.png);
        every number is computed from rows.
        """

    def depends_on(self, settings: Any, case: Case) -> Any:
        """What the result of a case depends on beside its params, as plain values: a
        row is refused when it has changed.

        All settings, unless an experiment knows better (a grid that may grow without
        being run anew).
        """
        return settings.model_dump(mode="json")

    def stage(self, settings: Any, case: Case) -> int:
        """Cases of a stage start when those of lower stages have ended; all are of one,
        unless an experiment says so.
        """
        return 0

    def prepared(self, settings: Any, case: Case, rows: Sequence[Row]) -> Case:
        """The case with what it takes from finished rows added to its params, e.g. a
        learning rate that was tuned.

        Its params go into its row; `depends_on` is asked of the case as `cases` gave
        it.

        Raises:
            ConfigError: rows that it needs are missing.
        """
        return case
