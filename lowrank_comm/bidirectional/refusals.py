"""Engines that need the same weights on all ranks, and how each is recognised.

With a bidirectional method the workers' weights differ by design: each computes its
gradients at its own w_i. DDP averages gradients as if all were taken at one point,
FSDP2 and ZeRO-3 make up each layer from shards on all ranks, and ZeRO-1 and -2 give
every rank the updated shards of the others. None of them can carry such a method, and
none notices by itself.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lowrank_comm.errors import UnsupportedError
from lowrank_comm.optimizer.double_averaging import DoubleAveragingGuard
from lowrank_comm.optimizer.engine import wrapper_of
from lowrank_comm.optimizer.environment import refuse_with_deepspeed

_WHY = (
    "In a bidirectional method every worker holds weights of its own, w_i, and only their mean is"
    " the server's x, while {engine} needs the same weights on all ranks. Train the plain model in"
    " a plain loop, one process a worker, or choose a compressor of gradients such as powersgd_plus"
    " for this engine."
)


def refuse_deepspeed(optimizer: Optimizer) -> None:
    """Let Trainer and Accelerate raise UnsupportedError when they start DeepSpeed with
    this optimizer.
    """
    refuse_with_deepspeed(optimizer, UnsupportedError(_WHY.format(engine="DeepSpeed")))


def refuse_model(model: nn.Module) -> None:
    """Raise UnsupportedError for a model that is wrapped by an engine."""
    wrapper = wrapper_of(model)
    if wrapper is not None:
        raise UnsupportedError(f"the model is wrapped by {wrapper}. {_WHY.format(engine=wrapper)}")


def refuse_parameter(name: str, parameter: Tensor) -> None:
    """Raise UnsupportedError for a parameter of which this rank has a shard only."""
    engine = None
    if isinstance(parameter, DTensor):
        engine = "FSDP2 (fully_shard), as tensor parallelism,"
    elif getattr(parameter, "_is_flat_param", False):
        engine = "FullyShardedDataParallel"
    elif hasattr(parameter, "ds_id"):
        engine = "DeepSpeed ZeRO-3"
    if engine is not None:
        raise UnsupportedError(
            f"parameter {name!r} is held in shards. {_WHY.format(engine=engine)}"
        )


def guard_against_averaging() -> DoubleAveragingGuard:
    """Return the check that no engine averages the gradients; it raises
    UnsupportedError.
    """
    why = _WHY.format(engine="such an engine")
    return DoubleAveragingGuard(f", as DistributedDataParallel does. {why}", UnsupportedError)
