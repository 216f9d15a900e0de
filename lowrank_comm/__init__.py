"""lowrank_comm: low-rank gradient communication with error feedback, for any optimizer and engine.

`CompressedOptimizer` wraps a torch optimizer and averages the gradients over the workers through a compressor. See the
README for how to switch it on in DeepSpeed by JSON.
"""

from __future__ import annotations

from pathlib import Path

from .compressors import (
    Acp,
    Atomo,
    Compressor,
    GaLore,
    GoLore,
    GreedyLore,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomProjection,
)
from .error_feedback import ErrorFeedback
from .errors import ConfigError, ConfigMismatchError, LowRankCommError, StateMismatchError, UnsupportedError
from .optimizer import CompressedOptimizer
from .policy import Rule
from .projected import ProjectedAdamW, ProjectedSGD
from .quantization import Quantization
from .watching import Figures, StepLog

# In a checkout that is not installed, `lowrank_comm.integrations` is the folder beside this one.
if not (Path(__file__).parent / "integrations").is_dir() and (Path(__file__).parents[1] / "integrations").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"

__all__ = [
    "Acp",
    "Atomo",
    "CompressedOptimizer",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "ErrorFeedback",
    "Figures",
    "GaLore",
    "GoLore",
    "GreedyLore",
    "Identity",
    "LowRankCommError",
    "PowerSGD",
    "PowerSGDPlus",
    "ProjectedAdamW",
    "ProjectedSGD",
    "Quantization",
    "RandomProjection",
    "Rule",
    "StateMismatchError",
    "StepLog",
    "UnsupportedError",
]
