"""What an optimizer asks of the program around it: which libraries are in use, and
which of its lines a warning is about.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

_refused: weakref.WeakKeyDictionary[Optimizer, Exception] = weakref.WeakKeyDictionary()
"""Optimizer -> what is raised when Trainer or Accelerate starts DeepSpeed with it."""
_STARTS = (("transformers.trainer", "deepspeed_init"), ("accelerate", "Accelerator"))
"""Module, and what of it starts DeepSpeed: a function, or a class with a method."""
_METHOD = "_prepare_deepspeed"
_WATCHED = "_lowrank_comm_refuses"


def refuse_with_deepspeed(optimizer: Optimizer, error: Exception) -> None:
    """Let Trainer and Accelerate raise when they start DeepSpeed with an optimizer that
    averages gradients itself.

    Trainer drops the optimizer that it is given, without a word, and makes one of its
    own. Whether it is going to use DeepSpeed cannot be told before it starts: settings
    that are alive in the process may be those of another run.

    Args:
        optimizer: that cannot go with DeepSpeed.
        error: what is raised.
    """
    _refused[optimizer] = error
    for module, name in _STARTS:
        owner, attribute = sys.modules.get(module), name
        if name[0].isupper():
            owner, attribute = getattr(owner, name, None), _METHOD
        start = getattr(owner, attribute, None)
        if start is not None and not hasattr(start, _WATCHED):
            setattr(owner, attribute, _refusing(start))


def _refusing(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function like `start` that raises for an optimizer that is refused."""

    @functools.wraps(start)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        for one in args:
            # of a Trainer, or in what Accelerate has made of it
            for optimizer in (one, getattr(one, "optimizer", None)):
                error = _refused.get(optimizer) if isinstance(optimizer, Optimizer) else None
                if error is not None:
                    # a new one: its traceback would keep the optimizer alive
                    raise type(error)(*error.args)
        return start(*args, **kwargs)

    setattr(refusing, _WATCHED, True)
    return refusing


def warn_user(message: str) -> None:
    """Warn of the line of the program that called into this library, or torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(
        ("lowrank_comm", "torch")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
