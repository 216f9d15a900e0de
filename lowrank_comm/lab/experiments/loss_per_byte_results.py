"""Tuning, gaps to dense training, fronts and claims of `loss_per_byte`, computed from
its rows. Its page and figure are made of these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import Spread, difference

DENSE = "dense"
GOAL_GAP, GOAL_RATIO = 0.03, 10.0
"""Aimed at: at most 3 % behind dense training, at a tenth of the bytes."""

Losses = dict[int, float]
"""Seed -> held-out loss."""
Tuned = dict[Any, dict[int, float | None]]
"""Point of a grid -> seed -> held-out loss, None where the run diverged."""


def factors_of(settings: Any, method: str) -> list[float]:
    """Return the factors of the dense learning rate that a method is tuned on."""
    own = settings.methods[method].factors if method != DENSE else None
    return list(own or settings.factors)


def rows_of(rows: Iterable[Row], part: str, base: str, method: str) -> list[Row]:
    """Return the rows of a method under a base."""
    wanted = {"part": part, "base": base, "method": method}
    return [row for row in rows if all(row["params"][key] == v for key, v in wanted.items())]


def tuning(rows: Iterable[Row], base: str, method: str) -> Tuned:
    """Return the tuning runs of a method: by (learning rate, beta2) for dense, by
    factor for others.
    """
    found: Tuned = {}
    for row in rows_of(rows, "tune", base, method):
        params = row["params"]
        point = (params["learning_rate"], params["beta2"]) if method == DENSE else params["factor"]
        found.setdefault(point, {})[params["seed"]] = row["result"]["loss"]
    return found


def best(tuned: Tuned, seeds: Sequence[int]) -> Any:
    """Return the point of the lowest mean loss over the seeds, among those that were
    run on all of them and never diverged; None if there is none.
    """
    means = {point: mean for point in tuned if (mean := mean_loss(tuned[point], seeds)) is not None}
    return min(means, key=lambda point: means[point]) if means else None


def mean_loss(losses: Mapping[int, float | None], seeds: Sequence[int]) -> float | None:
    """Return the mean over the seeds; None if one is missing or diverged."""
    found = [losses.get(seed) for seed in seeds]
    known = [loss for loss in found if loss is not None]
    return statistics.fmean(known) if len(known) == len(found) else None


def chosen_dense(settings: Any, rows: Sequence[Row], base: str) -> tuple[float, float]:
    """Return learning rate and beta2 of dense training.

    Raises:
        ConfigError: its tuning is not finished, or diverged everywhere.
    """
    grid = settings.bases[base]
    points = [(rate, beta2) for rate in grid.learning_rates for beta2 in grid.beta2]
    return _chosen(settings, rows, base, DENSE, points)  # type: ignore[no-any-return]


def chosen_factor(settings: Any, rows: Sequence[Row], base: str, method: str) -> float:
    """Return the factor of the dense learning rate that a method's tuning found.

    Raises:
        ConfigError: its tuning is not finished, or diverged everywhere.
    """
    points = factors_of(settings, method)
    return _chosen(settings, rows, base, method, points)  # type: ignore[no-any-return]


def _chosen(settings: Any, rows: Sequence[Row], base: str, method: str, points: list[Any]) -> Any:
    if len(points) == 1:
        return points[0]
    tuned = tuning(rows, base, method)
    seeds = settings.tuning_seeds
    missing = sum(seed not in tuned.get(point, {}) for point in points for seed in seeds)
    if missing:
        raise ConfigError(
            f"{missing} tuning runs of {method!r} under {base} are missing: run --only"
            f" 'tune/{base}/{method}/*' first, or see why it failed."
        )
    found = best(tuned, seeds)
    if found is None:
        raise ConfigError(
            f"{method!r} under {base} diverged at every point of {points}; add smaller learning"
            " rates."
        )
    return found


@dataclass(frozen=True)
class Ratio:
    """exp(mean of n paired differences of losses), with its 95 % t interval; without
    an interval for n = 1.
    """

    n: int
    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, own: Losses, other: Losses) -> Ratio | None:
        """Return the ratio of perplexities over the common seeds; None if there are
        none.
        """
        found = difference(own, other)
        return None if found is None else cls.from_spread(found)

    @classmethod
    def from_spread(cls, found: Spread) -> Ratio:
        width = found.half_width
        if width is None:
            return cls(found.n, math.exp(found.mean), None, None)
        low, high = math.exp(found.mean - width), math.exp(found.mean + width)
        return cls(found.n, math.exp(found.mean), low, high)

    @property
    def percent(self) -> str:
        """The difference in per cent, with its interval."""
        text = f"{100 * (self.value - 1):+.1f} %"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{100 * (self.low - 1):+.1f}, {100 * (self.high - 1):+.1f}]"

    @property
    def sign(self) -> int | None:
        """-1 or +1 if the interval is below or above 1, 0 if it holds 1, None for
        n = 1.
        """
        if self.low is None or self.high is None:
            return None
        return -1 if self.high < 1 else 1 if self.low > 1 else 0

    @property
    def evidence(self) -> str:
        """How many seeds, and whether the difference is inside the interval."""
        if self.sign is None:
            return "one seed, so no interval is known"
        return f"n = {self.n}" + (", inside the interval" if self.sign == 0 else "")


@dataclass(frozen=True)
class Point:
    """A method under a base, with what its final runs came to.

    Attributes:
        ours: whether it is a setting of this library.
        gap: to dense training of the same seeds.
        sent: bytes that a worker hands to collectives a step, over the whole model.
        times_less: than uncompressed.
    """

    name: str
    label: str
    group: str
    ours: bool
    gap: Ratio
    losses: Losses
    sent: float
    times_less: float
    gathered: bool
    rate: float
    seconds: float
    diverged: int


class Final:
    """The final runs under one base."""

    def __init__(self, settings: Any, rows: Sequence[Row], base: str) -> None:
        self.settings, self.base = settings, base
        self._rows = [
            row
            for row in rows
            if row["params"]["part"] == "final" and row["params"]["base"] == base
        ]
        self.dense = self.losses(DENSE)
        self.points = [
            point for name in (DENSE, *settings.methods) if (point := self._point(name)) is not None
        ]

    def losses(self, method: str) -> Losses:
        """Return seed -> loss of the runs that did not diverge."""
        return {
            row["params"]["seed"]: row["result"]["loss"]
            for row in self._of(method)
            if row["result"]["loss"] is not None
        }

    def label(self, method: str) -> str:
        return "uncompressed" if method == DENSE else str(self.settings.methods[method].label)

    def point(self, method: str) -> Point | None:
        return next((point for point in self.points if point.name == method), None)

    def ratio(self, method: str, other: str) -> Ratio | None:
        """Return a method's perplexity over another's on their common seeds."""
        return Ratio.of(self.losses(method), self.losses(other))

    @property
    def compressed(self) -> list[Point]:
        return [point for point in self.points if point.name != DENSE]

    def beaten_by(self, point: Point) -> Point | None:
        """Return the method of the lowest mean gap among those that send no more and
        end lower; None on the front.
        """
        better = [
            other
            for other in self.points
            if other.sent <= point.sent and other.gap.value < point.gap.value
        ]
        return min(better, key=lambda other: other.gap.value) if better else None

    def _of(self, method: str) -> list[Row]:
        return [row for row in self._rows if row["params"]["method"] == method]

    def _point(self, name: str) -> Point | None:
        rows = self._of(name)
        gap = Ratio.of(self.losses(name), self.dense)
        if gap is None:
            return None
        sent, own = rows[0]["result"]["sent"], self.settings.methods.get(name)
        return Point(
            name,
            self.label(name),
            DENSE if own is None else own.group,
            own is not None and own.section is not None,
            gap,
            self.losses(name),
            sent["bytes_per_step"],
            sent["ratio"],
            "gather" in sent["bytes"],
            rows[0]["params"]["learning_rate"],
            statistics.fmean(row["seconds"] for row in rows),
            sum(row["result"]["diverged"] for row in rows),
        )
