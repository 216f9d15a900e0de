"""Checks of the projected optimizers: options, parameters, saved states, and what must
be equal on all workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any

import torch
from pydantic import AllowInfNan, Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_comm.communication.agreement import fingerprint, options_of
from lowrank_comm.errors import ConfigError, StateMismatchError, UnsupportedError
from lowrank_comm.options import check
from lowrank_comm.projected.averaging import Entry
from lowrank_comm.projected.projection import Projection, rank_of

NonNegative = Annotated[float, Field(ge=0), AllowInfNan(False)]
AboveZero = Annotated[float, Field(gt=0), AllowInfNan(False)]
BelowOne = Annotated[float, Field(ge=0, lt=1), AllowInfNan(False)]


def check_number(name: str, value: Any, hint: Any) -> None:
    """Raise a ConfigError that names `name` unless a number, or a tensor of one, is of
    the type `hint`.
    """
    check(name, float(value) if isinstance(value, Tensor) else value, hint)


def check_parameter(owner: str, parameter: Tensor) -> None:
    """Raise UnsupportedError or ConfigError for a parameter that cannot be projected or
    averaged here.
    """
    if isinstance(parameter, DTensor) or hasattr(parameter, "_is_flat_param"):
        raise UnsupportedError(
            f"{owner}: the parameters are sharded (FSDP), and a rank has no whole gradient to"
            " project. Use a plain model: the optimizer's state is small without sharding. Or"
            " train with CompressedOptimizer, which knows FSDP2."
        )
    if not parameter.dtype.is_floating_point:
        raise ConfigError(
            f"{owner}: parameters of {parameter.dtype} cannot be averaged; use a real floating"
            " dtype."
        )


def check_saved(
    owner: str,
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    keys: Set[str],
    projection: Projection,
) -> None:
    """Refuse a state dict that does not fit, before anything is changed.

    Args:
        owner: name of the optimizer.
        state_dict: to be loaded.
        param_groups: of the optimizer that loads it.
        keys: that each of its groups has beside the parameters.
        projection: of the optimizer that loads it.

    Raises:
        StateMismatchError: see `ProjectedOptimizer.load_state_dict`.
    """
    groups = state_dict["param_groups"]
    if any(not keys <= group.keys() for group in groups):
        raise StateMismatchError(
            f"the state dict is not one of {owner}: its groups have no {sorted(keys)}. Load it"
            " into the optimizer that it was saved from."
        )
    for group in groups:
        if not float(group["t"]).is_integer() or group["t"] < 0:
            raise StateMismatchError(
                f"the state dict is damaged: a group has t={group['t']!r}; resume from another"
                " checkpoint."
            )
    saved_groups = [(key, group) for group in groups for key in group["params"]]
    parameters = [p for group in param_groups for p in group["params"]]
    for (key, group), parameter in zip(saved_groups, parameters, strict=True):
        saved = state_dict["state"].get(key)
        if not saved:
            continue
        rank = rank_of(parameter, group)
        expected = None if rank is None else (projection.length(parameter), rank)
        found = tuple(saved["projector"].shape) if "projector" in saved else None
        if found != expected:
            raise StateMismatchError(
                f"a parameter of shape {tuple(parameter.shape)} has a saved projector of shape"
                f" {found}, this run one of {expected}; resume with the same model and"
                f" side={projection.side!r} as saved."
            )
        coordinates = torch.empty(parameter.shape, device="meta")
        if expected is not None:
            coordinates = projection.project(coordinates, torch.empty(expected, device="meta"))
        for symbol, value in saved.items():
            shape = expected if symbol == "projector" else tuple(coordinates.shape)
            if value.dim() and tuple(value.shape) != shape:
                raise StateMismatchError(
                    f"a parameter of shape {tuple(parameter.shape)} has a saved {symbol} of shape"
                    f" {tuple(value.shape)}, this run one of {shape}; resume with the same model."
                )
            if not bool(torch.isfinite(value).all()):
                raise StateMismatchError(
                    f"the saved {symbol} of a parameter of shape {tuple(parameter.shape)} is not"
                    " finite; resume from an earlier checkpoint."
                )


def describe(
    settings: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    entries: Sequence[Entry],
    state: Mapping[Tensor, Mapping[str, Tensor]] | None,
) -> dict[str, Any]:
    """Return everything that must be equal on all workers.

    Args:
        settings: of the optimizer.
        param_groups: its groups, whose options count.
        entries: its parameters.
        state: its state, with which the values of parameters and state count too; None
            leaves the values out. They are compared at the start and after a load only:
            in between unlike processors may have rounded them apart by a last bit.
    """
    description = {
        **settings,
        "groups": options_of(param_groups),
        "parameters": {
            e.name: f"#{k} {tuple(e.parameter.shape)} {e.parameter.dtype}"
            for k, e in enumerate(entries)
        },
    }
    if state is None:
        return description
    kept = [
        value for entry in entries for _, value in sorted(state.get(entry.parameter, {}).items())
    ]
    values = (
        "values of the parameters (seed all workers alike, or broadcast the parameters from rank 0)"
    )
    description[values] = fingerprint([entry.parameter for entry in entries])
    description["state of the optimizer (load the same on all workers)"] = fingerprint(kept)
    return description
