"""What test_transformers.py has Trainers do wrong, or seldom; cases for the pool."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.integrations.transformers import CompressionCallback
from tests.support.deepspeed_worker import message
from tests.support.trainers import RANK_2, Sentences, arguments, environment, new_model


def compressed(model: nn.Module, **keywords: Any) -> CompressedOptimizer:
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return CompressedOptimizer.from_config(base, RANK_2, **keywords)


@contextlib.contextmanager
def run_of(
    folder: str, engine: str = "ddp", steps: int = 3, **more: Any
) -> Iterator[tuple[Any, Any]]:
    """A new model, and arguments for a short run."""
    with environment(engine) as of_the_engine:
        yield (
            new_model(engine, Path(folder)),
            arguments(engine, Path(folder), steps, of_the_engine | more),
        )


def without_the_callback(rank: int, folder: str) -> None:
    with run_of(folder) as (model, args):
        Trainer(
            model, args, train_dataset=Sentences(), optimizers=(compressed(model), None)
        ).train()


def wrong_use(rank: int, folder: str) -> dict[str, str]:
    said = {}

    def build(name: str, optimizer: bool, told: Any, **more: Any) -> None:
        def attempt() -> None:
            with run_of(folder, **more) as (model, args):
                mine = compressed(model) if optimizer else None
                callback = CompressionCallback(told(model) if callable(told) else told)
                Trainer(
                    model,
                    args,
                    train_dataset=Sentences(),
                    optimizers=(mine, None),
                    callbacks=[callback],
                )

        said[name] = message(attempt)

    build("another optimizer", True, compressed)
    build("nothing", False, None)
    build("twice", True, PowerSGDPlus(rank=2))
    build("unknown key", False, {"rnk": 4})
    build("not a compressor", False, 4)

    def one_process() -> None:
        with environment("plain") as of_the_engine:
            # of torchrun, and nobody has told Accelerate to use CPUs
            os.environ["WORLD_SIZE"] = "2"
            del os.environ["ACCELERATE_USE_CPU"]
            model = new_model("plain", Path(folder))
            args = arguments("plain", Path(folder), 1, of_the_engine | {"use_cpu": False})
            callbacks = [CompressionCallback(RANK_2)]
            Trainer(model, args, train_dataset=Sentences(), callbacks=callbacks)

    said["one process of two"] = message(one_process)

    # accelerate makes a plugin for it on accelerators only
    def fsdp1() -> None:
        with run_of(folder) as (model, args):
            trainer = Trainer(model, args, train_dataset=Sentences())
            trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
            CompressionCallback(RANK_2).connect(trainer)

    said["fsdp1"] = message(fsdp1)

    def late(connected: bool) -> None:
        with run_of(folder) as (model, args):
            trainer = Trainer(model, args, train_dataset=Sentences())
            callback = CompressionCallback(RANK_2)
            trainer.add_callback(callback)
            if connected:
                callback.connect(trainer)
            trainer.train()

    said["added late"] = message(lambda: late(False))
    said["added late, and connected"] = message(lambda: late(True))

    def reused() -> None:
        with run_of(folder) as (model, args):
            callbacks = [CompressionCallback(RANK_2)]
            first = Trainer(model, args, train_dataset=Sentences(), callbacks=callbacks)
            Trainer(model, args, train_dataset=Sentences(), callbacks=callbacks)
            del first

    said["reused"] = message(reused)

    def forgetful() -> None:
        class Forgetful(Trainer):
            def create_optimizer(self, model: Any = None) -> None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        with run_of(folder, steps=2) as (model, args):
            callback = CompressionCallback(RANK_2)
            Forgetful(model, args, train_dataset=Sentences(), callbacks=[callback]).train()

    said["a subclass that returns no optimizer"] = message(forgetful)

    def replaced() -> None:
        class Own(Trainer):
            def create_optimizer(self, model: Any = None) -> Any:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
                return self.optimizer

        with run_of(folder, steps=2) as (model, args):
            mine = compressed(model)
            callbacks = [CompressionCallback(mine)]
            Own(
                model, args, train_dataset=Sentences(), optimizers=(mine, None), callbacks=callbacks
            ).train()

    said["a subclass with an optimizer of its own"] = message(replaced)
    build("batch sizes found out", False, RANK_2, auto_find_batch_size=True)
    build("saving by timers", False, RANK_2, enable_jit_checkpoint=True)

    def too_late() -> None:
        with run_of(folder) as (model, args):
            mine = compressed(model, reduce_at="step")
            callbacks = [CompressionCallback(mine)]
            Trainer(
                model, args, train_dataset=Sentences(), optimizers=(mine, None), callbacks=callbacks
            ).train()

    said["reduces too late"] = message(too_late)
    return said


class Lines(logging.Handler):
    """Remembers what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def fsdp_on_a_cpu(rank: int, folder: str) -> tuple[list[str], str]:
    heard, log = Lines(), logging.getLogger("lowrank_comm")
    log.addHandler(heard)
    fsdp = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    try:
        with run_of(folder, steps=1, **fsdp) as (model, args):
            trainer = Trainer(
                model, args, train_dataset=Sentences(), callbacks=[CompressionCallback(RANK_2)]
            )
            trainer.train()
            return heard.lines, type(trainer.model_wrapped).__name__
    finally:
        log.removeHandler(heard)


def nothing_worth_it(rank: int, folder: str) -> tuple[str, list[float]]:
    from peft import LoraConfig, get_peft_model

    printed = io.StringIO()
    with run_of(folder) as (model, args), contextlib.redirect_stdout(printed):
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        trainer = Trainer(
            model,
            args,
            train_dataset=Sentences(),
            callbacks=[CompressionCallback(PowerSGDPlus(rank=4))],
        )
        trainer.train()
        return printed.getvalue(), [
            log["loss"] for log in trainer.state.log_history if "loss" in log
        ]


def frozen_parts(rank: int, folder: str) -> tuple[str, float, float]:
    printed = io.StringIO()
    with run_of(folder) as (model, args), contextlib.redirect_stdout(printed):
        model.get_input_embeddings().requires_grad_(False)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(
            model,
            args,
            train_dataset=Sentences(),
            callbacks=[CompressionCallback({**RANK_2, "rank": 1})],
        )
        trainer.train()
        moved = {
            name: float((p - before[name]).detach().norm()) for name, p in model.named_parameters()
        }
        rows = "\n".join(row.name for row in trainer.optimizer.optimizer.plan.rows)
        frozen = sum(moved.pop(name) for name in list(moved) if "embed_tokens" in name)
        return rows, min(moved.values()), frozen


def outside_of_training(rank: int, folder: str) -> tuple[int, int, int]:
    """After train(): another backward of the model, on one rank alone; then an
    uncompressed Trainer on the same model.
    """
    with run_of(folder) as (model, args):
        callback = CompressionCallback(RANK_2)
        trainer = Trainer(model, args, train_dataset=Sentences(), callbacks=[callback])
        trainer.train()
        source = callback.compressing
        after = source.ledger.steps  # type: ignore[union-attr]
        if rank == 0:
            example = {key: value[None] for key, value in Sentences()[0].items()}
            model(**example).loss.backward()
            model.zero_grad()
        alone = source.ledger.steps  # type: ignore[union-attr]
    with run_of(folder) as (_, args):
        Trainer(model, args, train_dataset=Sentences()).train()
        return after, alone, source.ledger.steps  # type: ignore[union-attr]


def trials(rank: int, folder: str) -> list[int]:
    """With model_init every train() has a new model and optimizer; steps of each."""
    found = []
    with run_of(folder) as (_, args):
        callback = CompressionCallback(RANK_2)
        trainer = Trainer(
            args=args,
            train_dataset=Sentences(),
            callbacks=[callback],
            model_init=lambda: new_model("ddp", Path(folder)),
        )
        for _ in range(2):
            trainer.train()
            found.append(callback.compressing.reducer.step)  # type: ignore[union-attr]
    return found


def two_trains(rank: int, folder: str) -> tuple[int, int]:
    with run_of(folder) as (model, args):
        callback = CompressionCallback(RANK_2)
        trainer = Trainer(model, args, train_dataset=Sentences(), callbacks=[callback])
        trainer.train()
        steps = callback.compressing.reducer.step  # type: ignore[union-attr]
        trainer.train()
        return steps, callback.compressing.reducer.step  # type: ignore[union-attr]


class Unplugged(TrainerCallback):
    """Breaks the training off."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def trainers_one_after_another(rank: int, folder: str) -> list[int]:
    """Trainers on one model: one that ends, one that is broken off, a third, and the
    first again; steps that each had made in the end.
    """
    with run_of(folder) as (model, args):
        trainers, callbacks = [], []
        for broken in (False, True, False):
            callbacks.append(CompressionCallback(RANK_2))
            trainers.append(
                Trainer(
                    model,
                    args,
                    train_dataset=Sentences(),
                    callbacks=[callbacks[-1], *([Unplugged()] if broken else [])],
                )
            )
            with contextlib.suppress(KeyboardInterrupt):
                trainers[-1].train()
        trainers[0].train()
        return [one.compressing.reducer.step for one in callbacks]  # type: ignore[union-attr]


def deepspeed_settings_of_another_run(rank: int, folder: str) -> list[int]:
    """They are alive in the process, as in a notebook; steps of a Trainer without
    DeepSpeed that makes the optimizer, and of one that is given it.
    """
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    other = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 0}})
    steps = []
    for given in (False, True):
        with run_of(folder) as (model, args):
            optimizer = compressed(model) if given else None
            callback = CompressionCallback(optimizer or RANK_2)
            Trainer(
                model,
                args,
                train_dataset=Sentences(),
                optimizers=(optimizer, None),
                callbacks=[callback],
            ).train()
            steps.append(callback.compressing.reducer.step)  # type: ignore[union-attr]
    assert other.config
    return steps
