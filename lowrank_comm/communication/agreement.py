"""Workers must agree on the settings and the model before the first step, or their
buffers differ and they hang.

At the first step every worker gathers a fingerprint (a hash of all settings, of the
library's version and of the list of parameters). If the fingerprints differ, all
workers see that, all gather the whole description, and all raise the same error, which
names the settings that differ and the values on two workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.group import LENGTH_BYTES, Group
from lowrank_comm.errors import ConfigMismatchError
from lowrank_comm.numerics.hashing import hash_of


def check_same(description: Mapping[str, Any], group: Group, device: torch.device) -> int:
    """Compare a description between all workers of the group.

    Args:
        description: plain values (numbers, strings, lists, dicts), the same keys on all
            workers or not.
        group: the workers.
        device: of the tensors to be sent.

    Returns:
        Bytes that this worker sent for it.

    Raises:
        ConfigMismatchError: on every worker, if any two differ.
    """
    text = json.dumps(description, sort_keys=True, default=repr).encode()
    digest = hashlib.sha256(text).digest()
    fingerprints = group.gather_bytes(digest, device)
    if all(other == digest for other in fingerprints):
        return len(digest) + LENGTH_BYTES
    # Not every worker need see a difference to its own fingerprint only: the list is
    # the same on all, so all gather.
    raise_if_different([json.loads(part) for part in group.gather_bytes(text, device)])
    raise AssertionError("unreachable: different fingerprints of equal descriptions")


def raise_if_different(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ConfigMismatchError that names every key whose value differs between rank
    0 and some other worker.
    """
    first = _flat(descriptions[0])
    for rank, other in enumerate(map(_flat, descriptions[1:]), start=1):
        differing = [
            key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)
        ]
        if differing:
            shown = "; ".join(
                f"{key}: {first.get(key, '(absent)')!r} on rank 0, {other.get(key, '(absent)')!r}"
                f" on rank {rank}"
                for key in differing[:5]
            )
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigMismatchError(
                f"lowrank_comm: the workers were started with different settings. {shown}{more}. "
                "Give every worker the same configuration and the same model."
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries and lists as one dictionary of dotted keys."""
    if isinstance(value, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        items = [(f"{prefix}[{k}]", part) for k, part in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for name, part in items for key, leaf in _flat(part, name).items()}


def fingerprint(parameters: Sequence[Tensor]) -> str:
    """Return a short text that two workers share if their parameters, of equal shapes,
    are equal bit for bit, even on different devices; see `numerics.hashing`.
    """
    device = parameters[0].device if parameters else torch.device("cpu")
    return f"{int(hash_of(parameters, device)) % (1 << 64):016x}"


def options_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is equal on all workers of an optimizer's parameter groups: numbers
    (lr, betas, weight_decay, ...), also those in tensors, flags and words.

    Learning rates that a scheduler changes are equal as well whenever workers agree: at
    the first step, and after a state was loaded or parameters were added.
    """
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in ("params", "param_names") and _is_plain(value)
        }
        for group in groups
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, bool | int | float | str)
