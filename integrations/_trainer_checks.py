"""Which Trainers cannot train compressed, and what to write instead."""

from __future__ import annotations

import logging

import transformers
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

from lowrank_comm import CompressedOptimizer, ConfigError, UnsupportedError
from lowrank_comm.integrations._compression_argument import Compression
from lowrank_comm.integrations.accelerate import compressed, refuse_alone, refuse_fsdp1

SAVING = "_save_optimizer_and_scheduler"
"""The method of a Trainer before which the error memory is averaged."""
LENGTH = "set_initial_training_values"
"""The method of a Trainer that returns, last, how many steps it will make."""

_log = logging.getLogger("lowrank_comm")
_TESTED = "5.23.0"
_REFUSED = {
    "auto_find_batch_size": (
        "the model is wrapped again in the middle of training. Set it to False, and "
        "per_device_train_batch_size."
    ),
    "enable_jit_checkpoint": (
        "ranks save by timers of their own, perhaps in different steps, and the averaging of the"
        " error memory takes all of them in one. Set it to False, and save_steps."
    ),
}
"""Arguments that cannot go with compression, and why."""


def check_trainer(trainer: Trainer, compression: Compression, who: str) -> None:
    """Refuse a Trainer without DeepSpeed with which compression cannot work.

    Args:
        trainer: before `train()`.
        compression: what the callback was given.
        who: the callback, in whose name errors are raised.

    Raises:
        ConfigError: its optimizer is another one, there is nothing to compress with,
            or it runs one process, where a launcher has started several.
        UnsupportedError: an argument that cannot go with compression, FSDP1, or a
            Trainer that lacks what the callback relies on.
    """
    if not hasattr(trainer, SAVING):
        raise UnsupportedError(
            f"{who}: the Trainer of transformers {transformers.__version__} has no {SAVING},"
            " before which the error memory is averaged for a checkpoint; it is tested with"
            f" {_TESTED}."
        )
    if trainer.args.deepspeed:
        raise ConfigError(
            f"{who}: TrainingArguments(deepspeed=...) is set, and accelerate does not use"
            " DeepSpeed, as with ACCELERATE_USE_CPU=true in the environment. Unset it; on a"
            " CPU, DS_ACCELERATOR=cpu is enough."
        )
    for key, why in _REFUSED.items():
        if getattr(trainer.args, key, False):
            raise UnsupportedError(
                f"{who}: TrainingArguments({key}=True) is not possible with compression: {why}"
            )
    refuse_alone(trainer.accelerator, who)
    refuse_fsdp1(trainer.accelerator, who)
    if compression is None:
        raise ConfigError(
            f"{who}: without DeepSpeed it needs something to compress with; write"
            " CompressionCallback(PowerSGDPlus(rank=4)), or give it the CompressedOptimizer"
            " that Trainer was given."
        )
    theirs = compressed(trainer.optimizer)
    if theirs is None and isinstance(trainer.optimizer, AcceleratedOptimizer):
        raise ConfigError(
            f"{who}: this Trainer has trained without compression already; build a new one."
        )
    given = isinstance(compression, CompressedOptimizer)
    if given and theirs is not compression:
        found = type(theirs or trainer.optimizer).__name__
        raise ConfigError(
            f"{who}: its CompressedOptimizer is not the optimizer of this Trainer ({found}); give"
            " it to both: Trainer(optimizers=(optimizer, None),"
            " callbacks=[CompressionCallback(optimizer)])."
        )
    if theirs is not None and not given:
        raise ConfigError(
            f"{who}: Trainer has a CompressedOptimizer already, and the callback"
            f" {compression!r}; give the callback the optimizer:"
            " CompressionCallback(optimizer)."
        )
    if getattr(trainer.args, "fsdp", None) and not trainer.is_fsdp_enabled:
        _log.warning(
            "TrainingArguments(fsdp=...) has no effect here: accelerate knows FSDP on"
            " accelerators only, and wraps the model by DDP. FSDP2 on a CPU:"
            " from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))."
        )
