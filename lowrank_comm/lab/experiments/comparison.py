"""Which differences between methods are more than the spread between seeds: paired
comparisons, said in words.

Two methods that share their seeds (same initial weights, same batches) are compared
seed by seed: d_s = a_s - b_s. With n seeds the mean of d differs from zero if it lies
outside of

    t_{0.975, n-1} s_d / sqrt(n),        s_d the standard deviation of the d_s (n - 1 in its denominator),

the half-width of the 95 % confidence interval of Student's t. Otherwise the difference
is inside the spread. One seed has no spread, and then nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@cache
def student_t(degrees: int, probability: float = 0.975) -> float:
    """Quantile of Student's t distribution, to six digits.

    F(t) = 1/2 + (Gamma((k+1)/2) / (sqrt(k pi) Gamma(k/2))) * integral_0^t (1 +
    x^2/k)^(-(k+1)/2) dx

    With x = sqrt(k) tan(u) the integrand is cos(u)^(k-1) on a bounded interval, which
    Simpson's rule integrates well.

    Args:
        degrees: k >= 1, degrees of freedom.
        probability: between 0.5 and 1.

    Example:
        >>> round(student_t(2), 3)
        4.303
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def above_half(angle: float, pieces: int = 400) -> float:
        width = angle / pieces
        weights = [1 if i in (0, pieces) else 4 if i % 2 else 2 for i in range(pieces + 1)]
        return (
            scale
            * sum(w * math.cos(width * i) ** (degrees - 1) for i, w in enumerate(weights))
            * width
            / 3
        )

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of n values; the deviation is None for n = 1."""

    n: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None if there are none."""
        if not values:
            return None
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(1, mean, None)
        return cls(
            len(values), mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        )

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean; None for n = 1."""
        return (
            None
            if self.deviation is None
            else student_t(self.n - 1) * self.deviation / math.sqrt(self.n)
        )

    @property
    def sign(self) -> int | None:
        """+1 or -1 if the mean differs from zero, 0 if that is inside the spread, None
        for n = 1.
        """
        if self.half_width is None:
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))

    def text(self, digits: int) -> str:
        """Mean ± standard deviation."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> list[tuple[float, float]]:
    """The values of the seeds that both have, in the order of a."""
    return [(a[seed], b[seed]) for seed in a if seed in b]


def ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Spread | None:
    """Of a_s / b_s over the common seeds."""
    return Spread.of([x / y for x, y in paired(a, b)])


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Spread | None:
    """Of a_s - b_s over the common seeds."""
    return Spread.of([x - y for x, y in paired(a, b)])


def verdict(claim: str, found: Spread | None, expected: int, digits: int, unit: str = "") -> str:
    """A claim about the sign of a difference, and what the rows say of it, as one
    sentence.

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
    """A Markdown table; the first column is text, the others are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))


def listed(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines) if lines else "Nothing to compare."


def magnitude(number: float) -> str:
    """Bytes with a unit, three digits."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
