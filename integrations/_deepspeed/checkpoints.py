"""The reducer's state in the checkpoints of a DeepSpeed engine.

The state is a file of its own in the checkpoint's folder, `<save_dir>/<tag>/`. Each
save has a name of its own, which is part of the file's name and goes into DeepSpeed's
client_state: so a file which another run has left in the folder is not taken for this
one's, and a second save under one tag leaves the first one's file until the third.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_comm.checkpointing import file as checkpoint
from lowrank_comm.communication import Group, check_same
from lowrank_comm.config import SECTION
from lowrank_comm.errors import ConfigError
from lowrank_comm.reduction.reducer import Reducer

_log = logging.getLogger("lowrank_comm")


def save(
    engine: Any, reducer: Reducer, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Save the reducer's state, then call the engine's own `save_checkpoint`.

    Ours comes first: DeepSpeed ends with the file `latest`, which makes a checkpoint
    one to resume from.
    """
    bound = _bound(original, *args, **kwargs)
    given = bound.arguments
    client_state = given["client_state"] or {}
    if SECTION in client_state:
        raise ConfigError(
            f"client_state[{SECTION!r}] is where this library keeps the name of its file;"
            " use another key."
        )
    if given["save_dir"]:
        tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
        name = checkpoint.save(reducer, Path(given["save_dir"]) / tag)
        given["client_state"] = {**client_state, SECTION: name}
    return original(*bound.args, **bound.kwargs)


def _bound(call: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Return the arguments of a call by name, with the defaults."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def observe_load(engine: Any, loaded: Callable[[Path | None, str | None], None]) -> None:
    """Let `engine.load_checkpoint` call `loaded(path, name)` when it is done.

    The path is None where the optimizer's state was not loaded; the name is that of the
    reducer's state, None where the checkpoint was saved without compression.
    """
    original = engine.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = original(*args, **kwargs)
        name = client_state.pop(SECTION, None) if client_state else None
        given = _bound(original, *args, **kwargs).arguments
        restores = given["load_optimizer_states"] and not given["load_module_only"]
        loaded(Path(path) if path is not None and restores else None, name)
        return path, client_state

    engine.load_checkpoint = load_checkpoint


def restore(reducer: Reducer, everyone: Group, path: Path, name: str | None) -> None:
    """Load the reducer's state beside a checkpoint; without one, start from zero.

    Args:
        reducer: of the engine that has loaded the checkpoint.
        everyone: all ranks of the engine.
        path: what `load_checkpoint` returned, a folder or a file in it.
        name: of the save, from client_state.
    """
    folder = path if path.is_dir() else path.parent
    check_same({f"client_state[{SECTION!r}] of the checkpoint": name}, everyone, reducer.device)
    files = checkpoint.files_in(folder)
    if name is not None:
        # ds_to_universal writes `<tag>_universal`, and leaves our file in `<tag>`
        original = folder.with_name(folder.name.removesuffix("_universal"))
        checkpoint.load(reducer, folder if files else original, name)
        return
    if files:
        _log.warning("%s was left there by another run, and is ignored", files[0])
    memory = reducer.assignment.error_feedback.memory
    _log.warning("%s was saved without compression: the %s starts from zero", folder, memory)
    reducer.reset()


def warn_of_lost_memory(path: Path | None, name: str | None) -> None:
    """Warn that a run without compression has loaded a checkpoint of one with it."""
    if path is not None and name is not None:
        _log.warning(
            "%s was saved with compression, and this run has no section %r that is enabled:"
            " its error memory is lost",
            path,
            SECTION,
        )
