"""When a run has come to a loss.

The loss of a step is noisy. What counts is the mean over the last k steps, and a run
has come to a loss at the first step k or later at which that mean is at most it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence


def trailing_means(losses: Sequence[float], k: int) -> list[float]:
    """Return the mean of each step's loss and the k - 1 before it, from step k on.

    Example:
        >>> trailing_means([4.0, 2.0, 1.0], 2)
        [3.0, 1.5]
    """
    return [statistics.fmean(losses[end - k : end]) for end in range(k, len(losses) + 1)]


def first_step_at(losses: Sequence[float], target: float, k: int) -> int | None:
    """Return the first step, counted from 1, whose trailing mean is at most the target;
    None if there is none.

    Example:
        >>> first_step_at([4.0, 2.0, 1.0], 1.5, 2)
        3
    """
    means = enumerate(trailing_means(losses, k), start=k)
    return next((step for step, mean in means if mean <= target), None)


def seconds_after(seconds: Sequence[float], step: int) -> float:
    """Return the seconds of all steps until one has ended, counted from 1."""
    return list(itertools.accumulate(seconds))[step - 1]
