"""PyTorch Lightning: `Trainer(strategy="ddp", callbacks=[CompressionCallback()])`, with
automatic optimization.

`configure_optimizers` returns a `CompressedOptimizer`, alone or with a scheduler. The
order of Lightning's hooks serves it:

    setup                     before the strategy wraps the model: refuse what cannot
                              work
    on_fit_start              the model is wrapped and optimizers exist, but no state of
                              an optimizer is restored yet: attach
    on_before_optimizer_step  gradients of the last micro-batch are there and clipping
                              comes next: average, if that has not been done
    on_train_batch_end        log figures, at the trainer's log interval
    state_dict                on all ranks, right before a checkpoint asks the optimizer
                              for its state: consolidate the error memory
    teardown, on_exception    detach

All of these are public. Lightning itself tells DDP which micro-batch is the last one of
a step.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from torch.optim import Optimizer

from lowrank_comm.communication.topology import launched_ranks
from lowrank_comm.config.enabled import is_left_alone
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.optimizer.compressed import CompressedOptimizer
from lowrank_comm.reduction.monitoring import Figures


class CompressionCallback(Callback):
    """Connects the `CompressedOptimizer` that `configure_optimizers` returns to the
    model as Lightning's strategy wraps it.

    The base optimizer that `CompressedOptimizer.from_config` returns for a section with
    "enabled": false leaves Lightning alone. Otherwise:

    Gradients are averaged, compressed, once a step, before `gradient_clip_val` acts.
    Checkpoints hold the mean error memory, which each save averages once over the
    workers. Figures of the compression go to the trainer's loggers.

    Args:
        log_figures: whether to log figures, at the trainer's `log_every_n_steps`.

    Raises:
        UnsupportedError: when fitting starts, with manual optimization, or a strategy
            other than DDP or a single device.
        ConfigError: when fitting starts, without a CompressedOptimizer, or with
            clipping that Lightning cannot do.

    Example:
        >>> import torch, lightning
        >>> from lowrank_comm import CompressedOptimizer, PowerSGDPlus
        >>> from lowrank_comm.integrations.lightning import CompressionCallback
        >>> class Regression(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(64, 64)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         base = torch.optim.AdamW(self.parameters())
        ...         return CompressedOptimizer(base, PowerSGDPlus(rank=4))
        >>> callback = CompressionCallback()
        >>> # lightning.Trainer(strategy="ddp", callbacks=[callback])
    """

    def __init__(self, log_figures: bool = True) -> None:
        self._log_figures = log_figures
        self._optimizer: CompressedOptimizer | None = None
        self._figures: Figures | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before the strategy wraps the model."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        name = f"strategy={type(strategy).__module__}.{type(strategy).__qualname__}"
        if isinstance(strategy, DeepSpeedStrategy):
            raise UnsupportedError(
                f"CompressionCallback: {name} keeps gradients to itself. Leave the callback and"
                " CompressedOptimizer out, import lowrank_comm.integrations.deepspeed, and put a"
                ' section "lowrank_comm" into the DeepSpeed config.'
            )
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy) or isinstance(
            strategy, XLAStrategy
        ):
            raise UnsupportedError(
                f'CompressionCallback: {name} is not supported; use Trainer(strategy="ddp"), or a'
                " plain loop and optimizer.attach(model) for FSDP2 (fully_shard). FSDP1 has no"
                " rows to compress."
            )
        launched = launched_ranks()
        if launched > 1 and isinstance(strategy, SingleDeviceStrategy):
            raise ConfigError(
                f"CompressionCallback: WORLD_SIZE={launched} is in the environment, but {name} runs"
                " one process: each would train by itself, on all data. Write"
                ' Trainer(strategy="ddp", devices=..., num_nodes=...), or unset WORLD_SIZE.'
            )
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                "CompressionCallback: automatic_optimization=False is not supported, as Lightning"
                " then does not tell which backward pass is the last of a step. Leave it at True,"
                " or write a plain loop with optimizer.attach(model)."
            )
        if _scaler_of(trainer) is not None and trainer.gradient_clip_val:
            raise ConfigError(
                f"CompressionCallback: Trainer(gradient_clip_val={trainer.gradient_clip_val}) with"
                " a GradScaler (precision 16-mixed): Lightning does not clip for an optimizer that"
                " takes the loss scale out by itself. Leave gradient_clip_val out and use"
                " CompressedOptimizer(max_grad_norm=...)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the optimizer to the wrapped model; a checkpoint's optimizer state is
        loaded after this.
        """
        found = trainer.optimizers
        # there is one only with automatic optimization
        optimizer = found[0] if len(found) == 1 else None
        model = trainer.strategy.model
        if self._optimizer is not None:
            # of a fit that was broken off
            self._optimizer.detach()
            self._optimizer = self._figures = None
        if is_left_alone(optimizer):
            return
        if not isinstance(optimizer, CompressedOptimizer) or model is None:
            raise ConfigError(
                "CompressionCallback: configure_optimizers returned"
                f" {[type(each).__name__ for each in found]}, and no CompressedOptimizer; return"
                " CompressedOptimizer(torch.optim.AdamW(...), PowerSGDPlus(rank=4))."
            )
        self._optimizer = optimizer
        steps = trainer.estimated_stepping_batches
        optimizer.attach(
            model,
            scaler=_scaler_of(trainer),
            # infinite where neither steps nor epochs are limited
            training_steps=int(steps) if 0 < steps < math.inf else None,
        )
        self._figures = Figures(optimizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Average the gradients before they are clipped, where the end of the backward
        pass has not done so.
        """
        if self._optimizer is not None:
            self._optimizer.reduce_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures since the last time."""
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._figures is None or not self._log_figures or interval == 0 or step % interval:
            return
        # empty between the micro-batches of a step
        pl_module.log_dict(
            self._figures.since_last(), on_step=True, on_epoch=False, rank_zero_only=True
        )

    def state_dict(self) -> dict[str, Any]:
        """Average the error memory over the workers, for the optimizer's state that the
        checkpoint takes next; a collective.

        Returns:
            Nothing of its own.
        """
        if self._optimizer is not None:
            self._optimizer.consolidate_error_memory()
        return {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model back, for another fit with another optimizer."""
        if stage == "fit" and self._optimizer is not None:
            self._optimizer.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the model back after a fit that was broken off."""
        if self._optimizer is not None:
            self._optimizer.detach()


def _scaler_of(trainer: Trainer) -> Any:
    """Return the GradScaler of precision 16-mixed, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)
