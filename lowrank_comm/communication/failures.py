"""What a collective that has failed, or has waited in vain, tells the user.

torch names the connection that was closed, or the milliseconds; the cause is mostly
that a rank has ended, or that some ranks did not make the call, as with
`if rank == 0: save(...)` around a collective.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import sys
import threading
import traceback
from collections.abc import Iterator

import torch

from lowrank_comm.errors import LowRankCommError

_log = logging.getLogger("lowrank_comm")

PATIENCE = 30.0
"""Seconds until a rank that waits in a rare collective says so."""

_LIBRARY = __name__.partition(".")[0]


def collective_failed(error: RuntimeError) -> LowRankCommError:
    """Return what to raise from torch's error: it names the call of this library, and
    the user's line with it, and asks whether all ranks made it.

    Raises:
        OutOfMemoryError: it is one; what helps is less memory.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    call, line = _call()
    reason = str(error).strip().partition("\n")[0]
    return LowRankCommError(
        f"lowrank_comm: {call}() could not go on with the other ranks ({type(error).__name__}:"
        f" {reason}). Did all ranks make this call{line}? It waits for all of them, and must not"
        " stand behind `if rank == 0:`, nor after a loop whose length differs between ranks. Or a"
        " rank has ended or cannot be reached: then its own message comes first."
    )


@contextlib.contextmanager
def saying_so() -> Iterator[None]:
    """Log a line if the block, a collective outside of steps, takes long."""
    call, line = _call()
    timer = threading.Timer(
        PATIENCE,
        _log.warning,
        (
            "%s() has waited for the other ranks for %d s: do all ranks make this call%s?",
            call,
            PATIENCE,
            line,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _call() -> tuple[str, str]:
    """Return which function of this library was called, and where, for a message. What
    autograd has called is `backward`.
    """
    call, where = "a collective", ""
    for frame, number in traceback.walk_stack(sys._getframe(2)):
        root = frame.f_globals.get("__name__", "").partition(".")[0]
        if root == _LIBRARY:
            call, where = frame.f_code.co_qualname, ""
        elif not where and root not in ("torch", "contextlib"):
            file = frame.f_code.co_filename
            text = linecache.getline(file, number).strip()
            where = f" ({file}, line {number}{': ' if text else ''}{text})"
    parts = call.split(".")
    if any(part.startswith("_") and not part.endswith("__") for part in parts):
        # users have not called it by this name
        if torch._C._current_graph_task_id() != -1:
            return "backward", where
        call = ".".join(part.lstrip("_") for part in parts)
    return call, where
