"""Training loops with Accelerate, without Trainer; cases for the pool of
test_accelerate.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.integrations.accelerate import get, prepare
from tests.support.deepspeed_worker import message
from tests.support.trainers import FULL, RANK_2, environment, full

CLIP = 0.05


def model_and_data() -> tuple[nn.Module, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(72, 24, generator=generator)
    y = torch.tanh(x @ torch.randn(24, 16, generator=generator))
    return model, DataLoader(TensorDataset(x, y), batch_size=4)


def loop(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    loader: Any,
    epochs: int = 2,
) -> dict[str, Any]:
    """The loop of Accelerate's own documentation. 18 batches over two ranks, two to a
    step: the last has one alone.
    """
    losses, norms = [], []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    inner = get(optimizer)
    return {
        "losses": losses,
        "norms": norms,
        "lr": optimizer.param_groups[0]["lr"],
        "parameters": [full(p) for p in model.parameters()],
        "steps": inner.reducer.step if inner is not None else None,
        "wrapped": type(model).__name__,
    }


def train(
    rank: int,
    engine: str,
    section: dict[str, Any] | None,
    form: str = "compression",
    scaler: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """One run; form: "compression" or "optimizer"."""
    with environment(engine):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        accelerator.scaler = scaler
        model, loader = model_and_data()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.999)
        given: dict[str, Any] = {}
        if section is not None and form == "optimizer":
            optimizer = CompressedOptimizer.from_config(optimizer, section)
        elif section is not None:
            given = {"compression": section}
        prepared = (model, optimizer, scheduler, loader)
        if section is None:
            model, optimizer, scheduler, loader = accelerator.prepare(*prepared)
        else:
            model, optimizer, scheduler, loader = prepare(accelerator, *prepared, **given)
        return loop(accelerator, model, optimizer, scheduler, loader, **more)


def resumed(rank: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An uninterrupted second epoch, and one after load_state into everything new."""
    ways = []
    for first in (True, False):
        with environment("ddp"):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, loader = model_and_data()
            base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.StepLR(base, 1, 0.95)
            model, optimizer, scheduler, loader = prepare(
                accelerator,
                model,
                base,
                scheduler,
                loader,
                compression=RANK_2 | {"restart_every": 3},
            )
            if first:
                loop(accelerator, model, optimizer, scheduler, loader, epochs=1)
                accelerator.save_state(folder)
            else:
                accelerator.load_state(folder)
            ways.append(loop(accelerator, model, optimizer, scheduler, loader, epochs=1))
    return ways[0], ways[1]


def in_two_accelerators(rank: int, second: bool) -> dict[str, Any]:
    """Two epochs of one optimizer, the second one in an accelerator of its own; then a
    step that is not finite.
    """
    with environment("plain"):
        model, loader = model_and_data()
        optimizer: Any = CompressedOptimizer.from_config(
            torch.optim.SGD(model.parameters(), lr=0.3), RANK_2
        )
        ways: list[dict[str, Any]] = []
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared = prepare(accelerator, model, optimizer, loader)
        for epoch in range(2):
            if epoch and second:
                accelerator.free_memory()
                accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
                prepared = prepare(accelerator, model, optimizer, loader)
            scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.95))
            ways.append(loop(accelerator, *prepared[:2], scheduler, prepared[2], epochs=1))
        overflow = torch.full_like(model[0].weight, float("inf"))  # type: ignore[arg-type, index]
        model[0].weight.grad = None  # type: ignore[index]
        accelerator.gradient_state._set_sync_gradients(True)
        accelerator.backward((model[0].weight * overflow).sum())  # type: ignore[index]
        prepared[1].step()
        return {**ways[1], "skipped": accelerator.optimizer_step_was_skipped}


def overflow_on_one_rank(rank: int, scaled: bool) -> dict[str, Any]:
    """Rank 1 has an inf in the gradient of the second step."""
    with environment("ddp"):
        accelerator = Accelerator(cpu=True)
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            # unscale before clipping
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        model, loader = model_and_data()
        base = torch.optim.SGD(model.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
        given = (model, base, scheduler, loader)
        model, optimizer, scheduler, loader = prepare(
            accelerator, *given, compression=RANK_2 | {"rank": 1}
        )
        found: dict[str, Any] = {"skipped": [], "lr": [], "scale": [], "norms": []}
        for step, (x, y) in zip(range(4), loader, strict=False):
            loss = nn.functional.mse_loss(model(x), y)
            if step == 1 and rank == 1:
                loss = loss * float("inf")
            accelerator.backward(loss)
            found["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            found["skipped"].append(bool(accelerator.optimizer_step_was_skipped))
            found["lr"].append(base.param_groups[0]["lr"])
            found["scale"].append(accelerator.scaler.get_scale() if scaled else None)
        found["parameters"] = [full(p) for p in model.parameters()]
        found["error"] = float(
            sum(error.norm() for error in get(optimizer).error_memory().values())
        )  # type: ignore[union-attr]
        return found


def wrong_use(rank: int) -> dict[str, str]:
    said = {}

    def attempt(name: str, optimizer: str | None, together: bool = True, **given: Any) -> None:
        def call() -> None:
            with environment("ddp"):
                accelerator, (model, loader) = Accelerator(cpu=True), model_and_data()
                base = torch.optim.SGD(model.parameters(), lr=0.1)
                mine = (
                    CompressedOptimizer(base, PowerSGDPlus(rank=2), reduce_at=optimizer or None)
                    if optimizer is not None
                    else base
                )
                prepare(accelerator, *([model] if together else []), mine, loader, **given)

        said[name] = message(call)

    attempt("nothing", None)
    attempt("twice", "", compression=PowerSGDPlus(rank=2))
    attempt("no model", None, together=False, compression=PowerSGDPlus(rank=2))
    attempt("reduces too late", "step")

    def one_process(first: bool) -> None:
        with environment("plain"):
            # of torchrun, and nobody has told Accelerate to use CPUs
            os.environ["WORLD_SIZE"] = "2"
            del os.environ["ACCELERATE_USE_CPU"]
            model, _ = model_and_data()
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            given = [Accelerator(), model] if first else [model]
            prepare(*given, base, compression=PowerSGDPlus(rank=2))  # type: ignore[arg-type]

    said["one process of two"] = message(lambda: one_process(True))
    said["no accelerator"] = message(lambda: one_process(False))

    def scaler_that_nobody_knows() -> None:
        with environment("ddp"):
            accelerator, (model, loader) = Accelerator(cpu=True), model_and_data()
            accelerator.scaler = torch.amp.GradScaler("cpu")
            mine = CompressedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), PowerSGDPlus(rank=2)
            )
            model, optimizer, loader = accelerator.prepare(model, mine, loader)
            mine.attach(model)
            x, y = next(iter(loader))
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()

    said["a scaler that nobody knows"] = message(scaler_that_nobody_knows)
    return said


__all__ = [
    "CLIP",
    "FULL",
    "RANK_2",
    "Path",
    "overflow_on_one_rank",
    "resumed",
    "train",
    "wrong_use",
]
