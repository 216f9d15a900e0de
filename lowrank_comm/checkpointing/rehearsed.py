"""What a save and a load do with a reducer, for the rehearsal of their memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_comm.checkpointing.tag import tag_of
from lowrank_comm.checkpointing.tensors import restore
from lowrank_comm.checkpointing.whole_tensors import whole_tensors
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.rehearsal import Checkpoints


def _save(reducer: Reducer) -> None:
    for one in whole_tensors(reducer):
        if reducer.workers.is_writer:
            # what was gathered may have to be written in another order
            one.fetch().contiguous()
        else:
            one.fetch()


def _read(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for one in whole_tensors(reducer):
        tensor = torch.empty(one.shape, dtype=one.dtype)
        found.setdefault(one.name, {})[one.symbol] = tensor
    return found


def _load(reducer: Reducer, read: Mapping[str, Mapping[str, Tensor]]) -> None:
    reducer.state.mark_consolidated()
    restore(reducer, tag_of(reducer), read)


CHECKPOINTS = Checkpoints(_save, _read, _load)
"""Those of this library."""
