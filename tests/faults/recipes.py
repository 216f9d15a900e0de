"""How the documentation tells to save and to load, without an engine's own way."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from lowrank_comm import CompressedOptimizer


def _newest(folder: Path, complete: str) -> Path | None:
    """The checkpoint of the highest step for which `<checkpoint>/<complete>` is there;
    "" for the checkpoint itself.
    """
    numbered = [
        (int(found[1]), path)
        for path in folder.glob("step-*")
        if (found := re.fullmatch(r"step-(\d+)(\.pt)?", path.name)) and (path / complete).exists()
    ]
    return max(numbered)[1] if numbered else None


def save(folder: Path, step: int, model: nn.Module, optimizer: Any) -> None:
    """Save model, optimizer and the compressor's state; a collective.

    Sharded models by torch.distributed.checkpoint, a folder for each step; others as
    one file, which gets its name when it is whole.
    """
    if isinstance(optimizer, CompressedOptimizer):
        optimizer.consolidate_error_memory()
    if any(isinstance(p, DTensor) for p in model.parameters()):
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save(
            {"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / f"step-{step}"
        )
    elif dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "unfinished"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
        unfinished.replace(folder / f"step-{step}.pt")
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: Any) -> int:
    """Load the newest complete checkpoint; its step, or 0 where there is none."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    newest = _newest(folder, ".metadata" if sharded else "")
    if newest is None:
        return 0
    if sharded:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=newest)
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    else:
        saved = torch.load(newest)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    return int(newest.stem.rpartition("-")[2])


def remove_all_but_newest(folder: Path) -> None:
    """Keep one checkpoint; a collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        newest = _newest(folder, "")
        for path in folder.glob("step-*"):
            if path != newest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()
