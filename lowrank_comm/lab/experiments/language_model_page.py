"""The page and figures of `language_model`, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import (
    Spread,
    difference,
    listed,
    magnitude,
    ratio,
    table,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER: dict[str, dict[str, dict[int | None, float]]] = {
    "60M": {
        "adam": {None: 29.88},
        "powersgd": {4: 36.11, 8: 32.57},
        "powersgd_plus": {4: 35.46, 8: 32.63},
        "galore": {4: 94.96, 8: 92.91},
    },
    "130M": {
        "adam": {None: 23.06},
        "powersgd": {4: 27.60, 8: 26.24},
        "powersgd_plus": {4: 27.36, 8: 26.11},
        "galore": {4: 92.93, 8: 70.55},
    },
}
"""Perplexity on C4: Table 3 of arXiv 2509.11254. One seed; GaLore's are reported as
diverged.
"""

ORDER = (
    ("adam", "powersgd"),
    ("adam", "powersgd_plus"),
    ("powersgd_plus", "powersgd"),
    ("powersgd", "galore"),
)
"""Pairs whose order the paper's table states."""

Values = dict[int, float]
"""Seed -> perplexity."""


def tuning(rows: Iterable[Row]) -> dict[str, dict[float, float | None]]:
    """Method -> learning rate -> held-out perplexity of its tuning run; None where it
    diverged.
    """
    found: dict[str, dict[float, float | None]] = {}
    for row in rows:
        if row["params"]["part"] == "tune":
            found.setdefault(row["params"]["method"], {})[row["params"]["learning_rate"]] = row[
                "result"
            ]["perplexity"]
    return found


def chosen_rate(tuned: dict[float, float | None]) -> float | None:
    """The learning rate of the lowest perplexity; None if all diverged."""
    finite = {rate: perplexity for rate, perplexity in tuned.items() if perplexity is not None}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def perplexities(rows: Iterable[Row], part: str, method: str, rank: int | None) -> Values:
    """Seed -> perplexity of the runs that did not diverge."""
    return {
        row["params"]["seed"]: row["result"]["perplexity"]
        for row in of(rows, part, method, rank)
        if row["result"]["perplexity"] is not None
    }


def of(rows: Iterable[Row], part: str, method: str, rank: int | None) -> list[Row]:
    """The rows of a method at a rank."""
    wanted = {"part": part, "method": method, "rank": rank}
    return [
        row for row in rows if all(row["params"][key] == value for key, value in wanted.items())
    ]


class _Part:
    """The final runs, or those of the larger model, with the figures that tables and
    plots need.
    """

    def __init__(self, settings: Any, rows: Sequence[Row], part: str) -> None:
        self.settings, self.rows, self.part = settings, rows, part
        larger = settings.larger if part == "larger" else None
        self.methods = [
            name for name in settings.methods if larger is None or name in larger.methods
        ]
        self.ranks = larger.ranks if larger else settings.ranks
        self.column = "130M" if larger and larger.training.model == "130M" else settings.paper

    def rank_of(self, method: str, rank: int) -> int | None:
        return rank if self.settings.methods[method].has_rank else None

    def values(self, method: str, rank: int) -> Values:
        return perplexities(self.rows, self.part, method, self.rank_of(method, rank))

    def gap(self, method: str, rank: int) -> Spread | None:
        """Perplexity over that of full precision, seed by seed."""
        return ratio(self.values(method, rank), self.values(self.settings.reference, rank))

    def paper(self, method: str, rank: int) -> float | None:
        """The paper's perplexity."""
        return PAPER[self.column].get(method, {}).get(self.rank_of(method, rank))

    def paper_gap(self, method: str, rank: int) -> float | None:
        """The paper's ratio to full precision."""
        own, full = self.paper(method, rank), self.paper("adam", rank)
        return None if own is None or full is None else own / full

    def label(self, method: str) -> str:
        return str(self.settings.methods[method].label)

    def against(self, method: str, other: str, rank: int) -> str:
        """How much larger the perplexity is than another method's, and whether that is
        inside the spread.
        """
        found = ratio(self.values(method, rank), self.values(other, rank))
        if method == other or found is None:
            return "-"
        off = Spread(
            found.n,
            100 * (found.mean - 1),
            None if found.deviation is None else 100 * found.deviation,
        )
        if off.half_width is None:
            return f"{off.mean:+.1f} %"
        return f"{off.mean:+.1f} ± {off.half_width:.1f} %" + (
            ", inside the spread" if off.sign == 0 else ""
        )

    def lines(self, rank: int) -> list[list[str]]:
        """The table of a rank."""
        lines = []
        for name in self.methods:
            rows = of(self.rows, self.part, name, self.rank_of(name, rank))
            if not rows:
                continue
            values = Spread.of(list(self.values(name, rank).values()))
            gap = self.gap(name, rank)
            paper = None
            paper = self.paper_gap(name, rank)
            lost = sum(row["result"]["diverged"] for row in rows)
            diverged = f" ({lost} of {len(rows)} diverged)" if lost else ""
            sent = rows[0]["result"]["sent"]
            lines.append(
                [
                    self.label(name),
                    f"{rows[0]['params']['learning_rate']:g}",
                    (values.text(2) if values else "-") + diverged,
                    gap.text(3) if gap else "-",
                    "-" if paper is None else f"{paper:.3f}",
                    self.against(name, "powersgd", rank) if "powersgd" in self.methods else "-",
                    magnitude(sent["bytes_per_step"]),
                    f"{sent['ratio']:.1f}",
                ]
            )
        return lines

    def claims(self, rank: int) -> list[str]:
        """What the paper's table says of the order, and what came out."""
        said = []
        for left, right in ORDER:
            if left not in self.methods or right not in self.methods:
                continue
            a, b = self.paper(left, rank), self.paper(right, rank)
            if a is None or b is None:
                continue
            sign = "<" if a < b else ">"
            claim = (
                f"rank {rank}, {self.label(left)} {sign} {self.label(right)} (paper: {a:.2f} {sign}"
                f" {b:.2f})"
            )
            found = difference(self.values(left, rank), self.values(right, rank))
            said.append(verdict(claim, found, -1 if a < b else 1, 2))
        return said

    def shrinking(self) -> list[str]:
        """Whether a higher rank gives a lower perplexity, method by method."""
        said = []
        for low, high in zip(self.ranks, self.ranks[1:], strict=False):
            for name in self.methods:
                if self.settings.methods[name].has_rank:
                    found = difference(self.values(name, high), self.values(name, low))
                    said.append(
                        verdict(f"{self.label(name)}: rank {high} < rank {low}", found, -1, 2)
                    )
        return said


HEADS = (
    "method", "learning rate", "perplexity", "ratio to full precision", "the paper's ratio", "against PowerSGD",
    "sent a step", "times less",
)  # fmt: skip


def page(settings: Any, rows: Sequence[Row]) -> str:
    """The body of the page."""
    parts = [
        _about(settings, rows),
        "![Gap to full precision by method, and against the bytes sent](gap.png)",
    ]
    final = _Part(settings, rows, "final")
    for rank in final.ranks:
        parts += [f"## Rank {rank}", table(HEADS, final.lines(rank))]
    parts += [
        "Perplexity: mean ± standard deviation over the seeds. Ratio: of each seed's perplexities,"
        f" in the same way; beside it that of the paper's Table 3 (LLaMA {settings.paper} on C4,"
        " one seed; its GaLore runs are reported as diverged). Against PowerSGD: mean of the"
        " seeds' relative differences ± half of the 95 % confidence interval (Student's t); where"
        " that holds zero, the difference is inside the spread. Sent a step: the ledger's count of"
        " a worker; times less: than uncompressed, both as handed to the collectives."
        + _gathered(settings, rows),
        "## The paper's order",
        listed([claim for rank in final.ranks for claim in final.claims(rank)]),
        "## Does the gap shrink with the rank?",
        listed(final.shrinking()),
        f"![Training loss of every method at rank {final.ranks[0]}](curves.png)",
        "## Learning rates",
        _tuning_table(settings, rows),
    ]
    if settings.larger is not None:
        parts += _larger(settings, rows)
    return "\n\n".join(parts)


def _gathered(settings: Any, rows: Sequence[Row]) -> str:
    """That a gather's bytes weigh more."""
    final = [row for row in rows if row["params"]["part"] != "tune"]
    gathering = {
        row["params"]["method"] for row in final if "gather" in row["result"]["sent"]["bytes"]
    }
    names = [name for name in settings.methods if name in gathering]
    if not names:
        return ""
    return (
        f" What {', '.join(settings.methods[name].label for name in names)} sends is gathered: over"
        f" each link go N / 2 = {settings.workers / 2:g} times as many bytes as in an all-reduce of"
        " the same number."
    )


def _periods(settings: Any) -> str:
    """The methods' tau, where all that restart have the same."""
    periods = {
        method.section["restart_every"]
        for method in settings.methods.values()
        if "restart_every" in method.section
    }
    return f", tau = {periods.pop()} for all that restart" if len(periods) == 1 else ""


def _about(settings: Any, rows: Sequence[Row]) -> str:
    training, recipe = settings.training, settings.training.recipe
    tokens = settings.workers * training.batch * settings.text.sequence_length
    text = (
        settings.text.hub or settings.text.documents or settings.text.file or "Shakespeare's plays"
    )
    sizes = {row["result"]["parameters"] for row in rows if row["params"]["part"] != "larger"}
    size = f" ({max(sizes) / 1e6:.2f}M parameters)" if sizes else ""
    return (
        f"LLaMA {training.model}{size} from random weights on {text}: {settings.workers} workers,"
        f" {recipe.steps} steps of {tokens:,} tokens, AdamW with {recipe.schedule} schedule,"
        f" {recipe.warmup_steps} steps of warm-up, clipping at {recipe.clip}{_periods(settings)}."
        f" The learning rate of each method is the best of {_list(settings.learning_rates)} at rank"
        f" {settings.tuning_rank} on seed {settings.tuning_seed}, judged on one half of the"
        f" held-out text; results are of the seeds {_list(settings.seeds)}, judged on the other"
        f" half ({settings.text.held_out_tokens // 2:,} tokens)."
    )


def _tuning_table(settings: Any, rows: Sequence[Row]) -> str:
    found, rates = tuning(rows), settings.learning_rates
    lines, edges = [], []
    for name, method in settings.methods.items():
        best = chosen_rate(found.get(name, {}))
        cells = [method.label]
        for rate in rates:
            if rate not in found.get(name, {}):
                cells.append("-")
                continue
            perplexity = found[name][rate]
            shown = "diverged" if perplexity is None else f"{perplexity:.2f}"
            cells.append(f"**{shown}**" if rate == best else shown)
        if best is not None and len(rates) > 1 and best in (min(rates), max(rates)):
            edges.append(f"{method.label} ({best:g})")
        lines.append(cells)
    note = (
        f"\n\nChosen at the edge of the grid, so perhaps not the best there is: {', '.join(edges)}."
        if edges
        else ""
    )
    runs = f"rank {settings.tuning_rank}, seed {settings.tuning_seed}"
    told = f"Held-out perplexity of the tuning runs ({runs}); the chosen one in bold."
    return f"{told}\n\n{table(['method', *(f'{rate:g}' for rate in rates)], lines)}{note}"


def _larger(settings: Any, rows: Sequence[Row]) -> list[str]:
    part, training = _Part(settings, rows, "larger"), settings.larger.training
    sizes = {row["result"]["parameters"] for row in rows if row["params"]["part"] == "larger"}
    size = f" ({max(sizes) / 1e6:.2f}M parameters)" if sizes else ""
    parts = [
        f"## A larger model\n\nLLaMA {training.model}{size}, {training.recipe.steps} steps of"
        f" {settings.workers * training.batch * settings.text.sequence_length:,} tokens, with the"
        f" learning rates found for {settings.training.model}; seeds"
        f" {_list(settings.larger.seeds)}. Beside them the paper's LLaMA {part.column}."
    ]
    for rank in part.ranks:
        parts += [table(HEADS, part.lines(rank)), listed(part.claims(rank))]
    return parts


def _list(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def figures(settings: Any, rows: Sequence[Row]) -> dict[str, Figure]:
    """Stem -> figure."""
    from matplotlib.figure import Figure

    final = _Part(settings, rows, "final")
    gap = Figure(figsize=(11, 0.42 * len(final.methods) + 2.2), layout="constrained")
    left, right = gap.subplots(1, 2, width_ratios=(3, 2))
    _draw_gaps(left, final)
    _draw_traffic(right, final)
    curves = Figure(figsize=(8, 4.8), layout="constrained")
    _draw_curves(curves.subplots(), final)
    return {"gap": gap, "curves": curves}


def _draw_gaps(axes: Axes, part: _Part) -> None:
    """Ratio to full precision: a mean with its deviation a rank, dots for the seeds,
    diamonds for the paper.
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
    axes.plot(
        [],
        [],
        "D",
        markerfacecolor="none",
        color="grey",
        label=f"the paper, LLaMA {part.column} on C4",
    )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(
        range(len(names)), [f"{part.label(name)}  {_number(part, name)}" for name in names]
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0))
    axes.set_xlabel("held-out perplexity / that of full precision")
    axes.legend(fontsize="small")


def _number(part: _Part, method: str) -> str:
    """Of a method in the figure: its name would cover its neighbours."""
    return str(part.methods.index(method))


def _draw_traffic(axes: Axes, part: _Part) -> None:
    """Mean ratio to full precision against the bytes of a step, methods by their
    numbers.
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
                text, (sent, found.mean), fontsize=8, color=colour, xytext=(5 * side, 0), textcoords="offset points",
                ha="right" if side < 0 else "left", va="center",
            )  # fmt: skip
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1.0, 2.0, 5.0))
    axes.margins(x=0.25)
    axes.set_xlabel("kB that a worker sends a step")
    axes.set_ylabel("mean ratio to full precision")


def _plain_ticks(axis: Any, steps: tuple[float, ...]) -> None:
    """1.1 and not 10^0.04 along a logarithmic axis, and few of them."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_curves(axes: Axes, part: _Part) -> None:
    """Training loss of worker 0, mean over the seeds, at the first rank."""
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
