"""Paired comparisons of methods: which differences are larger than the spread between
seeds, stated in words and tables.

Two methods that share their seeds (same initial weights, same batches) are compared
seed by seed: d_s = a_s - b_s. With n seeds the mean of d differs from zero if its
absolute value is larger than

    t_{0.975, n-1} s_d / sqrt(n),

the half-width of the 95 % confidence interval of Student's t, where s_d is the standard
deviation of the d_s (n - 1 in its denominator). Otherwise the difference is inside the
spread. One seed has no spread, and then nothing is claimed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


def student_t(degrees: int, probability: float = 0.975) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        degrees: degrees of freedom, at least 1.
        probability: of a value below the quantile.

    Example:
        >>> round(student_t(2), 3)
        4.303
    """
    return float(stats.t.ppf(probability, degrees))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of n values; the deviation is None for n = 1."""

    n: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Summarize some values; None if there are none."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), deviation)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean; None for n = 1."""
        if self.deviation is None:
            return None
        return student_t(self.n - 1) * self.deviation / math.sqrt(self.n)

    @property
    def sign(self) -> int | None:
        """+1 or -1 if the mean differs from zero, 0 if the difference is inside the
        spread, None for n = 1.
        """
        if self.half_width is None:
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))

    def text(self, digits: int) -> str:
        """Return "mean ± standard deviation"."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return the pairs of values of the common seeds, in the order of a."""
    return [(a[seed], b[seed]) for seed in a if seed in b]


def ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Spread | None:
    """Return the spread of a_s / b_s over the common seeds."""
    return Spread.of([x / y for x, y in paired(a, b)])


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Spread | None:
    """Return the spread of a_s - b_s over the common seeds."""
    return Spread.of([x - y for x, y in paired(a, b)])


def verdict(claim: str, found: Spread | None, expected: int, digits: int, unit: str = "") -> str:
    """State in one sentence a claim about the sign of a difference and whether the rows
    support it.

    Args:
        claim: what is claimed, e.g. "full precision < PowerSGD".
        found: the paired differences, left minus right.
        expected: the sign claimed: -1 left is smaller, +1 left is larger, 0 no
            difference.
        digits, unit: of the numbers.
    """
    if found is None:
        return f"{claim}: not measured."
    numbers = f"left minus right {found.mean:+.{digits}f}{unit}"
    if found.half_width is None:
        fits = expected == 0 or math.copysign(1, found.mean) == expected
        return (
            f"{claim}: {numbers}, one seed, so no spread is known; the sign"
            f" {'agrees' if fits else 'is the other one'}."
        )
    numbers += f", 95 % interval ± {found.half_width:.{digits}f}, {found.n} seeds"
    if found.sign == 0:
        word = (
            "no difference seen, as claimed: inside the spread"
            if expected == 0
            else "undecided, inside the spread"
        )
    elif expected == 0:
        word = f"**a difference is seen**: left is {'larger' if found.sign == 1 else 'smaller'}"
    else:
        word = "holds" if found.sign == expected else "**contradicted**"
    return f"{claim}: {word} ({numbers})."


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def listed(lines: Sequence[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines) if lines else "Nothing to compare."


def magnitude(number: float) -> str:
    """Return bytes with a unit, three digits."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
