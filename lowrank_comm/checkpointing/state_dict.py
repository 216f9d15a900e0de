"""The compressor's state inside an optimizer's state dict.

    state_dict["state"][parameter]["lowrank_comm_error"], ["lowrank_comm_Q"]   tensors
    state_dict["state"][parameter]["lowrank_comm_tag"]            the tag as numbers
    state_dict["lowrank_comm"]                                    the tag, readable

The tag stands twice because torch.distributed.checkpoint silently drops top-level keys
that it does not know, and keeps what is in `state[parameter]`. Every trainable
parameter has one, compressed or not, because it refuses a state dict in which some
parameters have a state and others have none. No key has a dot, at which it splits
flattened names.

A plain optimizer that loads such a dict keeps the entries that it does not know, and
saves them again after steps of its own. So the tag as numbers also has the base's own
count of steps: where that has moved on, the errors are of an earlier time, and are left
out with a warning. (SGD counts no steps; there it cannot be told.) Behind the count
stands the parameter's irregular history (`reduction.restarts`), if it has one.

The entries are added to the dict only and never to the optimizer's live state: Adam
takes a non-empty state for one that it has initialised. They are taken out before the
base loads, because `Optimizer.load_state_dict` would cast a float32 error to a bfloat16
parameter's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.checkpointing.tag import Tag
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.reduction.reducer import Reducer

_log = logging.getLogger(__name__)

PREFIX = "lowrank_comm_"
KEY = "lowrank_comm"
# of the other kind of optimizer; neither loads what the other saved
BIDIRECTIONAL_KEY = "lowrank_comm_bidirectional"
_KINDS = ("own", "mean")
# as numbers: of a parameter of whose past there is nothing to say
_STEADY = (-1, -1, 0)


def add(
    state_dict: dict[str, Any],
    reducer: Reducer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    tag: Tag,
    numbered: Sequence[tuple[str, Any]],
) -> None:
    """Add the reducer's state to a base optimizer's state dict.

    Args:
        state_dict: of the base; its inner dictionaries are replaced and not changed.
        reducer: whose state it is.
        tensors: parameter name -> {"error": ..., "Q": ...}.
        tag: what kind of state.
        numbered: (parameter name, key in `state_dict["state"]`).
    """
    numbers = [tag.format, _KINDS.index(tag.kind), tag.rank, tag.world, tag.step, tag.seed]
    devices = {slot.name: slot.device for slot in reducer.slots}
    for name, number in numbered:
        if name in devices:
            ours = {PREFIX + symbol: tensor for symbol, tensor in tensors.get(name, {}).items()}
            theirs = state_dict["state"].get(number, {})
            further = [_steps_of(theirs), *tag.unsteady.get(name, _STEADY)]
            ours[PREFIX + "tag"] = torch.tensor([*numbers, *further], device=devices[name])
            state_dict["state"][number] = {**theirs, **ours}
    # the irregular histories are in the numbers
    state_dict[KEY] = {key: value for key, value in asdict(tag).items() if key != "unsteady"}


def _steps_of(base_state: Mapping[str, Any]) -> int:
    """Return how many steps a parameter's state in the base counts; -1 if it counts
    none.
    """
    steps = base_state.get("step")
    return -1 if steps is None else int(steps)


def split(
    state_dict: dict[str, Any], numbered: Sequence[tuple[str, Any]]
) -> tuple[dict[str, Any], Tag | None, dict[str, dict[str, Tensor]]]:
    """Take the compressor's state out of a state dict, which is left as it is.

    Args:
        state_dict: from `add`, or a plain optimizer's.
        numbered: (parameter name, key in `state_dict["state"]`).

    Returns:
        (the base's state dict, the tag or None, parameter name -> {"error": ..., "Q":
        ...}).
    """
    base_state: dict[Any, Any] = {}
    ours: dict[Any, dict[str, Tensor]] = {}
    for number, entries in state_dict["state"].items():
        kept = {key: value for key, value in entries.items() if not str(key).startswith(PREFIX)}
        ours[number] = {
            key.removeprefix(PREFIX): value for key, value in entries.items() if key not in kept
        }
        # SGD without momentum has no state at all
        if kept:
            base_state[number] = kept
    tag, stale = Tag(**state_dict[KEY]) if KEY in state_dict else None, ""
    tensors: dict[str, dict[str, Tensor]] = {}
    unsteady: dict[str, tuple[int, int, bool]] = {}
    for name, number in numbered:
        found = ours.get(number, {})
        numbers = found.pop("tag", None)
        if found:
            tensors[name] = found
        if numbers is None:
            continue
        layout, kind, rank, world, step, seed, *further = map(int, numbers.tolist())
        # neither in what earlier versions saved
        counted, history = further[:1], further[1:]
        if history and history != list(_STEADY):
            unsteady[name] = (history[0], history[1], bool(history[2]))
        if KEY in state_dict:
            continue
        now = _steps_of(base_state.get(number, {}))
        if counted and counted[0] != now:
            stale = f"{name}, which went on from step {counted[0]} to {now}"
        tag = Tag(_KINDS[kind], rank, world, step, seed, layout)
    if stale:
        _log.warning(
            "the state dict was saved by an optimizer without compression (%s): the compressor"
            " state in it is of an earlier time, and is left out",
            stale,
        )
        tag, tensors = None, {}
    tag = replace(tag, unsteady=unsteady) if tag else None
    plain = {key: value for key, value in state_dict.items() if key != KEY}
    return {**plain, "state": base_state}, tag, tensors


def refuse_other_kind(state_dict: Mapping[str, Any]) -> None:
    """Raise a StateMismatchError for a bidirectional run's state where one of
    compressed gradients is wanted.
    """
    if BIDIRECTIONAL_KEY in state_dict:
        method = state_dict[BIDIRECTIONAL_KEY].get("method")
        raise StateMismatchError(
            f"the state dict is of the bidirectional method {method!r}, which keeps the trained"
            " weights in it; loaded here, they would be lost. Load it into an optimizer with"
            f" compressor {method!r}, and take its weights from server_parameters()."
        )
