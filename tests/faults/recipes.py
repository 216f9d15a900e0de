"""How docs/quickstarts.md tells to save and to load, without an engine's own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowrank_comm.checkpoint import load_all, save_all

KEPT = 2
"""Saves that stay."""


def save(folder: Path, step: int, model: nn.Module, optimizer: Any) -> None:
    """Save everything; a collective."""
    save_all(folder, model, optimizer, keep=KEPT, step=step)


def load(folder: Path, model: nn.Module, optimizer: Any) -> int:
    """Load the newest complete save; its step, or 0 where there is none."""
    found = load_all(folder, model, optimizer)
    return 0 if found is None else int(found["step"])
