"""The section of `benchmarks.bench_growth`, and its plots: how a step grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.page.tables import digits, median, table

Point = dict[str, Any]
ABOUT = """\
Rank {rank}, unless it is the rank that grows. Bars in the plots are quartiles.
"""


@dataclass(frozen=True)
class Curve:
    """What is told of a curve.

    Attributes:
        heading: of its part of the page.
        about: what was measured.
        axis: what grows.
        times: key of a summary in ms -> what it is of.
        counts: key in "launches" -> whose counts they are.
        more: head of a further column -> its cell.
    """

    heading: str
    about: str
    axis: str
    times: dict[str, str]
    counts: dict[str, str]
    more: dict[str, Callable[[Point], str]]


BESIDE = {
    "ours_ms": "ours",
    "hook_ms": "hook",
    "hook_batched_ms": "hook, batched",
    "limit_ms": "limit",
}
COUNTS = {
    "cpu": "ours, CPU's path",
    "accelerator": "ours, accelerator's path",
    "hook_batched": "hook, batched",
}
CURVES = {
    "parameters": Curve(
        "Parameters",
        "LLaMA shapes of five sizes, beside the hook and the machine's limit as above.",
        "parameters",
        BESIDE,
        COUNTS,
        {"matrices": lambda point: str(point["matrices"])},
    ),
    "matrices": Curve(
        "Matrices of one total size",
        "Square matrices that have about {elements:.1f}M elements together.",
        "matrices",
        BESIDE,
        COUNTS,
        {},
    ),
    "rank": Curve(
        "Rank",
        "The LLaMA of 20M parameters.",
        "rank",
        BESIDE,
        COUNTS,
        {},
    ),
    "processes": Curve(
        "Workers as processes",
        "gloo processes that share the cores of this machine, on the LLaMA of 5M parameters;"
        " beside a step, the all-reduce of its uncompressed gradients by the same processes. With"
        " more processes than cores both take longer for that reason alone.",
        "workers",
        {"ours_ms": "ours, with its communication", "all_reduce_ms": "all-reduce, uncompressed"},
        {"a_worker": "a worker"},
        {},
    ),
    "simulated": Curve(
        "Workers simulated in one process",
        "`lowrank_comm.simulation` computes the workers of a model of 1M parameters in turn; a"
        " worker's share should stay level.",
        "workers",
        {"ours_ms": "all workers", "a_worker_ms": "a worker's share"},
        {"a_worker": "a worker's share"},
        {},
    ),
}


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file, with plots as <stem>.png."""
    results = evidence["results"]
    text = ["## How a step grows\n", ABOUT.format(rank=results["rank"])]
    for name, curve in CURVES.items():
        text += [
            f"### {curve.heading}\n",
            curve.about.format(elements=results["elements"] / 1e6) + "\n",
            f"![time, launches and bytes against {curve.axis}]({name}.png)\n",
            table(_heads(curve), [_cells(curve, point) for point in results["curves"][name]]),
        ]
    return "\n".join(text)


def _heads(curve: Curve) -> list[str]:
    heads = [curve.axis, *curve.more, *(f"{name}, ms" for name in curve.times.values())]
    for name in curve.counts.values():
        heads += [f"launches: {name}", "bytes / gradients"]
    return heads


def _cells(curve: Curve, point: Point) -> list[str]:
    x = f"{point['x'] / 1e6:.1f}M" if curve.axis == "parameters" else str(point["x"])
    cells = [x, *(cell(point) for cell in curve.more.values())]
    cells += [median(point[key]) for key in curve.times]
    for key in curve.counts:
        counted = point["launches"][key]
        cells += [digits(counted["launches"]), f"{counted['bytes_over_gradients']:.1f}"]
    return cells


def figures(evidence: dict[str, Any]) -> dict[str, Figure]:
    """Return file stem -> plot."""
    return {
        name: _drawn(curve, evidence["results"]["curves"][name]) for name, curve in CURVES.items()
    }


def _drawn(curve: Curve, points: Sequence[Point]) -> Figure:
    """Draw times, launches and bytes of a curve side by side."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    times, launches, touched = figure.subplots(1, 3)
    xs = [point["x"] for point in points]
    for key, name in curve.times.items():
        spent = [point[key] for point in points]
        middle = [one["median"] for one in spent]
        bars = [
            [one["median"] - one["low"] for one in spent],
            [one["high"] - one["median"] for one in spent],
        ]
        style = "--" if key == "limit_ms" else "-"
        times.errorbar(xs, middle, yerr=bars, fmt=f"{style}o", markersize=3, capsize=2, label=name)
    for key, name in curve.counts.items():
        counted = [point["launches"][key] for point in points]
        launches.plot(xs, [one["launches"] for one in counted], "-o", markersize=3, label=name)
        volume = [one["bytes_over_gradients"] for one in counted]
        touched.plot(xs, volume, "-o", markersize=3, label=name)
    labels = ("ms of a step", "operations of a step", "bytes / the gradients'")
    for axes, label in zip((times, launches, touched), labels, strict=True):
        _finished(axes, curve.axis, label, xs)
    touched.set_ylim(bottom=0)
    return figure


def _finished(axes: Axes, across: str, label: str, xs: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(xs, [f"{x / 1e6:.0f}M" if across == "parameters" else str(x) for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    if not label.startswith("bytes"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
