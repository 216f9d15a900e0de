"""Progress bars of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Bars:
    """A bar for all cases and one for each case that is running; silent without a
    display.
    """

    def __init__(self, display: Progress | None, name: str, total: int, done: int) -> None:
        self._display = display
        self._whole = (
            display.add_task(name, total=total, completed=done, where="") if display else None
        )
        self._running: dict[str, TaskID] = {}

    def at(self, key: str, share: float, text: str) -> None:
        if self._display is None:
            return
        if key not in self._running:
            self._running[key] = self._display.add_task(f"  {key}", total=1.0, where=text)
        self._display.update(self._running[key], completed=share, where=text)

    def case_ended(self, key: str, failed: bool) -> None:
        if self._display is None or self._whole is None:
            return
        if key in self._running:
            self._display.remove_task(self._running.pop(key))
        if failed:
            self._display.console.print(f"failed: {key}")
        else:
            self._display.advance(self._whole)


@contextmanager
def progress_bars(console: Console | None, name: str, total: int, done: int) -> Iterator[Bars]:
    if console is None:
        yield Bars(None, name, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[where]}"),
    )
    with Progress(*columns, console=console, transient=True) as display:
        yield Bars(display, name, total, done)
