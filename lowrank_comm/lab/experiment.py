"""The interface of an experiment: cases that are run one by one, and a page with
figures computed from their results alone.
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
"""Called with the share of a case that is done, from 0 to 1, and a few words on it."""

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
    """Base of an experiment's settings: no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Experiment(abc.ABC):
    """Cases, how one is run, and what is drawn and written from the results.

    Class attributes:
        name: on the command line, and of the page.
        title: heading of the page.
        Settings: schema of a preset's `settings:`.
        paper: sentence at the top of the page that names the paper in question.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]
    paper: ClassVar[str] = "The paper is that of PowerSGD+, arXiv 2509.11254."

    @abc.abstractmethod
    def cases(self, settings: Any) -> list[Case]:
        """Return all cases, in the order of the page."""

    @abc.abstractmethod
    def run(self, settings: Any, case: Case, progress: Progress) -> dict[str, Any]:
        """Run one case. The result is made of plain values for JSON; numbers that are
        not finite become null.
        """

    @abc.abstractmethod
    def figures(self, settings: Any, rows: Sequence[Row]) -> dict[str, Figure]:
        """Return file stem -> figure, drawn from the rows alone. The rows are in the
        order of `cases`; some may be missing.
        """

    @abc.abstractmethod
    def page(self, settings: Any, rows: Sequence[Row]) -> str:
        """Return the Markdown below the heading. Figures are shown as ![what it
        is](stem.png); every number is computed from rows.
        """

    def depends_on(self, settings: Any, case: Case) -> Any:
        """Return what the result of a case depends on beside its params, as plain
        values; a row is refused when it has changed.

        By default these are all settings. An experiment may leave out those that do not
        matter to a case, such as the other values of a grid.
        """
        return settings.model_dump(mode="json")

    def stage(self, settings: Any, case: Case) -> int:
        """Return the case's stage: its cases start when those of lower stages have
        ended. By default there is one stage.
        """
        return 0

    def prepared(self, settings: Any, case: Case, rows: Sequence[Row]) -> Case:
        """Return the case with what it takes from finished rows added to its params,
        e.g. a tuned learning rate.

        The params returned go into the row; `depends_on` receives the case as `cases`
        made it.

        Raises:
            ConfigError: rows that it needs are missing.
        """
        return case
