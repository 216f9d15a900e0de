"""One worker's part of a bidirectional run, as it stands in a state dict under the key
"lowrank_comm_bidirectional".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_comm.bidirectional.base import Method, State
from lowrank_comm.bidirectional.vectors import FlatParameters
from lowrank_comm.checkpointing.state_dict import BIDIRECTIONAL_KEY as KEY
from lowrank_comm.checkpointing.state_dict import KEY as GRADIENTS
from lowrank_comm.checkpointing.state_dict import PREFIX

_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What one rank saves.

    Attributes:
        method: its JSON name.
        seed, t: of the run.
        rank, n: whose state it is, of how many.
        shapes: parameter name -> shape, in the order of the vectors.
        tensors: w (1, d), and v, y, z, ... of the method; on rank 0 also x (d,), and
            y_bar, g_bar.
    """

    method: str
    seed: int
    t: int
    rank: int
    n: int
    shapes: dict[str, list[int]]
    tensors: State

    def as_dict(self) -> dict[str, Any]:
        """Plain, for torch.save with weights_only."""
        return {**{key: getattr(self, key) for key in self.__dataclass_fields__}, "format": _FORMAT}

    @classmethod
    def find(
        cls, state_dict: Mapping[str, Any], method: Method, flat: FlatParameters, is_server: bool
    ) -> tuple[Saved | None, str | None]:
        """The entry of a state dict, and why it cannot be used here.

        Returns:
            (entry, None); (None, None) for a plain optimizer's state dict; (None,
            sentence) for one that does not fit.
        """
        entry = state_dict.get(KEY)
        if entry is None and GRADIENTS in state_dict:
            return (
                None,
                (
                    "the state is of a CompressedOptimizer that compresses gradients, and its"
                    " error memory would be lost here; load it into such a one, or take"
                    f" {GRADIENTS!r} and the entries '{PREFIX}...' out of it."
                ),
            )
        if entry is None:
            return None, None
        if entry.get("format") != _FORMAT:
            return (
                None,
                (
                    f"the state has format {entry.get('format')!r}, and {_FORMAT} is read here;"
                    " load it with its own version."
                ),
            )
        saved = cls(**{key: entry[key] for key in cls.__dataclass_fields__})
        if saved.method != method.json_name:
            return (
                None,
                (
                    f"the state is of method {saved.method!r}, this optimizer has"
                    f" {method.json_name!r}; use the same."
                ),
            )
        here = {name: list(p.shape) for name, p in zip(flat.names, flat.parameters, strict=True)}
        if list(saved.shapes.items()) != list(here.items()):
            differing = [
                name
                for name in {**here, **saved.shapes}
                if here.get(name) != saved.shapes.get(name)
            ]
            what = "their order differs"
            if differing:
                name = differing[0]
                what = f"{name!r} is {saved.shapes.get(name)} there and {here.get(name)} here"
            return (
                None,
                (
                    f"the state is of other parameters ({what}); build the optimizer from the same"
                    " model."
                ),
            )
        if is_server and "x" not in saved.tensors:
            return (
                None,
                (
                    f"the state was saved by rank {saved.rank} and has no x; on rank 0 load what"
                    " rank 0 has saved."
                ),
            )
        return saved, None
