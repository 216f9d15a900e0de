"""The errors of the library: every message names the key or parameter, the value found,
and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowRankCommError(RuntimeError):
    """Base class of all errors that this library raises on purpose."""


class ConfigError(LowRankCommError, ValueError):
    """A setting is unknown, has the wrong type, or cannot work; raised before any
    collective is called.
    """


class ConfigMismatchError(LowRankCommError):
    """The workers were started with different settings or different models; raised on
    all of them.
    """


class DivergenceError(LowRankCommError):
    """Ranks that should hold the same parameters or bases, bit for bit, do not; raised
    on all of them.
    """


class StateMismatchError(LowRankCommError):
    """A checkpoint does not fit this run: loading it would lose or mix up what was
    learnt.
    """


class UnsupportedError(LowRankCommError, NotImplementedError):
    """The engine, its version, or a feature of it is one that the library cannot serve
    correctly.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for messages about an unknown word, or a full stop
    where nothing is near. Upper and lower case count as equal.
    """
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else "."
