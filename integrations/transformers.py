"""Hugging Face Trainer: `Trainer(..., callbacks=[CompressionCallback(...)])`, under
torchrun, accelerate and --deepspeed.

    optimizer = CompressedOptimizer(torch.optim.AdamW(model.named_parameters(),
    lr=1e-3), PowerSGDPlus(rank=4)) Trainer(model, args, optimizers=(optimizer, None),
    callbacks=[CompressionCallback(optimizer)])

    Trainer(model, args, callbacks=[CompressionCallback(PowerSGDPlus(rank=4))])           Trainer makes the optimizer
    Trainer(model, args, callbacks=[CompressionCallback({"rank": 4, "wire_dtype": "bfloat16"})])

The protocol. No event of a callback lies between Trainer's backward pass and its
clipping, and none tells of the wrapped model before a checkpoint is loaded into it. So
the callback finds its Trainer when that has been built (`on_init_end`) and goes around
four of the instance's methods; everything else is Trainer's:

    create_optimizer                 what it returns is wrapped, if the callback was given a compressor
    accelerator.prepare              then the optimizer is attached to the wrapped model; see `accelerate`
    _save_optimizer_and_scheduler    all ranks come here before rank 0 alone takes the optimizer's state: the error memory
                                     is averaged first
    log                              figures are added to each log of a loss, hence to TensorBoard, W&B, and the console

Gradients are averaged at the end of the last micro-batch's backward, before Trainer
clips; `grad_norm` is that of the averaged gradient. With DeepSpeed, the section goes
into its configuration, and `lowrank_comm.integrations.deepspeed` does the rest;
`CompressionCallback()` then adds the figures to the logs.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from typing_extensions import override

from lowrank_comm import CompressedOptimizer, Compressor, ConfigError, UnsupportedError
from lowrank_comm.config import SECTION
from lowrank_comm.config.enabled import say_disabled
from lowrank_comm.integrations._compression_argument import (
    around,
    check,
    is_disabled,
    put_into_deepspeed,
)
from lowrank_comm.integrations.accelerate import connect, get, refuse_fsdp1
from lowrank_comm.reduction.monitoring import Compressing, Figures

__all__ = ["CompressionCallback"]

_log = logging.getLogger("lowrank_comm")
_WHO = "CompressionCallback"
_TESTED = "5.23.0"
_REFUSED = {
    "auto_find_batch_size": (
        "the model is wrapped anew in the middle of training. Set it to False, and "
        "per_device_train_batch_size."
    ),
    "enable_jit_checkpoint": (
        "ranks save by timers of their own, perhaps in different steps, and the averaging of the"
        " error memory takes all of them in one. Set it to False, and save_steps."
    ),
}
"""Arguments that cannot go with compression, and why."""
_SAVING = "_save_optimizer_and_scheduler"


class CompressionCallback(TrainerCallback):
    """Compresses the averaging of the gradients of a Trainer, and adds the figures to
    its logs.

    Args:
        compression: the `CompressedOptimizer` that Trainer was given as
            `optimizers=(optimizer, None)`; or a compressor or a section, and Trainer
            makes the optimizer; or, with --deepspeed and the section in its JSON,
            nothing. A section with "enabled": false, and the optimizer that
            `CompressedOptimizer.from_config` returns for one, leave Trainer alone.

    Raises:
        ConfigError: when Trainer is built: what was given does not fit the Trainer.

    Example:
        >>> from lowrank_comm import PowerSGDPlus
        >>> CompressionCallback(PowerSGDPlus(rank=4)).compression
        PowerSGDPlus(rank=4, restart_every=200, restart='svd', exact_restart=False, consensus_restart=False, stagger=False)
    """

    def __init__(
        self, compression: Optimizer | Compressor | Mapping[str, Any] | None = None
    ) -> None:
        check(compression, _WHO)
        self.compression = compression
        self._trainer: weakref.ref[Trainer] | None = None
        self._figures: Figures | None = None
        self._made: weakref.ref[CompressedOptimizer] | None = None
        self._disabled = False

    def detach(self) -> None:
        """Give the model back: the optimizer that was made for this callback averages
        no more backward passes of it.
        """
        made = self._made() if self._made is not None else None
        if made is not None:
            made.detach()

    @property
    def compressing(self) -> Compressing | None:
        """The `CompressedOptimizer`, or the adapter of the DeepSpeed engine; None
        before training begins.
        """
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            return None
        return (
            get(trainer.model_wrapped) if trainer.is_deepspeed_enabled else get(trainer.optimizer)
        )

    @override
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has been built."""
        self.connect(_trainer_above(self))

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped and a checkpoint loaded."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or trainer is not _trainer_above(self):
            raise ConfigError(
                f"{_WHO}: it was added to a Trainer that had been built. Give it to"
                " Trainer(callbacks=[...]), or call callback.connect(trainer) before"
                " trainer.train()."
            )
        source = self.compressing
        if self._disabled:
            return
        if source is None:
            raise ConfigError(
                f"{_WHO}: Trainer trains with {type(trainer.optimizer).__name__}, in which there is"
                " no compression. A subclass that makes its optimizer elsewhere than in"
                " create_optimizer() has to make it a compressed one."
            )
        self._figures = Figures(source)

    def connect(self, trainer: Trainer) -> None:
        """Go around the methods of a Trainer; done when it is built, by who gives the
        callback to `Trainer(callbacks=...)`.

        Args:
            trainer: before `train()`.

        Raises:
            ConfigError: the Trainer's optimizer is another one, or goes with DeepSpeed.
            UnsupportedError: FSDP1, or a Trainer that lacks what this relies on.
        """
        before = self._trainer() if self._trainer is not None else None
        if before is trainer:
            return
        if before is not None:
            raise ConfigError(
                f"{_WHO}: it belongs to another Trainer, which still has it; make one for each"
                " Trainer."
            )
        if trainer.is_deepspeed_enabled:
            mine = (
                trainer.optimizer
                if isinstance(trainer.optimizer, CompressedOptimizer)
                else self.compression
            )
            settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
            put_into_deepspeed(settings, mine, _WHO)
            self._disabled = is_disabled(settings.get(SECTION, mine))
            import lowrank_comm.integrations.deepspeed  # noqa: F401  (switches the section on)
        elif is_disabled(self.compression):
            self._leave_alone(trainer)
        else:
            self._check(trainer)
            trainer.create_optimizer = self._creating(trainer.create_optimizer)  # type: ignore[method-assign]
            saving = self._consolidating(getattr(trainer, _SAVING))
            setattr(trainer, _SAVING, saving)
        trainer.log = self._logging(trainer.log)  # type: ignore[method-assign]
        self._trainer, self._figures = weakref.ref(trainer), None

    def _leave_alone(self, trainer: Trainer) -> None:
        """Let the Trainer train as it would without this callback."""
        if isinstance(trainer.optimizer, CompressedOptimizer):
            raise ConfigError(
                f'{_WHO}: its section has "enabled": false, and Trainer has a CompressedOptimizer;'
                ' give Trainer the base optimizer, or leave "enabled" out.'
            )
        self._disabled = True
        if isinstance(self.compression, Mapping):
            say_disabled("Trainer's own engine averages the gradients")

    def _check(self, trainer: Trainer) -> None:
        """Everything that can be wrong before training begins."""
        if not hasattr(trainer, _SAVING):
            raise UnsupportedError(
                f"{_WHO}: the Trainer of transformers {transformers.__version__} has no {_SAVING},"
                " before which the error memory is averaged for a checkpoint; it is tested with"
                f" {_TESTED}."
            )
        if trainer.args.deepspeed:
            raise ConfigError(
                f"{_WHO}: TrainingArguments(deepspeed=...) is set, and accelerate does not use"
                " DeepSpeed, as with ACCELERATE_USE_CPU=true in the environment. Unset it; on a"
                " CPU, DS_ACCELERATOR=cpu is enough."
            )
        for key, why in _REFUSED.items():
            if getattr(trainer.args, key, False):
                raise UnsupportedError(
                    f"{_WHO}: TrainingArguments({key}=True) is not possible with compression: {why}"
                )
        refuse_fsdp1(trainer.accelerator, _WHO)
        if self.compression is None:
            raise ConfigError(
                f"{_WHO}: without DeepSpeed it needs something to compress with; write"
                " CompressionCallback(PowerSGDPlus(rank=4)), or give it the CompressedOptimizer"
                " that Trainer was given."
            )
        theirs, compressed = trainer.optimizer, isinstance(self.compression, CompressedOptimizer)
        inner = get(theirs)
        theirs = inner if isinstance(inner, CompressedOptimizer) else theirs
        if isinstance(theirs, AcceleratedOptimizer) and get(theirs) is None:
            raise ConfigError(
                f"{_WHO}: this Trainer has trained without compression already; build it anew."
            )
        if compressed and theirs is not self.compression:
            raise ConfigError(
                f"{_WHO}: its CompressedOptimizer is not the optimizer of this Trainer"
                f" ({type(theirs).__name__}); give it to both: Trainer(optimizers=(optimizer,"
                " None), callbacks=[CompressionCallback(optimizer)])."
            )
        if isinstance(theirs, CompressedOptimizer) and not compressed:
            raise ConfigError(
                f"{_WHO}: Trainer has a CompressedOptimizer already, and the callback"
                f" {self.compression!r}; give the callback the optimizer:"
                " CompressionCallback(optimizer)."
            )
        if getattr(trainer.args, "fsdp", None) and not trainer.is_fsdp_enabled:
            _log.warning(
                "TrainingArguments(fsdp=...) has no effect here: accelerate knows FSDP on"
                " accelerators only, and wraps the model by DDP. FSDP2 on a CPU:"
                " from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))."
            )

    def _creating(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """`trainer.create_optimizer`: Trainer calls it at the start of `train()`,
        before anything is prepared.
        """
        me = weakref.ref(self)

        @functools.wraps(create)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            optimizer: Any = create(*args, **kwargs)
            callback = me()
            trainer = (
                callback._trainer()
                if callback is not None and callback._trainer is not None
                else None
            )
            if callback is None or trainer is None:
                return optimizer
            # a subclass may set it and forget to return it
            optimizer = trainer.optimizer
            if get(optimizer) is None and not isinstance(optimizer, CompressedOptimizer):
                if not isinstance(callback.compression, Compressor | Mapping):
                    raise ConfigError(
                        f"{_WHO}: create_optimizer() made a {type(optimizer).__name__} in the place"
                        " of the CompressedOptimizer; give the callback a compressor:"
                        " CompressionCallback(PowerSGDPlus(rank=4))."
                    )
                # the optimizer of an earlier trial or train()
                callback.detach()
                trainer.optimizer = optimizer = around(optimizer, callback.compression)
                callback._made = weakref.ref(optimizer)
            _connect_when_prepared(trainer)
            return optimizer

        return wrapped

    def _consolidating(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """`trainer._save_optimizer_and_scheduler`."""
        me = weakref.ref(self)

        @functools.wraps(save)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            callback = me()
            source = callback.compressing if callback is not None else None
            if isinstance(source, CompressedOptimizer):
                source.consolidate_error_memory()
            return save(*args, **kwargs)

        return wrapped

    def _logging(self, log: Callable[..., Any]) -> Callable[..., Any]:
        """`trainer.log`, whose dict every other callback gets."""
        me = weakref.ref(self)

        @functools.wraps(log)
        def wrapped(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            callback = me()
            source = callback.compressing if callback is not None else None
            figures = callback._figures if callback is not None and "loss" in logs else None
            # Of one process only: the others' norms are their own, and nobody looks at
            # them.
            if figures is not None and source is not None and source.reducer.workers.is_writer:
                logs = {**logs, **figures.since_last()}
            return log(logs, *args, **kwargs)

        return wrapped


def _connect_when_prepared(trainer: Trainer) -> None:
    """Around `trainer.accelerator.prepare`: the optimizer is attached as soon as there
    is a wrapped model, and before a checkpoint is loaded. Trainer may have made a new
    accelerator since the last time.
    """
    accelerator = trainer.accelerator
    prepare = accelerator.prepare
    if hasattr(prepare, "_lowrank_comm"):
        return
    owner = weakref.ref(trainer)

    @functools.wraps(prepare)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        several = result if isinstance(result, list | tuple) else [result]
        there = owner()
        optimizers = [one for one in several if isinstance(get(one), CompressedOptimizer)]
        if there is not None and optimizers:
            # A model that was sharded when it was loaded, or prepared in an earlier
            # train(), does not come along.
            models = [one for one in several if isinstance(one, nn.Module)] or [there.model_wrapped]
            connect(
                accelerator,
                [*models, *optimizers],
                lambda: (now := owner()) is not None and bool(now.is_in_train),
            )
        return result

    wrapped._lowrank_comm = True  # type: ignore[attr-defined]
    accelerator.prepare = wrapped  # type: ignore[method-assign]


def _trainer_above(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling this callback: no event is told who it is from."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    raise ConfigError(
        f"{_WHO}: its events are for a Trainer to call; to connect it by hand, call"
        " callback.connect(trainer)."
    )
