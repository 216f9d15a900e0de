"""What `"enabled": false` in a section means: the engine is left alone."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from lowrank_comm.checkpointing.state_dict import drop_compressed_state

_LEFT_ALONE = "_lowrank_comm_left_alone"


def say_disabled(who_averages: str) -> None:
    """Say on rank 0 that nothing is compressed, and who averages the gradients."""
    ready = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if ready else int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(
            'lowrank_comm: the section has "enabled": false, nothing is compressed;'
            f" {who_averages}",
            flush=True,
        )


def leave_alone(base: Optimizer) -> Optimizer:
    """Return a base optimizer as it is, in the place of a compressed one, and say so.

    The adapters know it by a mark, and leave its engine alone too.
    """
    vars(base)[_LEFT_ALONE] = True
    drop_compressed_state(base)
    say_disabled(
        "DDP or FSDP averages the gradients, and for a plain model on several workers nothing does"
        ' ("compressor": "identity" averages them there, uncompressed)'
    )
    return base


def is_left_alone(optimizer: Any) -> bool:
    """Return whether `leave_alone` has returned this optimizer."""
    return isinstance(optimizer, Optimizer) and _LEFT_ALONE in vars(optimizer)
