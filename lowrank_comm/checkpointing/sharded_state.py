"""Model and optimizer where parameters are sharded, by torch.distributed.checkpoint:
each rank writes and reads what it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowrank_comm.checkpointing.state_dict import PREFIX
from lowrank_comm.checkpointing.tag import refused_together
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import StateMismatchError

_log = logging.getLogger("lowrank_comm")

_ANEW = "%s does not have %d parts of the compressor's state (first: %s): they start anew"
_DROPPED = "%s has %d parts of a compressor's state that this run does not have (first: %s)"


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are sharded over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def copied(value: Any, but: str | None = None) -> Any:
    """Copy the tensors of a state dict, but those under keys that begin with `but`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {
            key: one if but is not None and str(key).startswith(but) else copied(one, but)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(copied(one, but) for one in value)
    return value


def _state_of(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return of_model, of_optimizer


def write(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write this rank's part into a folder; a collective."""
    of_model, of_optimizer = _state_of(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)


def load(
    path: Path,
    workers: Workers,
    model: nn.Module,
    optimizer: Optimizer,
    check: Callable[[], None],
) -> None:
    """Load what `write` has written, at any number of ranks; a collective.

    Args:
        path: of the folder.
        workers: who load together.
        model, optimizer: they are changed in place.
        check: raises where what was written cannot be for this optimizer.

    Raises:
        StateMismatchError: on every rank, if it does not fit; then nothing is changed.
    """
    of_model, of_optimizer = _state_of(model, optimizer)
    wanted = {f"model.{name}" for name in of_model} | {
        f"optimizer.state.{name}.{key}"
        for name, entries in of_optimizer["state"].items()
        for key in entries
    }
    with refused_together(workers, str(path)):
        check()
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
        missing = sorted(key for key in wanted - saved if PREFIX not in key)
        if missing:
            raise StateMismatchError(
                f"{path} has no {missing[0]!r}: it was saved by another model or optimizer."
            )
    ours = [
        sorted(key for key in keys if PREFIX in key) for keys in (wanted - saved, saved - wanted)
    ]
    for keys, words in zip(ours, (_ANEW, _DROPPED), strict=True):
        if keys and workers.is_writer:
            _log.warning(words, path, len(keys), keys[0])
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    # It reads in place. So what can be refused is read into copies, before anything is
    # touched; model and base are not held twice.
    checked = {
        name: copied({k: value for k, value in entries.items() if _is_checked(k, value)})
        for name, entries in of_optimizer["state"].items()
    }
    dcp.load({"optimizer": {"state": checked}}, checkpoint_id=path, planner=planner)
    if hasattr(optimizer, "check_state_dict"):
        optimizer.check_state_dict({**of_optimizer, "state": checked})
    theirs = {
        name: {key: value for key, value in entries.items() if key not in checked[name]}
        for name, entries in of_optimizer["state"].items()
    }
    target = {"model": of_model, "optimizer": {**of_optimizer, "state": theirs}}
    dcp.load(target, checkpoint_id=path, planner=planner)
    whole = {name: entries | checked[name] for name, entries in theirs.items()}
    set_optimizer_state_dict(model, optimizer, {**target["optimizer"], "state": whole})
    set_model_state_dict(model, target["model"])


def _is_checked(key: str, value: Any) -> bool:
    """Return whether an entry of an optimizer's state is of the compressor, or a number
    such as the base's count of steps.
    """
    return PREFIX in key or not isinstance(value, Tensor) or value.dim() == 0
