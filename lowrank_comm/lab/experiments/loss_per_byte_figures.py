"""The figures of `loss_per_byte`, drawn from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.loss_per_byte_results import (
    DENSE,
    GOAL_GAP,
    GOAL_RATIO,
    Final,
    rows_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = {"dense": ("s", "black"), "preset": ("D", "C3"), "rival": ("o", "C0"), "other": (".", "C7")}


def figures(settings: Any, rows: Sequence[Row]) -> dict[str, Figure]:
    """Return file stem -> figure: bytes against gap, and training losses."""
    parts = [Final(settings, rows, base) for base in settings.bases]
    pareto = Figure(figsize=(6.5 * len(parts), 6), layout="constrained")
    for axes, part in zip(pareto.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw_pareto(axes, part)
    found = {"pareto": pareto}
    if settings.curves:
        found["curves"] = Figure(figsize=(6.5 * len(parts), 4.5), layout="constrained")
        grid = found["curves"].subplots(1, len(parts), squeeze=False)[0]
        for axes, part in zip(grid, parts, strict=True):
            _draw_curves(axes, part, rows)
    return found


def _draw_pareto(axes: Axes, part: Final) -> None:
    """Draw each method's gap with its interval against the bytes of a step, and the
    front as a line; the numbers are those of the table.
    """
    for number, point in enumerate(part.points):
        mark, colour = MARKS[point.group]
        gap = point.gap
        low, high = gap.low or gap.value, gap.high or gap.value
        on_front = part.beaten_by(point) is None
        axes.errorbar(
            point.sent / 1e3,
            100 * (gap.value - 1),
            yerr=[[100 * (gap.value - low)], [100 * (high - gap.value)]],
            fmt=mark,
            color=colour,
            markerfacecolor=colour if on_front else "none",
            capsize=2,
            elinewidth=0.8,
        )
        axes.annotate(
            str(number),
            (point.sent / 1e3, 100 * (gap.value - 1)),
            fontsize=7,
            xytext=(4, 3),
            textcoords="offset points",
        )
    front = sorted(
        (point.sent / 1e3, 100 * (point.gap.value - 1))
        for point in part.points
        if part.beaten_by(point) is None
    )
    axes.plot(*zip(*front, strict=True), color="C3", linewidth=0.8) if front else None
    dense = part.point(DENSE)
    if dense is not None:
        axes.axvline(dense.sent / 1e3 / GOAL_RATIO, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(100 * GOAL_GAP, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_locator(_Ticks())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_title(part.base)
    axes.set_xlabel("kB that a worker sends a step")
    axes.set_ylabel("perplexity behind uncompressed training, %")


class _Ticks(LogLocator):
    """Ticks of the gap's axis, linear to 10 % and logarithmic beyond."""

    def __call__(self) -> list[float]:
        assert self.axis is not None
        low, high = self.axis.get_view_interval()
        return [x for x in (-10, -5, 0, 3, 5, 10, 20, 30, 50, 100, 200, 500) if low <= x <= high]


def _draw_curves(axes: Axes, part: Final, rows: Sequence[Row]) -> None:
    """Draw worker 0's training loss, mean over the seeds."""
    for name in (DENSE, *part.settings.curves):
        points: dict[int, list[float]] = {}
        for row in rows_of(rows, "final", part.base, name):
            for step, loss in row["result"]["curve"]:
                if loss is not None:
                    points.setdefault(step, []).append(loss)
        if points:
            means = [sum(losses) / len(losses) for losses in points.values()]
            axes.plot(list(points), means, label=part.label(name), linewidth=1.2)
    axes.set_title(part.base)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean over the seeds")
    axes.legend(fontsize="small")
