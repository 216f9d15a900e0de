"""lowrank_comm: low-rank gradient communication with error feedback, for any optimizer
and engine.

`CompressedOptimizer` wraps a torch optimizer and averages the gradients over the
workers through a compressor. See the README for how to switch it on in DeepSpeed by
JSON.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_comm.compressors import (
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
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import (
    ConfigError,
    ConfigMismatchError,
    DivergenceError,
    LowRankCommError,
    StateMismatchError,
    UnsupportedError,
)
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.optimizer.compressed import CompressedOptimizer
from lowrank_comm.reduction.monitoring import Figures, StepLog
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.version import __version__

if TYPE_CHECKING:
    from lowrank_comm.projected import ProjectedAdamW, ProjectedSGD

# In a checkout that is not installed, `lowrank_comm.integrations` is the folder beside
# this one.
if (
    not (Path(__file__).parent / "integrations").is_dir()
    and (Path(__file__).parents[1] / "integrations").is_dir()
):
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "Acp",
    "Atomo",
    "CompressedOptimizer",
    "Compressor",
    "ConfigError",
    "ConfigMismatchError",
    "DivergenceError",
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
    "__version__",
]

# Modules that are loaded when one of these names is asked for.
_LAZY = {
    "ProjectedAdamW": "lowrank_comm.projected:ProjectedAdamW",
    "ProjectedSGD": "lowrank_comm.projected:ProjectedSGD",
    "bidirectional": "lowrank_comm.bidirectional:",
    "checkpoint": "lowrank_comm.checkpoint:",
    "projected": "lowrank_comm.projected:",
    "simulation": "lowrank_comm.simulation:",
}

# Type checkers see the imports above; a `__getattr__` would allow them any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = pkgutil.resolve_name(_LAZY[name])
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY})
