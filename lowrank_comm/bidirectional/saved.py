"""One party's state as it stands in a state dict under the key
"lowrank_comm_bidirectional", and what the workers agree on when they load it.

    format     version of this layout
    method     its JSON name
    seed, t    of the run
    rank, n    the rank that saved it, and the number of workers
    shapes     of the parameters
    tensors    w (1, d), and v, y, z, ... of the method; on rank 0 also x (d,), and
               y_bar, g_bar

All are plain values, for torch.load with weights_only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.checkpointing.state_dict import BIDIRECTIONAL_KEY as KEY
from lowrank_comm.checkpointing.state_dict import KEY as GRADIENTS
from lowrank_comm.checkpointing.state_dict import PREFIX, take_from
from lowrank_comm.checkpointing.tag import WAY_OUT, readable
from lowrank_comm.communication.group import LENGTH_BYTES
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.options import Seed

FORMAT = 1

Shapes = dict[str, list[int]]
"""Parameter name -> shape, in the order of the vectors."""

_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Entry(BaseModel):
    """What `t` and the like may be; keys that a later version adds are let through."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)

    seed: Seed
    t: _Count
    rank: _Count
    n: Annotated[int, Field(ge=1, lt=2**62)]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Agreed:
    """What the workers agreed on about the state dicts that they load.

    Attributes:
        tensors: this rank's.
        t, seed: to go on with; rank 0's.
        exact: whether every rank has its own state, so that the run goes on bit by bit.
        server_state: names of the server's tensors that rank 0 has.
    """

    tensors: State
    t: int
    seed: int
    exact: bool
    server_state: list[str]


def refuse_loaded_gradients(base: Optimizer) -> None:
    """Raise a StateMismatchError for a base that has loaded the state of a
    CompressedOptimizer.
    """
    if take_from(base) is not None:
        raise StateMismatchError(_OF_GRADIENTS)


_OF_GRADIENTS = (
    "the state is of a CompressedOptimizer that compresses gradients, and its error memory"
    f" would be lost here; load it into such a one, or take {GRADIENTS!r} and the entries"
    f" '{PREFIX}...' out of it."
)


def agree_on_saved(
    state_dict: Mapping[str, Any],
    method: Method,
    shapes: Shapes,
    workers: Workers,
    ledger: LinkLedger,
) -> Agreed | None:
    """Check a state dict, and tell the other workers the outcome; a collective.

    Returns:
        What was agreed on; None for the state dict of a plain optimizer.

    Raises:
        StateMismatchError: on all workers, if it does not fit some of them.
    """
    rank, n = workers.group.rank, workers.group.size
    entry = state_dict.get(KEY)
    try:
        problem = _problem(state_dict, entry, method, shapes, is_server=rank == 0)
    # a damaged state leads to many kinds of them, and the others wait to be told
    except Exception as error:
        problem = str(readable(error, "the state dict"))
    told: dict[str, Any] = {"problem": problem, "plain": entry is None}
    if entry is not None and problem is None:
        told["is_own"] = (entry["rank"], entry["n"]) == (rank, n)
        told["run"] = (entry["t"], entry["seed"])
        told["server_state"] = [name for name in method.server_state if name in entry["tensors"]]
    text = json.dumps(told)
    everyone = [json.loads(part) for part in workers.all_gather_text(text)]
    ledger.bytes["start"] += LENGTH_BYTES + len(text)
    first = everyone[0]
    for other_rank, other in enumerate(everyone):
        if other["problem"]:
            raise StateMismatchError(f"rank {other_rank}: {other['problem']}")
        if other["plain"] != first["plain"]:
            raise StateMismatchError(
                f"rank 0 and rank {other_rank} have loaded different kinds of state dict, one of a"
                " plain optimizer and one of a BidirectionalOptimizer; load the same kind on all"
                " ranks."
            )
    if entry is None:
        return None
    exact = all(other["is_own"] and other["run"] == first["run"] for other in everyone)
    t, seed = first["run"]
    return Agreed(entry["tensors"], t, seed, exact, first["server_state"])


def _problem(
    state_dict: Mapping[str, Any],
    entry: Mapping[str, Any] | None,
    method: Method,
    shapes: Shapes,
    is_server: bool,
) -> str | None:
    """Return why a state dict cannot be used here, as a sentence; None if it can."""
    if entry is None:
        if GRADIENTS not in state_dict:
            return None
        return _OF_GRADIENTS
    if entry.get("format") != FORMAT:
        return (
            f"the state has format {entry.get('format')!r}, and {FORMAT} is read here; load it"
            " with its own version."
        )
    if entry["method"] != method.json_name:
        return (
            f"the state is of method {entry['method']!r}, this optimizer has {method.json_name!r};"
            " use the same."
        )
    found = entry["shapes"]
    if list(found.items()) != list(shapes.items()):
        what = "their order differs"
        differing = [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            what = f"{name!r} is {found.get(name)} there and {shapes.get(name)} here"
        return (
            f"the state is of other parameters ({what}); build the optimizer from the same model."
        )
    try:
        _Entry.model_validate(dict(entry))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        return f"the state is damaged at {key!r} ({first['msg']}); {WAY_OUT}"
    d = sum(math.prod(shape) for shape in shapes.values())
    for symbol, tensor in entry["tensors"].items():
        if tensor.shape[-1:] != (d,) and tensor.numel() > 1:
            return f"the saved {symbol} has shape {tuple(tensor.shape)} for {d} numbers; {WAY_OUT}"
        if not bool(torch.isfinite(tensor).all()):
            return f"the saved {symbol} is not finite; resume from an earlier checkpoint."
    if is_server and "x" not in entry["tensors"]:
        return (
            f"the state was saved by rank {entry['rank']} and has no x; on rank 0 load what rank 0"
            " has saved."
        )
    return None
