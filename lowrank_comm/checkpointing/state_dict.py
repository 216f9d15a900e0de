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
stand the parameter's irregular history (`reduction.restarts`), if it has one, and the
compressor's restart setting.

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
from torch.optim import Optimizer

from lowrank_comm.checkpointing.tag import (
    WAY_OUT,
    OtherGroupsError,
    Tag,
    check_format,
    read_tag,
)
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.reduction.reducer import Reducer

_log = logging.getLogger(__name__)

PREFIX = "lowrank_comm_"
KEY = "lowrank_comm"
# of the other kind of optimizer; neither loads what the other saved
BIDIRECTIONAL_KEY = "lowrank_comm_bidirectional"
_KINDS = ("own", "mean")
_WHAT = "the state dict"
# as numbers: of a parameter of whose past there is nothing to say
_STEADY = (-1, -1, 0)
# as numbers: their places, so a new one comes last
_RESTARTS = (None, "", "svd", "randomized", "greedy", "random_projection", "auto")


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
    restart = _RESTARTS.index(tag.restart) if tag.restart in _RESTARTS else 0
    devices = {slot.name: slot.device for slot in reducer.slots}
    for name, number in numbered:
        if name in devices:
            ours = {PREFIX + symbol: tensor for symbol, tensor in tensors.get(name, {}).items()}
            theirs = state_dict["state"].get(number, {})
            past = tag.unsteady.get(name, _STEADY)
            further = [_steps_of(theirs), *past, restart]
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


def check_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise torch's error for other parameter groups before anything is changed."""
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    if len(saved) != len(groups):
        raise OtherGroupsError("loaded state dict has a different number of parameter groups")
    if saved != [len(group["params"]) for group in groups]:
        raise OtherGroupsError(
            "loaded state dict contains a parameter group that doesn't match the size of"
            " optimizer's group"
        )


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
    tag = read_tag(state_dict[KEY], _WHAT) if KEY in state_dict else None
    stale, of_first = "", ""
    tensors: dict[str, dict[str, Tensor]] = {}
    unsteady: dict[str, tuple[int, int, bool]] = {}
    for name, number in numbered:
        found = ours.get(number, {})
        numbers = found.pop("tag", None)
        if found:
            tensors[name] = found
        if numbers is None:
            continue
        if _is_rounded(numbers):
            stale = f"it has rounded {name}'s to {numbers.dtype}"
            continue
        read, counted, history = _read_numbers(numbers, name)
        if history is not None:
            unsteady[name] = history
        if KEY in state_dict:
            continue
        now = _steps_of(base_state.get(number, {}))
        if counted is not None and counted != now:
            stale = f"{name}, which went on from step {counted} to {now}"
        # torch.distributed.checkpoint takes some from this rank, some from that
        if read.kind == "mean":
            read = replace(read, rank=0)
        if tag is not None and tag != read:
            raise StateMismatchError(
                f"{_WHAT} is put together from several saves: the compressor's state of {name!r} is"
                f" {read}, that of {of_first!r} {tag}; {WAY_OUT}"
            )
        tag, of_first = read, of_first or name
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


def _is_rounded(numbers: Tensor) -> bool:
    """Return whether a plain optimizer has cast a tag to a parameter's dtype that
    cannot hold its numbers.
    """
    return numbers.is_floating_point() and numbers.itemsize < 4


def _read_numbers(
    numbers: Tensor, name: str
) -> tuple[Tag, int | None, tuple[int, int, bool] | None]:
    """Return the tag that stands as numbers in a parameter's state, the base's count of
    steps, and the irregular history; None where earlier versions saved none.
    """
    values = numbers.tolist()
    if numbers.dim() != 1 or len(values) not in (6, 7, 10, 11) or any(map(_is_broken, values)):
        raise StateMismatchError(
            f"{_WHAT} is damaged: the tag of {name!r} is {values!r:.80}; {WAY_OUT}"
        )
    layout, kind, rank, world, step, seed, *further = map(int, values)
    check_format(layout, _WHAT)
    history, restart = further[1:4], further[4] if len(further) > 4 else 0
    irregular = history and history != list(_STEADY)
    entries = {
        "kind": _KINDS[kind] if 0 <= kind < len(_KINDS) else kind,
        "rank": rank,
        "world": world,
        "step": step,
        # one that a plain optimizer has kept as float32 may be a little too large
        "seed": min(seed, 2**63 - 1),
        "format": layout,
        "unsteady": {name: (history[0], history[1], bool(history[2]))} if irregular else {},
        "restart": _RESTARTS[restart] if 0 <= restart < len(_RESTARTS) else None,
    }
    tag = read_tag(entries, _WHAT)
    counted = further[0] if further else None
    return replace(tag, unsteady={}), counted, tag.unsteady.get(name)


def _is_broken(value: float) -> bool:
    return value != value or value in (float("inf"), float("-inf")) or value != int(value)


def take_from(base: Optimizer) -> dict[str, Any] | None:
    """Take what a base optimizer has loaded of a compressor's state, and does not know,
    out of its live state.

    Returns:
        A state dict with these entries, and the base's counts of steps; None if there
        are none.
    """
    if not any(_ours(entries) for entries in base.state.values()):
        return None
    found = of_compressor(base.state_dict())
    for entries in base.state.values():
        for key in _ours(entries):
            del entries[key]
    return found


def of_compressor(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without what is the base's alone, but its counts of steps."""
    state = {
        number: {key: entries[key] for key in (*_ours(entries), "step") if key in entries}
        for number, entries in state_dict["state"].items()
    }
    return {"state": state, "param_groups": state_dict["param_groups"]}


def refuse_rounded(found: Mapping[str, Any], base: Optimizer) -> None:
    """Raise a StateMismatchError for what `take_from` has returned, if the base has
    rounded it to its parameters' dtype.
    """
    for entries in found["state"].values():
        numbers = entries.get(f"{PREFIX}tag")
        if isinstance(numbers, Tensor) and _is_rounded(numbers):
            raise StateMismatchError(
                f"{type(base).__name__} has loaded a compressed checkpoint before it was wrapped,"
                f" and has rounded the error memory to {numbers.dtype}. Wrap it first, and load the"
                " state dict into the CompressedOptimizer."
            )


def _ours(entries: Mapping[Any, Any]) -> list[str]:
    return [key for key in entries if isinstance(key, str) and key.startswith(PREFIX)]


def without_compressed_state(state_dict: dict[str, Any], says: bool = True) -> dict[str, Any]:
    """Return a state dict without a compressor's state, for a plain optimizer: it would
    keep it, as much as the model, and save it.

    Args:
        state_dict: left as it is; returned itself where it has no such state.
        says: whether to log what is dropped.
    """
    state = state_dict.get("state")
    if not isinstance(state, Mapping) or not all(isinstance(v, Mapping) for v in state.values()):
        # of an optimizer with another layout, which reads it itself
        return state_dict
    ours = [_ours(entries) for entries in state.values()]
    if not any(ours) and KEY not in state_dict:
        return state_dict
    # dense parameters have a tag alone
    held = [keys for keys in ours if set(keys) - {f"{PREFIX}tag"}]
    errors = sum(f"{PREFIX}error" in keys for keys in held)
    if says:
        _log.warning(
            "the state dict was saved with compression, and this run has none: the %s of %d"
            " parameters is dropped",
            "error memory" if errors else "compressor's state",
            errors or len(held),
        )
    kept = {
        number: {key: value for key, value in entries.items() if key not in _ours(entries)}
        for number, entries in state.items()
    }
    # SGD without momentum has no state at all
    kept = {number: entries for number, entries in kept.items() if entries}
    return {**{k: v for k, v in state_dict.items() if k != KEY}, "state": kept}


def drop_compressed_state(optimizer: Optimizer) -> None:
    """Let a plain optimizer leave out what a state dict that it loads has of a
    compressor's state, and say so.
    """

    def leave_out(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return without_compressed_state(state_dict)

    optimizer.register_load_state_dict_pre_hook(leave_out)


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
