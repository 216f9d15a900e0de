"""What the optimizers in the projected space refuse: bad values, parameters that they
cannot serve, states of others, workers that differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_comm.communication.agreement import fingerprint
from lowrank_comm.errors import ConfigError, StateMismatchError, UnsupportedError

if TYPE_CHECKING:
    from lowrank_comm.projected.averaging import Entry
    from lowrank_comm.projected.optimizer import ProjectedOptimizer


def check_number(
    owner: str, key: str, value: Any, below: float = math.inf, above: float | None = None
) -> None:
    """ConfigError unless value is a number in [0, below), and above `above` if that is
    given.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | Tensor)
        or not 0.0 <= float(value) < below
    ):
        bound = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"{owner}: {key} must be a number of at least 0{bound}, got {value!r}.")
    if above is not None and not float(value) > above:
        raise ConfigError(f"{owner}: {key} must be above {above:g}, got {value!r}.")


def check_parameter(owner: str, parameter: Tensor) -> None:
    """UnsupportedError or ConfigError for a parameter that cannot be projected or
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


def check_saved(optimizer: ProjectedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that does not fit, before anything is changed.

    Raises:
        StateMismatchError: see `ProjectedOptimizer.load_state_dict`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owner = type(optimizer).__name__
    groups = state_dict["param_groups"]
    if any(not {"t", *optimizer.defaults} <= group.keys() for group in groups):
        raise StateMismatchError(
            f"the state dict is not one of {owner}: its groups have no"
            f" {sorted({'t', *optimizer.defaults})}. Load it into the optimizer that it was saved"
            " from."
        )
    if [len(group["params"]) for group in groups] != [
        len(group["params"]) for group in optimizer.param_groups
    ]:
        # torch says so in its own words
        return
    keys = [(key, group) for group in groups for key in group["params"]]
    for (key, group), parameter in zip(keys, parameters, strict=True):
        saved = state_dict["state"].get(key)
        if not saved:
            continue
        rank = optimizer.rank_of(parameter, group)
        expected = (optimizer.basis_length(parameter), rank) if rank is not None else None
        found = tuple(saved["projector"].shape) if "projector" in saved else None
        if found != expected:
            raise StateMismatchError(
                f"a parameter of shape {tuple(parameter.shape)} has a saved projector of shape"
                f" {found}, this run one of {expected}; resume with the same model and"
                f" side={optimizer.side!r} as saved."
            )


def described(
    optimizer: ProjectedOptimizer, entries: Sequence[Entry], with_values: bool
) -> dict[str, Any]:
    """Everything that must be equal on all workers: settings and parameters.

    `with_values`: and the values of parameters and state; at the start and after a load
    only, since in between unlike processors may have rounded them apart by a last bit.
    """
    options = [
        {
            key: float(v) if isinstance(v, Tensor) else v
            for key, v in group.items()
            if key not in ("params", "param_names")
        }
        for group in optimizer.param_groups
    ]
    settings = {
        **optimizer.settings(),
        "groups": options,
        "parameters": {
            e.name: f"#{k} {tuple(e.parameter.shape)} {e.parameter.dtype}"
            for k, e in enumerate(entries)
        },
    }
    if not with_values:
        return settings
    kept = [
        value
        for entry in entries
        if entry.parameter in optimizer.state
        for _, value in sorted(optimizer.state[entry.parameter].items())
        if isinstance(value, Tensor)
    ]
    return {
        **settings,
        "values of the parameters (seed all workers alike, or broadcast the parameters from rank 0)": fingerprint(
            [entry.parameter for entry in entries]
        ),
        "state of the optimizer (load the same on all workers)": fingerprint(kept),
    }
