"""Wrap single methods of objects of other libraries."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

_AROUND = "_lowrank_comm_around"


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let `owner.name(...)` call `around(original, ...)`; on this instance only, and
    once: a second call with the same method changes nothing.

    Args:
        owner: a Trainer, an engine or an optimizer.
        name: of its method, whose signature is kept.
        around: a bound method of ours, held weakly. When its object is gone, the
            original is called by itself: `owner` may live longer, and does not keep our
            object alive.
    """
    original = getattr(owner, name)
    ours = weakref.WeakMethod(around)
    if getattr(original, _AROUND, None) == ours:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        method = ours()
        return original(*args, **kwargs) if method is None else method(original, *args, **kwargs)

    setattr(wrapped, _AROUND, ours)
    setattr(owner, name, wrapped)
