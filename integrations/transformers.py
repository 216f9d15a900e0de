"""Hugging Face Trainer: `Trainer(..., callbacks=[CompressionCallback(...)])`, under
torchrun, accelerate and --deepspeed.

    base = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    optimizer = CompressedOptimizer(base, PowerSGDPlus(rank=4))
    callback = CompressionCallback(optimizer)
    Trainer(model, args, optimizers=(optimizer, None), callbacks=[callback])

or, where Trainer makes the optimizer, a compressor or a section:

    callback = CompressionCallback(PowerSGDPlus(rank=4))
    callback = CompressionCallback({"rank": 4, "wire_dtype": "bfloat16"})
    Trainer(model, args, callbacks=[callback])

The protocol. No event of a callback lies between Trainer's backward pass and its
clipping, and none tells of the wrapped model before a checkpoint is loaded into it. So
the callback finds its Trainer when that has been built (`on_init_end`) and wraps five
of the instance's methods; everything else is Trainer's:

    train                          when it has ended, by an exception too, another
                                   Trainer may take the model over
    create_optimizer               what it returns is compressed, if the callback was
                                   given a compressor or a section
    accelerator.prepare            then the optimizer is attached to the wrapped model;
                                   see `accelerate`
    _save_optimizer_and_scheduler  all ranks come here before rank 0 alone takes the
                                   optimizer's state: the error memory is averaged first
    log                            figures are added to each log of a loss, hence to
                                   TensorBoard, W&B, and the console

Gradients are averaged at the end of the last micro-batch's backward, before Trainer
clips; `grad_norm` is that of the averaged gradient. With DeepSpeed, the section goes
into its configuration, and `lowrank_comm.integrations.deepspeed` does the rest;
`CompressionCallback()` then adds the figures to the logs.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typing_extensions import override

from lowrank_comm import CompressedOptimizer, Compressor, ConfigError
from lowrank_comm.checkpointing.state_dict import drop_compressed_state
from lowrank_comm.config.enabled import say_disabled
from lowrank_comm.integrations._compression_argument import (
    around,
    check,
    is_disabled,
    put_into_deepspeed,
)
from lowrank_comm.integrations._methods import wrap_method
from lowrank_comm.integrations._trainer_checks import LENGTH, SAVING, check_trainer
from lowrank_comm.integrations.accelerate import compressed, connect, get
from lowrank_comm.reduction.monitoring import Compressing, Figures

__all__ = ["CompressionCallback"]

_WHO = "CompressionCallback"
_log = logging.getLogger("lowrank_comm")


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
        >>> CompressionCallback(PowerSGDPlus(rank=4)).compression.rank
        4
    """

    def __init__(
        self, compression: Optimizer | Compressor | Mapping[str, Any] | None = None
    ) -> None:
        check(compression, _WHO)
        self.compression = compression
        # weak references: the Trainer holds this callback
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._made: Callable[[], CompressedOptimizer | None] = lambda: None
        self._figures: Figures | None = None
        self._disabled = self._training = False
        # optimizer steps of the run that begins
        self._training_steps: int | None = None

    def detach(self) -> None:
        """Give the model back: the optimizer that was made for this callback averages
        no more backward passes of it.
        """
        made = self._made()
        if made is not None:
            made.detach()

    @property
    def compressing(self) -> Compressing | None:
        """The `CompressedOptimizer`, or the adapter of the DeepSpeed engine; None
        before training begins.
        """
        trainer = self._trainer()
        if trainer is None:
            return None
        return get(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.optimizer)

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Connect to the Trainer, which has been built."""
        self.connect(_trainer_above(self))

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the prepared optimizer or engine compresses: the model is wrapped
        and a checkpoint loaded.
        """
        trainer = self._trainer()
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
        if state.global_step and not source.reducer.step:
            # Trainer loads an optimizer's state where it finds one, else says nothing
            _log.warning(
                "the run goes on from step %d, but no optimizer's state was loaded: base optimizer,"
                " bases and error memory start anew",
                state.global_step,
            )
        self._figures = Figures(source)

    def connect(self, trainer: Trainer) -> None:
        """Wrap the methods of a Trainer; `Trainer(callbacks=[...])` does it by itself.

        Args:
            trainer: before `train()`.

        Raises:
            ConfigError: the Trainer's optimizer is another one, or goes with DeepSpeed.
            UnsupportedError: FSDP1, or a Trainer that lacks what this relies on.
        """
        before = self._trainer()
        if before is trainer:
            return
        if before is not None:
            raise ConfigError(
                f"{_WHO}: it belongs to another Trainer, which still has it; make one for each"
                " Trainer."
            )
        if trainer.is_deepspeed_enabled:
            given = compressed(trainer.optimizer) or self.compression
            self._disabled = is_disabled(put_into_deepspeed(trainer.accelerator, given, _WHO))
        elif is_disabled(self.compression):
            self._leave_alone(trainer)
        else:
            check_trainer(trainer, self.compression, _WHO)
            wrap_method(trainer, "train", self._train)
            if hasattr(trainer, LENGTH):
                wrap_method(trainer, LENGTH, self._learn_length)
            wrap_method(trainer, "create_optimizer", self._create_optimizer)
            wrap_method(trainer, SAVING, self._save)
        wrap_method(trainer, "log", self._log)
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
        wrap_method(trainer, "create_optimizer", self._create_plain_optimizer)

    def _train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap `trainer.train`: Trainer's own `is_in_train` stays on after an
        exception.
        """
        self._training = True
        try:
            return train(*args, **kwargs)
        finally:
            self._training = False

    def _learn_length(self, values: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap the method in which Trainer finds out how many steps it will make, of
        which a warm-up may be a fraction.
        """
        found = values(*args, **kwargs)
        self._training_steps = int(found[-1])
        return found

    def _create_optimizer(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap `trainer.create_optimizer`, which Trainer calls at the start of
        `train()`, before anything is prepared.
        """
        made: Any = create(*args, **kwargs)
        trainer = self._trainer()
        if trainer is None:
            return made
        # a subclass may set it and forget to return it
        optimizer = trainer.optimizer
        if compressed(optimizer) is None:
            if not isinstance(self.compression, Compressor | Mapping):
                raise ConfigError(
                    f"{_WHO}: create_optimizer() made a {type(optimizer).__name__} in the place"
                    " of the CompressedOptimizer; give the callback a compressor:"
                    " CompressionCallback(PowerSGDPlus(rank=4))."
                )
            # the optimizer of an earlier trial or train()
            self.detach()
            trainer.optimizer = optimizer = around(
                optimizer, self.compression, self._training_steps
            )
            self._made = weakref.ref(optimizer)
        # Trainer may have made a new accelerator since the last time
        wrap_method(trainer.accelerator, "prepare", self._prepare)
        return optimizer

    def _create_plain_optimizer(self, create: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Wrap `create_optimizer` of a Trainer that is left alone: its optimizer says
        what it leaves out of a compressed checkpoint.
        """
        optimizer = create(*args, **kw)
        drop_compressed_state(optimizer)
        return optimizer

    def _prepare(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap `trainer.accelerator.prepare`: attach the optimizer as soon as there is
        a wrapped model, and before a checkpoint is loaded.
        """
        result = prepare(*args, **kwargs)
        trainer = self._trainer()
        if trainer is None:
            return result
        several = result if isinstance(result, list | tuple) else [result]
        # A model that was sharded when it was loaded, or prepared in an earlier
        # train(), does not come along.
        models = [one for one in several if isinstance(one, nn.Module)] or [trainer.model_wrapped]
        connect(
            trainer.accelerator,
            [*models, *(one for one in several if not isinstance(one, nn.Module))],
            self._is_training(weakref.ref(trainer), weakref.ref(self)),
            self._training_steps,
        )
        return result

    @staticmethod
    def _is_training(
        trainer: weakref.ref[Trainer], callback: weakref.ref[CompressionCallback]
    ) -> Callable[[], bool]:
        """Return what says whether backward passes are those of the Trainer's loop."""

        def is_training() -> bool:
            there, mine = trainer(), callback()
            return there is not None and there.is_in_train and mine is not None and mine._training

        return is_training

    def _save(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap `_save_optimizer_and_scheduler`: first average the error memory."""
        source = self.compressing
        if isinstance(source, CompressedOptimizer):
            source.consolidate_error_memory()
        return save(*args, **kwargs)

    def _log(
        self, log: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap `trainer.log`: add the figures to its dict, which every other callback
        gets.
        """
        source, figures = self.compressing, self._figures if "loss" in logs else None
        # the writing process alone logs: the other processes have norms of their own,
        # which are not logged
        if figures is not None and source is not None and source.reducer.workers.is_writer:
            logs = {**logs, **figures.since_last()}
        return log(logs, *args, **kwargs)


def _trainer_above(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is calling this callback: no event is told which Trainer
    it comes from.
    """
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
