"""How figures of a JSON file are written in a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is of words."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def median(summary: dict[str, Any]) -> str:
    """Return the median of a summary, three digits."""
    return digits(summary["median"])


def ratio(summary: dict[str, Any]) -> str:
    """Return a median of ratios with its quartiles."""
    return f"{summary['median']:.2f} ({summary['low']:.2f}-{summary['high']:.2f})"


def digits(value: float) -> str:
    """Return three digits of a number, all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def listed(parts: Sequence[str]) -> str:
    """Return words as a list in a sentence."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
