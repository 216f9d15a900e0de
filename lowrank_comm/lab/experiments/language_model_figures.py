"""The figures of `language_model`, drawn from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.language_model_results import Part, of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def figures(settings: Any, rows: Sequence[Row]) -> dict[str, Figure]:
    """Return file stem -> figure: gap to full precision, training losses."""
    final = Part(settings, rows, "final")
    gap = Figure(figsize=(11, 0.42 * len(final.methods) + 2.2), layout="constrained")
    left, right = gap.subplots(1, 2, width_ratios=(3, 2))
    _draw_gaps(left, final)
    _draw_traffic(right, final)
    curves = Figure(figsize=(8, 4.8), layout="constrained")
    _draw_curves(curves.subplots(), final)
    return {"gap": gap, "curves": curves}


def _draw_gaps(axes: Axes, part: Part) -> None:
    """Draw ratios to full precision: for each rank the mean with its deviation, dots
    for the seeds, diamonds for the paper.
    """
    names = [name for name in part.methods if part.settings.methods[name].has_rank]
    full = part.settings.reference
    for at, rank in enumerate(part.ranks):
        colour = f"C{at}"
        for place, name in enumerate(names):
            y = place + 0.22 * (at - (len(part.ranks) - 1) / 2)
            own, reference = part.values(name, rank), part.values(full, rank)
            seeds = [own[seed] / reference[seed] for seed in own if seed in reference]
            axes.plot(seeds, [y] * len(seeds), ".", color=colour, alpha=0.4)
            if found := part.gap(name, rank):
                axes.errorbar(found.mean, y, xerr=found.deviation, fmt="o", color=colour, capsize=3)
            if (paper := part.paper_gap(name, rank)) is not None:
                axes.plot(paper, y, "D", markerfacecolor="none", color=colour)
        axes.plot([], [], "o", color=colour, label=f"rank {rank}")
    label = f"the paper, LLaMA {part.column} on C4"
    axes.plot([], [], "D", markerfacecolor="none", color="grey", label=label)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(
        range(len(names)), [f"{part.label(name)}  {_number(part, name)}" for name in names]
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0))
    axes.set_xlabel("held-out perplexity / that of full precision")
    axes.legend(fontsize="small")


def _number(part: Part, method: str) -> str:
    """Return the method's number in the figure: names would cover their neighbours."""
    return str(part.methods.index(method))


def _draw_traffic(axes: Axes, part: Part) -> None:
    """Draw mean ratios to full precision against the bytes of a step, methods by
    number.
    """
    for at, rank in enumerate(part.ranks):
        for name in part.methods:
            rows = of(part.rows, part.part, name, part.rank_of(name, rank))
            found = part.gap(name, rank)
            if not rows or found is None or (part.rank_of(name, rank) is None and at):
                continue
            sent = rows[0]["result"]["sent"]["bytes_per_step"] / 1e3
            colour = f"C{at}" if part.settings.methods[name].has_rank else "grey"
            axes.plot(sent, found.mean, "o", color=colour, markersize=4)
            text = _number(part, name) if part.settings.methods[name].has_rank else part.label(name)
            side = -1 if at == 0 else 1
            axes.annotate(
                text,
                (sent, found.mean),
                fontsize=8,
                color=colour,
                xytext=(5 * side, 0),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="center",
            )
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1.0, 2.0, 5.0))
    axes.margins(x=0.25)
    axes.set_xlabel("kB that a worker sends a step")
    axes.set_ylabel("mean ratio to full precision")


def _plain_ticks(axis: Any, steps: tuple[float, ...]) -> None:
    """Label a logarithmic axis with few ticks, as 1.1 and not 10^0.04."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_curves(axes: Axes, part: Part) -> None:
    """Draw worker 0's training loss, mean over the seeds, at the first rank."""
    rank = part.ranks[0]
    for at, name in enumerate(part.methods):
        runs = [
            row["result"]["curve"]
            for row in of(part.rows, part.part, name, part.rank_of(name, rank))
        ]
        points: dict[int, list[float]] = {}
        for step, loss in (point for run in runs for point in run):
            if loss is not None:
                points.setdefault(step, []).append(loss)
        if points:
            means = [sum(losses) / len(losses) for losses in points.values()]
            style = "-" if at < 10 else "--"
            axes.plot(
                list(points), means, style, label=part.label(name), linewidth=2 if at == 0 else 1.2
            )
    axes.set_xlabel(f"step (rank {rank})")
    axes.set_ylabel("training loss, mean over the seeds")
    axes.legend(fontsize="small")
