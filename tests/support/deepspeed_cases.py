"""Cases of test_deepspeed.py that train: each runs on both ranks and returns what its
test looks at.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.deepspeed_toy import (
    CLIP,
    FULL_RANK,
    RANK_2,
    REDUCTIONS,
    RESTARTS,
    WORLD,
    Detour,
    Toy,
    adapter_of,
    batch,
    config,
    engine_of,
    engines,
    gap,
    loss_of,
    nobody,
    parameters,
    seeded_toy,
    sent,
    state,
    train,
)  # fmt: skip


def parity(rank: int, stage: int, gas: int) -> dict[str, Any]:
    """Full rank against the uncompressed engine: AdamW's losses, and momentum SGD's
    parameters; clipping at work.
    """
    found: dict[str, Any] = {}
    for optimizer in ("adamw", "sgd"):
        losses, weights, norms = [], [], []
        for section in (None, FULL_RANK):
            with engines(engine_of(config(stage, gas=gas, section=section), optimizer)) as engine:
                losses.append(train(engine, range(8), rank))
                weights.append(parameters(engine))
                norms.append(engine.get_global_grad_norm())
        found[optimizer] = {"losses": gap(*losses), "parameters": gap(*weights)}
        if norms[0] is not None:
            found["norms"] = [float(norm) for norm in norms]
    return found


def variant(rank: int, **settings: Any) -> dict[str, Any]:
    """Full rank against the uncompressed engine under another setting of DeepSpeed,
    momentum SGD.
    """
    losses, weights = [], []
    for section in (None, FULL_RANK):
        with engines(engine_of(config(**settings, section=section), "sgd")) as engine:
            losses.append(train(engine, range(6), rank))
            weights.append(parameters(engine))
            kind = type(engine.optimizer).__name__
    return {"losses": gap(*losses), "parameters": gap(*weights), "optimizer": kind}


def rank_2(rank: int, stage: int, gas: int) -> list[float]:
    with engines(engine_of(config(stage, gas=gas, section=RESTARTS))) as engine:
        return train(engine, range(20), rank)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "acp": {"compressor": "acp", "restart_every": 4},
    "greedylore": {"compressor": "greedylore", "restart_every": 3},
    "galore": {"compressor": "galore", "restart_every": 3},
    "golore": {"compressor": "golore", "restart_every": 3, "galore_until": 3},
    "atomo": {"compressor": "atomo"},
    "random_projection": {"compressor": "random_projection"},
    "ef21": {"compressor": "powersgd_plus", "restart_every": 3, "error_feedback": {"form": "ef21"}},
    "rounds": {"compressor": "powersgd", "error_feedback": {"rounds": 2}},
    "row_sparse": {
        "compressor": "powersgd",
        "rules": [{"match": "first.weight", "treatment": "row_sparse"}],
    },
    "warm-up": {"compressor": "powersgd_plus", "restart_every": 3, "warmup_steps": 4},
}
"""Sections by what they show; of rank 2, and with every matrix compressed."""


def algorithms(rank: int, stage: int) -> dict[str, list[float]]:
    """Eight steps of each, one engine after the other."""
    losses = {}
    for name, section in ALGORITHMS.items():
        with engines(engine_of(config(stage, section={**RANK_2, **section}))) as engine:
            losses[name] = train(engine, range(8), rank)
    return losses


def simulated(gas: int, section: dict[str, Any] = RESTARTS, steps: int = 20) -> list[list[float]]:
    """The same training without DeepSpeed and without processes: losses of every
    worker's micro-batches.
    """
    from lowrank_comm.config import Section
    from lowrank_comm.simulation import Simulation

    model = seeded_toy()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    parsed = Section.parse(section)
    shapes = {n: p.detach() for n, p in named.items()}
    simulation = Simulation(shapes, parsed.make_compressor(), WORLD, **parsed.reducer_options())
    losses: list[list[float]] = [[] for _ in range(WORLD)]
    for step in range(steps):
        gradients: list[dict[str, Tensor | None]] = []
        for worker in range(WORLD):
            model.zero_grad()
            for micro in range(gas):
                x, y = batch(worker, gas * step + micro)
                loss = loss_of(model(x), y)
                (loss / gas).backward()
                losses[worker].append(loss.item())
            gradients.append({n: p.grad for n, p in named.items()})
            gradients[-1] = {n: None if g is None else g.clone() for n, g in gradients[-1].items()}
        for name, mean in simulation.reduce(gradients).items():
            # DeepSpeed gives the optimizer zeros where nobody had a gradient.
            named[name].grad = torch.zeros_like(named[name]) if mean is None else mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return losses


def identical(rank: int, stage: int, dtype: str) -> dict[str, Tensor]:
    with engines(engine_of(config(stage, dtype, section=RESTARTS))) as engine:
        train(engine, range(50), rank)
        return parameters(engine)


def veto(
    rank: int,
    stage: int,
    dtype: str,
    section: dict[str, Any] = RESTARTS,
    nan_on: int = 0,
    **top: Any,
) -> dict[str, Any]:
    """NaN in one rank's data at step 3: nothing changes at that step, and training goes
    on as if it had never been.
    """
    made = config(stage, dtype, section=section, **top)

    def falling(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    with engines(engine_of(made, lr_scheduler=falling)) as engine:
        adapter = adapter_of(engine)
        train(engine, range(3), rank)
        before = (parameters(engine), state(adapter))
        train(engine, range(3, 4), rank, nan_at=3, nan_on=nan_on)
        after = (parameters(engine), state(adapter))
        report, skipped = adapter.last_report, engine.skipped_steps
        later = train(engine, range(4, 6), rank)
        final, scheduled = parameters(engine), engine.lr_scheduler.last_epoch
    with engines(engine_of(made, lr_scheduler=falling)) as engine:
        train(engine, range(3), rank)
        undisturbed = train(engine, range(4, 6), rank)
        expected = parameters(engine)
    return {
        "changed": gap(before, after),
        "applied": report.applied,
        "skipped": skipped,
        "scheduled": scheduled,
        "later": gap(later, undisturbed),
        "final": gap(final, expected),
        "moved": gap(final, after[0]),
    }


def late_overflow(rank: int, stage: int, section: dict[str, Any] = RANK_2) -> dict[str, Any]:
    """Every local gradient is finite, but what is decompressed is too large for fp16:
    DeepSpeed finds it in its step.
    """
    with engines(engine_of(config(stage, "fp16", section=section))) as engine:
        adapter = adapter_of(engine)
        train(engine, range(2), rank)
        kept = state(adapter)["errors"]
        for error in adapter.error_memory().values():
            error.fill_(3e4)
        scale = engine.optimizer.loss_scale
        before = (parameters(engine), state(adapter))
        train(engine, range(2, 3), rank)
        after, report = (parameters(engine), state(adapter)), adapter.last_report
        for name, error in adapter.error_memory().items():
            error.copy_(kept[name])
        smaller = engine.optimizer.loss_scale < scale
        train(engine, range(3, 5), rank)
        return {
            "changed": gap(before, after),
            "applied": report.applied,
            "skipped": engine.skipped_steps,
            "scale fell": smaller,
            "vetoed": adapter.ledger.vetoed,
            "steps": adapter.reducer.step,
        }


def high_scale(rank: int, stage: int) -> dict[str, Any]:
    """An initial loss scale under which local gradients overflow: vetoed until the
    scale has come down, then trained.
    """
    settings = config(stage, "fp16", section=RANK_2)
    settings["fp16"] |= {"initial_scale_power": 24, "loss_scale_window": 1000}
    with engines(engine_of(settings)) as engine:
        losses = train(engine, range(20), rank)
        adapter = adapter_of(engine)
        errors = max(float(e.abs().max()) for e in adapter.error_memory().values())
        counted = (adapter.reducer.step, engine.skipped_steps, adapter.ledger.vetoed)
        return {"first": losses[0], "last": losses[-1], "largest error": errors, "counted": counted}


def not_at_restarts(rank: int, step: int) -> bool:
    return step % RESTARTS["restart_every"] != 0


def resume(rank: int, folder: str, stage: int, dtype: str, gas: int, **top: Any) -> dict[str, Any]:
    """Saved at step 4 of 8 and loaded by a fresh engine, against the run that went on,
    and one that never saved. One matrix is not used when its restarts are due, so that
    it owes one when the run is saved.
    """
    made = config(stage, dtype, gas, section=RESTARTS, **top)
    with engines(engine_of(made)) as engine:
        train(engine, range(4), rank, detour=not_at_restarts)
        engine.save_checkpoint(folder, tag="half")
        saved = state(adapter_of(engine))
        went_on = train(engine, range(4, 8), rank, detour=not_at_restarts)
        final = parameters(engine)
    with engines(engine_of(made)) as engine:
        engine.load_checkpoint(folder)
        adapter = adapter_of(engine)
        step = adapter.reducer.step
        owed = [
            slot.name
            for slot in adapter.reducer.slots
            if adapter.reducer.state.restarts.deferred(slot.name)
        ]
        resumed = train(engine, range(4, 8), rank, detour=not_at_restarts)
        resumed_final = parameters(engine)
    with engines(engine_of(made)) as engine:
        never_saved = train(engine, range(8), rank, detour=not_at_restarts)[4 * gas :]
    with engines(engine_of(made)) as engine:
        engine.load_checkpoint(folder, load_module_only=True)
        warm = adapter_of(engine).reducer.step
    return {
        "resumed": gap(went_on, resumed),
        "parameters": gap(final, resumed_final),
        "never saved": gap(went_on, never_saved),
        "saved": saved,
        "step": step,
        "owed": owed,
        "module only": warm,
        "files": sorted(path.name for path in (Path(folder) / "half").glob("lowrank_comm*")),
    }


def traffic(rank: int, stage: int, gas: int) -> dict[str, Any]:
    """What backward and step of an optimizer step hand to torch.distributed, and what
    the ledger says of it.
    """
    with engines(engine_of(config(stage, gas=gas, section=RESTARTS))) as engine:
        adapter, steps = adapter_of(engine), []
        for step in range(5):
            known = Counter(adapter.ledger.bytes)
            collectives = adapter.ledger.collectives
            sent.clear()
            by_micro = []
            for micro in range(gas):
                x, y = batch(rank, gas * step + micro)
                loss = loss_of(engine(x), y)
                start = len(sent)
                engine.backward(loss)
                by_micro.append(sent[start:])
                if micro < gas - 1:
                    engine.step()
            start = len(sent)
            engine.step()
            booked = Counter(adapter.ledger.bytes)
            booked.subtract(known)
            steps.append({
                "early": [one for micro in by_micro[:-1] for one in micro if one[0] in REDUCTIONS],
                "backward": by_micro[-1],
                "step": [one for one in sent[start:] if one[0] in REDUCTIONS],
                "ledger": dict(booked),
                "collectives": adapter.ledger.collectives - collectives,
                "report": dict(adapter.last_report.bytes),
            })  # fmt: skip
        return {
            "steps": steps,
            "numel": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        }


USERS: dict[str, Detour] = {
    "nobody": nobody,
    "rank 1": lambda rank, step: rank == 1,
    "everybody": lambda rank, step: True,
    "everybody at first": lambda rank, step: step < 2,
}


def detours(rank: int, stage: int, who: str) -> dict[str, Any]:
    """A matrix that not all have a gradient for, against DeepSpeed's own stage 0, where
    a missing gradient is zero.
    """
    weights = []
    for section, at in ((None, 0), (FULL_RANK, stage)):
        with engines(engine_of(config(at, section=section), "sgd")) as engine:
            train(engine, range(5), rank, detour=USERS[who])
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}


def dropped(rank: int, stage: int) -> dict[str, Any]:
    """Rank 0 has no gradient for a matrix that rank 1 has one for. (ZeRO-3 does not let
    ranks run different modules.)
    """
    weights = []
    for section, at in ((None, 0), (FULL_RANK, stage)):
        with engines(engine_of(config(at, gas=2, section=section), "sgd")) as engine:
            for step in range(4):
                for micro in range(2):
                    x, y = batch(rank, 2 * step + micro)
                    engine.backward(loss_of(engine(x, micro == 0), y))
                    if micro == 0 and rank == 0:
                        engine.module.sometimes.weight.grad = None
                    engine.step()
            weights.append(parameters(engine))
    return {
        "parameters": gap(*weights),
        "moved": gap(weights[0]["sometimes.weight"], seeded_toy().sometimes.weight),
    }


def frozen_and_tied(rank: int, stage: int) -> dict[str, Any]:
    """A frozen matrix, and one weight under two names."""
    weights = []
    for section in (None, FULL_RANK):
        model = seeded_toy()
        model.second.weight.requires_grad_(False)
        model.again = nn.Linear(20, 20, bias=False)
        model.again.weight = model.sometimes.weight
        with engines(engine_of(config(stage, section=section), "sgd", model)) as engine:
            train(engine, range(5), rank, detour=USERS["everybody"])
            weights.append(parameters(engine))
            if section is not None:
                names = [row.name for row in adapter_of(engine).plan.rows]
    return {"parameters": gap(*weights), "names": names}


def direct_backward(rank: int, stage: int) -> dict[str, Any]:
    """`loss.backward()` instead of `engine.backward(loss)`."""
    with engines(engine_of(config(stage, gas=2, section=RANK_2))) as engine:
        try:
            losses = train(engine, range(4), rank, direct=True)
        except RuntimeError as error:
            return {"refused": str(error)}
    with engines(engine_of(config(stage, gas=2, section=RANK_2))) as engine:
        return {"losses": gap(losses, train(engine, range(4), rank))}


def owned_boundary(rank: int, stage: int) -> dict[str, Any]:
    """The caller owns the boundary: `managed_gradient_accumulation` false, three
    backwards and one step.
    """
    weights = []
    for section in (None, FULL_RANK):
        settings = config(stage, gas=3, section=section, managed_gradient_accumulation=False)
        with engines(engine_of(settings, "sgd")) as engine:
            for step in range(4):
                for micro in range(3):
                    x, y = batch(rank, 3 * step + micro)
                    engine.backward(loss_of(engine(x), y))
                engine.step()
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}


def own_coalescing(rank: int, stage: int) -> dict[str, Any]:
    """The user's own `with engine.coalesce_grad_reduction()`: three backwards, one pass
    at its end.
    """
    weights = []
    for section in (None, FULL_RANK):
        with engines(engine_of(config(stage, section=section), "sgd")) as engine:
            for step in range(4):
                with engine.coalesce_grad_reduction():
                    for micro in range(3):
                        x, y = batch(rank, 3 * step + micro)
                        engine.backward(loss_of(engine(x), y))
                engine.step()
            weights.append(parameters(engine))
            passes = adapter_of(engine).reducer.step if section else 0
    return {"parameters": gap(*weights), "passes": passes}


def float_accumulation(rank: int, who: str) -> dict[str, Any]:
    """bfloat16 with fp32 accumulation over 4 micro-steps: each stage keeps the sums
    elsewhere, and all must agree.
    """
    found = {}
    for stage in (1, 2) if who == "rank 1" else (1, 2, 3):
        settings = config(stage, "bf16", 4, RANK_2, data_types={"grad_accum_dtype": "fp32"})
        with engines(engine_of(settings)) as engine:
            losses = train(engine, range(6), rank, detour=USERS[who])
            assert {slot.dtype for slot in adapter_of(engine).reducer.slots} == {torch.float32}
            found[stage] = {
                "losses": losses,
                "parameters": parameters(engine),
                "optimizer": type(engine.optimizer).__name__,
            }
    return found


def no_sync(rank: int, stage: int) -> dict[str, Any]:
    """Two backwards inside `engine.no_sync()`, and a third outside of it before the
    step.
    """
    weights = []
    for section in (None, FULL_RANK):
        with engines(engine_of(config(stage, section=section), "sgd")) as engine:
            for step in range(4):
                for micro in range(3):
                    x, y = batch(rank, 3 * step + micro)
                    with engine.no_sync() if micro < 2 else nullcontext():
                        engine.backward(loss_of(engine(x), y))
                engine.step()
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}


def recomputed(rank: int, stage: int) -> dict[str, Any]:
    """Activation checkpointing of the kind that calls backward within backward."""
    weights = []
    for section in (None, FULL_RANK):
        with engines(
            engine_of(config(stage, gas=2, section=section), "sgd", seeded_toy(recompute=True))
        ) as engine:
            train(engine, range(5), rank)
            weights.append(parameters(engine))
    return {
        "parameters": gap(*weights),
        "moved": gap(weights[0]["second.weight"], seeded_toy().second.weight.detach()),
    }


def partitioned_from_birth(rank: int) -> dict[str, Any]:
    """Stage 3 with a model built under `zero.Init`, and parameters that are not kept
    whole between uses.
    """
    import deepspeed

    weights = []
    for section in (None, FULL_RANK):
        settings = config(3, gas=2, section=section, zero={"stage3_param_persistence_threshold": 0})
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = Toy()
        with engines(engine_of(settings, "sgd", model)) as engine:
            train(engine, range(5), rank)
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}
