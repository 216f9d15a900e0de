"""Perplexities, ratios to full precision and claims of `language_model`, computed from
its rows and held against the paper's numbers. Its page and figures are made of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import (
    Spread,
    difference,
    magnitude,
    ratio,
    verdict,
)

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
    """Return method -> learning rate -> held-out perplexity of its tuning run, None
    where it diverged.
    """
    found: dict[str, dict[float, float | None]] = {}
    for row in rows:
        if row["params"]["part"] == "tune":
            of_method = found.setdefault(row["params"]["method"], {})
            of_method[row["params"]["learning_rate"]] = row["result"]["perplexity"]
    return found


def chosen_rate(tuned: dict[float, float | None]) -> float | None:
    """Return the learning rate of the lowest perplexity; None if all diverged."""
    finite = {rate: perplexity for rate, perplexity in tuned.items() if perplexity is not None}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def perplexities(rows: Iterable[Row], part: str, method: str, rank: int | None) -> Values:
    """Return seed -> perplexity of the runs that did not diverge."""
    return {
        row["params"]["seed"]: row["result"]["perplexity"]
        for row in of(rows, part, method, rank)
        if row["result"]["perplexity"] is not None
    }


def of(rows: Iterable[Row], part: str, method: str, rank: int | None) -> list[Row]:
    """Return the rows of a method at a rank."""
    wanted = {"part": part, "method": method, "rank": rank}
    return [
        row for row in rows if all(row["params"][key] == value for key, value in wanted.items())
    ]


class Part:
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
        """Return perplexity over that of full precision, seed by seed."""
        return ratio(self.values(method, rank), self.values(self.settings.reference, rank))

    def paper(self, method: str, rank: int) -> float | None:
        """Return the paper's perplexity."""
        return PAPER[self.column].get(method, {}).get(self.rank_of(method, rank))

    def paper_gap(self, method: str, rank: int) -> float | None:
        """Return the paper's ratio to full precision."""
        own, full = self.paper(method, rank), self.paper("adam", rank)
        return None if own is None or full is None else own / full

    def label(self, method: str) -> str:
        return str(self.settings.methods[method].label)

    def against(self, method: str, other: str, rank: int) -> str:
        """State how much larger the perplexity is than another method's, and whether
        the difference is inside the spread.
        """
        found = ratio(self.values(method, rank), self.values(other, rank))
        if method == other or found is None:
            return "-"
        deviation = None if found.deviation is None else 100 * found.deviation
        off = Spread(found.n, 100 * (found.mean - 1), deviation)
        if off.half_width is None:
            return f"{off.mean:+.1f} %"
        return f"{off.mean:+.1f} ± {off.half_width:.1f} %" + (
            ", inside the spread" if off.sign == 0 else ""
        )

    def lines(self, rank: int) -> list[list[str]]:
        """Return the lines of a rank's table."""
        lines = []
        for name in self.methods:
            rows = of(self.rows, self.part, name, self.rank_of(name, rank))
            if not rows:
                continue
            values = Spread.of(list(self.values(name, rank).values()))
            gap = self.gap(name, rank)
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
        """State the order in the paper's table, and what came out."""
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
        """State, method by method, whether a higher rank gives a lower perplexity."""
        said = []
        for low, high in zip(self.ranks, self.ranks[1:], strict=False):
            for name in self.methods:
                if self.settings.methods[name].has_rank:
                    found = difference(self.values(name, high), self.values(name, low))
                    said.append(
                        verdict(f"{self.label(name)}: rank {high} < rank {low}", found, -1, 2)
                    )
        return said
