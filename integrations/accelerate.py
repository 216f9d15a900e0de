"""Hugging Face Accelerate: `prepare(accelerator, model, optimizer, ...)` in the place
of `accelerator.prepare(...)`.

What it does beside Accelerate's own prepare:

1. The optimizer becomes a `CompressedOptimizer`, if it is none yet, before Accelerate
   sees it.
2. When the model is wrapped (DDP, FSDP2, HSDP, or not at all), the optimizer is
   attached to it, and told of the accelerator's GradScaler.
   `accelerator.sync_gradients` says which backward pass is the last one of its step; at
   its end the gradients are averaged, so that `accelerator.clip_grad_norm_` clips the
   averaged ones.
3. A step that all workers skip, because some gradient was not finite, is told to
   Accelerate, which then leaves the learning rate as it was
   (`accelerator.optimizer_step_was_skipped`).
4. `accelerator.save_state`, which all ranks have to call, first averages the error
   memory over the workers, so that `load_state` finds it on every rank.

With DeepSpeed, the section goes into the plugin's configuration, and
`lowrank_comm.integrations.deepspeed` does the rest.

`transformers` uses the same functions, since Trainer prepares its model by an
Accelerator.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from lowrank_comm import CompressedOptimizer, Compressor, ConfigError, UnsupportedError
from lowrank_comm.checkpointing.state_dict import drop_compressed_state
from lowrank_comm.communication import Group
from lowrank_comm.communication.topology import launched_ranks
from lowrank_comm.config.enabled import is_left_alone, say_disabled
from lowrank_comm.integrations._compression_argument import (
    around,
    check,
    is_disabled,
    put_into_deepspeed,
)
from lowrank_comm.reduction.monitoring import Compressing

__all__ = ["connect", "get", "prepare"]

_OURS = "_lowrank_comm"
_told: weakref.WeakKeyDictionary[CompressedOptimizer, weakref.ref[AcceleratedOptimizer]] = (
    weakref.WeakKeyDictionary()
)
"""Optimizer -> the `AcceleratedOptimizer` around it that is told of its steps."""
_WHO = "lowrank_comm.integrations.accelerate.prepare"


def prepare(
    accelerator: Accelerator,
    *objects: Any,
    compression: Compressor | Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """Prepare objects as `accelerator.prepare(*objects)` does, with the averaging of
    the gradients compressed.

    Args:
        accelerator: of the run.
        objects: model, optimizer, data loaders, scheduler, as for
            `accelerator.prepare`.
        compression: a compressor or a section, for an optimizer that is not a
            `CompressedOptimizer` yet; with DeepSpeed, None where its JSON has the
            section "lowrank_comm". A section with "enabled": false leaves everything
            to `accelerator.prepare`.
        keywords: of `accelerator.prepare`.

    Returns:
        What `accelerator.prepare` returns.

    Raises:
        ConfigError: nothing to compress with, or twice; a CompressedOptimizer with
            DeepSpeed; or one process, where a launcher has started several.
        UnsupportedError: FSDP1, or another wrapper that cannot be compressed.

    Example:
        accelerator = Accelerator(gradient_accumulation_steps=2)
        model, optimizer, loader = prepare(
            accelerator, model, optimizer, loader, compression=PowerSGDPlus(rank=4)
        )
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    """
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(
            f"{_WHO}: the accelerator comes first, and got {type(accelerator).__name__}; write"
            " prepare(accelerator, model, optimizer, ...)."
        )
    check(compression, _WHO)
    if compression is None and any(map(is_left_alone, objects)):
        return accelerator.prepare(*objects, **keywords)
    mine = [one for one in objects if compressed(one) is not None]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        put_into_deepspeed(accelerator, mine[0] if mine else compression, _WHO)
        return accelerator.prepare(*objects, **keywords)
    if is_disabled(compression) and not mine:
        say_disabled("the engine that Accelerate makes averages the gradients")
        for one in objects:
            if isinstance(one, Optimizer):
                drop_compressed_state(one)
        return accelerator.prepare(*objects, **keywords)
    refuse_alone(accelerator, _WHO)
    refuse_fsdp1(accelerator, _WHO)
    if mine and compression is not None:
        raise ConfigError(
            f"{_WHO}: the optimizer is a CompressedOptimizer already; leave"
            f" compression={compression!r} out."
        )
    optimizers = mine or [one for one in objects if isinstance(one, Optimizer)]
    if not mine and compression is None:
        raise ConfigError(
            f"{_WHO}: there is nothing to compress with: give compression=PowerSGDPlus(rank=4) or a"
            " section, or make the optimizer a CompressedOptimizer."
        )
    if not any(isinstance(one, nn.Module) for one in objects) or len(optimizers) != 1:
        raise ConfigError(
            f"{_WHO}: one model and its optimizer belong into one call, got"
            f" {[type(one).__name__ for one in objects]}; prepare further optimizers by"
            " accelerator.prepare."
        )
    if compression is not None:
        outer = around(optimizers[0], compression)
        objects = tuple(outer if one is optimizers[0] else one for one in objects)
    result = accelerator.prepare(*objects, **keywords)
    connect(accelerator, result)
    return result


def connect(
    accelerator: Accelerator,
    prepared: Sequence[Any],
    is_training: Callable[[], bool] | None = None,
    training_steps: int | None = None,
) -> None:
    """Attach the compressed optimizers among what `accelerator.prepare` has returned;
    those that are attached already stay as they are.

    Args:
        accelerator: that has prepared them.
        prepared: models and optimizers.
        is_training: whether backward passes are those of a training loop now; None:
            always.
        training_steps: optimizer steps of the whole run, if they are known.

    Raises:
        ConfigError: no model among them holds an optimizer's parameters, or
            reduce_at="step".
    """
    models = [one for one in prepared if isinstance(one, nn.Module)]
    for one in prepared:
        optimizer = compressed(one)
        if isinstance(one, AcceleratedOptimizer) and optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            fitting = [model for model in models if any(id(p) in held for p in model.parameters())]
            if not fitting:
                raise ConfigError(
                    "no prepared model holds the parameters of the CompressedOptimizer; build it"
                    " from this model, and prepare both in one call."
                )
            told = _told[optimizer]() if optimizer in _told else None
            # another accelerator's, or none yet
            if told is not one or not optimizer.is_attached_to(fitting[0]):
                _connect(accelerator, one, optimizer, fitting[0], is_training, training_steps)


def _connect(
    accelerator: Accelerator,
    outer: AcceleratedOptimizer,
    optimizer: CompressedOptimizer,
    model: nn.Module,
    is_training: Callable[[], bool] | None,
    training_steps: int | None,
) -> None:
    state = accelerator.gradient_state
    theirs = weakref.ref(accelerator)
    wrapper = weakref.ref(outer)

    def in_use() -> bool:
        # the optimizer is this accelerator's until it is freed (free_memory)
        there = theirs()
        held = there is not None and any(one is wrapper() for one in there._optimizers)
        return held and (is_training is None or is_training())

    def is_last_backward() -> bool:
        # the state is the process's, and says yes outside of a loop, too
        return bool(state.sync_gradients) and in_use()

    optimizer.attach(
        model,
        scaler=accelerator.scaler,
        is_last_backward=is_last_backward,
        in_use=in_use,
        training_steps=training_steps,
    )

    if optimizer not in _told:
        optimizer.register_step_post_hook(_tell)
    _told[optimizer] = wrapper
    if not hasattr(accelerator.save_state, _OURS):
        accelerator.save_state = _consolidating(accelerator)  # type: ignore[method-assign]


def _tell(optimizer: CompressedOptimizer, *_: Any) -> None:
    """Tell Accelerate, after a step, whether it was skipped: set what
    AcceleratedOptimizer.step reads next, with a scaler and without.
    """
    told = _told[optimizer]()
    if told is not None:
        told._is_overflow = optimizer.step_was_skipped
        told._accelerate_step_called = not optimizer.step_was_skipped


def _consolidating(accelerator: Accelerator) -> Callable[..., Any]:
    """Return an `accelerator.save_state` that first averages the error memory over the
    workers; all ranks call it.
    """
    save = accelerator.save_state

    @functools.wraps(save)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # those that it saves
        for one in accelerator._optimizers:
            optimizer = compressed(one)
            if optimizer is not None:
                optimizer.consolidate_error_memory()
        return save(*args, **kwargs)

    setattr(wrapped, _OURS, True)
    return wrapped


def refuse_alone(accelerator: Accelerator, who: str) -> None:
    """Raise ConfigError where a launcher has started several processes, or there is a
    group of them, and Accelerate is not distributed: each would train on all data.
    """
    launched = max(launched_ranks(), Group().size)
    alone = accelerator.distributed_type == DistributedType.NO or accelerator.num_processes == 1
    if launched > 1 and alone:
        raise ConfigError(
            f"{who}: there are WORLD_SIZE={launched} processes, but Accelerate is not distributed"
            f" (distributed_type {accelerator.distributed_type.value}, on {accelerator.device}):"
            " each process would train on all data. On CPUs, set ACCELERATE_USE_CPU=true in the"
            " environment (of Trainer, too), or write Accelerator(cpu=True); else unset WORLD_SIZE."
        )


def refuse_fsdp1(accelerator: Accelerator, who: str) -> None:
    """Raise UnsupportedError where Accelerate is going to wrap the model by FSDP1."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise UnsupportedError(
            f"{who}: FSDP1 flattens the parameters, so that a rank's part has no rows to compress."
            ' Use FSDP2: fsdp_version=2 (Trainer: fsdp_config={"version": 2, ...}; accelerate'
            " launch --fsdp_version 2)."
        )


def compressed(optimizer: Any) -> CompressedOptimizer | None:
    """Return the CompressedOptimizer that an object is, or that Accelerate has wrapped;
    None for anything else.
    """
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner if isinstance(inner, CompressedOptimizer) else None


def get(prepared: Any) -> Compressing | None:
    """Return what compresses, of what `prepare` has returned.

    Args:
        prepared: an optimizer or a model.

    Returns:
        The `CompressedOptimizer` of an optimizer, or the adapter of a DeepSpeed engine:
        both have `last_report`, `ledger` and `error_memory()`. None for anything else.
    """
    if isinstance(prepared, AcceleratedOptimizer):
        return compressed(prepared)
    if type(prepared).__name__ == "DeepSpeedEngine":
        from lowrank_comm.integrations import deepspeed

        return deepspeed.get(prepared)
    return None
