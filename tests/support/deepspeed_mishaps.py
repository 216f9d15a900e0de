"""Cases of test_deepspeed.py in which something goes otherwise than planned: dropped
gradients, engines that share things, exceptions, checkpoints of other runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowrank_comm.checkpointing import file as checkpoint
from tests.support.bit_flips import flip
from tests.support.deepspeed_toy import (
    FULL_RANK,
    RANK_2,
    RESTARTS,
    adapter_of,
    batch,
    config,
    engine_of,
    engines,
    gap,
    loss_of,
    parameters,
    seeded_toy,
    state,
    train,
)  # fmt: skip

OFFLOAD: dict[str, Any] = {
    "zero": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


@contextlib.contextmanager
def warnings_of_the_library() -> Any:
    """The library's log, although the worker has switched logging off."""
    stream, logger = io.StringIO(), logging.getLogger("lowrank_comm")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        yield stream
    finally:
        logging.disable(logging.WARNING)
        logger.removeHandler(handler)


def nan_in(engine: Any) -> list[str]:
    return [name for name, p in parameters(engine).items() if torch.isnan(p).any()]


def offloaded_veto(rank: int, stage: int, dtype: str, gas: int) -> dict[str, Any]:
    """A skipped step with the optimizer on the CPU, where DeepSpeed keeps gradients
    from step to step: a matrix that nobody uses, and one that is used in the skipped
    step and not in the next.
    """

    def only_at_first(rank: int, step: int) -> bool:
        return step < 4

    found: dict[str, Any] = {}
    for name, detour in (("unused", lambda rank, step: False), ("used", only_at_first)):
        with engines(engine_of(config(stage, dtype, gas, RESTARTS, **OFFLOAD))) as engine:
            train(engine, range(3), rank, detour=detour)
            train(engine, range(3, 4), rank, nan_at=3, detour=detour)
            train(engine, range(4, 6), rank, detour=detour)
            found[name] = (engine.skipped_steps, nan_in(engine))
    return found


def unused_later(rank: int, stage: int) -> dict[str, Any]:
    """With the optimizer on the CPU, a matrix without a gradient gets none, as at stage
    0: not its last one again.
    """
    weights = []
    for at, section, more in ((0, None, {}), (stage, FULL_RANK, OFFLOAD)):
        with engines(
            engine_of(
                config(
                    at,
                    section=section,
                    **{k: dict(v) if k == "zero" else v for k, v in more.items()},
                ),
                "sgd",
            )
        ) as engine:
            train(engine, range(5), rank, detour=lambda rank, step: step < 2)
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}


def dropped_pass(
    rank: int, stage: int, whose: str, section: dict[str, Any] = RESTARTS
) -> dict[str, Any]:
    """Backward, then zero_grad instead of a step: as if the batch had never been."""
    with engines(engine_of(config(stage, section=section), "sgd")) as engine:
        train(engine, range(2), rank)
        before = state(adapter_of(engine))
        x, y = batch(rank, 77)
        engine.backward(loss_of(engine(x), y))
        (engine if whose == "engine" else engine.optimizer).zero_grad()
        changed = gap(before, state(adapter_of(engine)))
        train(engine, range(2, 5), rank)
        weights = parameters(engine)
    with engines(engine_of(config(stage, section=section), "sgd")) as engine:
        train(engine, range(5), rank)
        return {"changed": changed, "parameters": gap(weights, parameters(engine))}


def frozen_midway(rank: int, stage: int) -> dict[str, Any]:
    """A layer that is frozen after three steps: how far it moves in three more, without
    the section and with it, and whether the error memory of it does.
    """
    moved, kept = [], 0.0
    for section in (None, RESTARTS):
        with engines(engine_of(config(stage, section=section))) as engine:
            train(engine, range(3), rank)
            engine.module.first.requires_grad_(False)
            before = parameters(engine)
            memory = state(adapter_of(engine))["errors"] if section else {}
            train(engine, range(3, 6), rank)
            after = parameters(engine)
            moved.append(
                {part: gap(before[part], after[part]) for part in ("first.weight", "last.weight")}
            )
            if section:
                now = state(adapter_of(engine))["errors"]
                kept = gap(memory["first.weight"], now["first.weight"])
    return {"without": moved[0], "with": moved[1], "error memory": kept}


def unfrozen_later(rank: int, shard_size: int) -> str:
    """What is told where a matrix that was frozen at first has a gradient on rank 1."""
    model = seeded_toy()
    model.sometimes.requires_grad_(False)
    settings = config(0, section=RANK_2 | {"topology": {"shard_size": shard_size}})
    with engines(engine_of(settings, "sgd", model)) as engine:
        train(engine, range(2), rank)
        model.sometimes.requires_grad_(True)
        try:
            train(engine, range(2, 3), rank, detour=lambda rank, step: rank == 1)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def stuck(rank: int, stage: int) -> dict[str, Any]:
    """A run whose gradient is never finite on rank 1: what is told of each step, and
    how it ends.
    """
    settings = config(stage, section=RANK_2 | {"max_vetoes": 3})
    with engines(engine_of(settings, "sgd")) as engine, warnings_of_the_library() as log:
        # one by the way, which counts no further
        train(engine, range(4), rank, nan_at=2, nan_on=1)
        one = log.getvalue()
        try:
            for step in range(4, 12):
                train(engine, range(step, step + 1), rank, nan_at=step, nan_on=1)
        except RuntimeError as error:
            return {
                "one": one.splitlines(),
                "said": log.getvalue().splitlines()[1:],
                "ended": f"{type(error).__name__}: {error}",
                "at": step,
            }
    return {}


def flipped(rank: int, stage: int, culprit: int, section: dict[str, Any]) -> dict[str, Any]:
    """A bit that flips on one rank before the fourth step, and a comparison in every
    second: of a weight, or at stage 3, where no other rank has it, of a basis.
    """
    galore = {"compressor": "galore", "rank": 2, "min_compression_rate": 0, "check_every": 2}
    with (
        engines(engine_of(config(stage, section=galore | section), "sgd")) as engine,
        warnings_of_the_library() as log,
    ):
        train(engine, range(3), rank)
        told = ""
        if rank == culprit:
            tensor = engine.module.first.weight
            if stage == 3:
                states = [batch.state for batch in adapter_of(engine).reducer.state.batches]
                tensor = next(t for s in states for t in s.values() if t.numel())
            flip(tensor.detach(), random.Random(stage))
        before = {} if stage == 3 else parameters(engine)
        try:
            train(engine, range(3, 6), rank)
        except RuntimeError as error:
            told = f"{type(error).__name__}: {error}"
        after = {} if stage == 3 else parameters(engine)
        return {
            "told": told,
            "log": log.getvalue(),
            "step": adapter_of(engine).reducer.step,
            "moved": any(not torch.equal(after[name], p) for name, p in before.items()),
            "parameters": after,
        }


def dropped_micro_steps(rank: int, stage: int) -> dict[str, Any]:
    """zero_grad between micro-steps: what is there is dropped, and that is said."""
    with (
        engines(engine_of(config(stage, gas=2, section=RANK_2), "sgd")) as engine,
        warnings_of_the_library() as log,
    ):
        train(engine, range(1), rank)
        said_before = log.getvalue()
        x, y = batch(rank, 2)
        engine.backward(loss_of(engine(x), y))
        engine.step()
        engine.zero_grad()
        said = log.getvalue()
        x, y = batch(rank, 3)
        engine.backward(loss_of(engine(x), y))
        engine.step()
    return {"before": said_before, "said": said}


def zero_grad_after_own_boundaries(rank: int, stage: int) -> str:
    """The caller owns the boundary, steps, and clears the gradients as with any
    optimizer: nothing to be told.
    """
    settings = config(stage, gas=2, section=RANK_2, managed_gradient_accumulation=False)
    with engines(engine_of(settings, "sgd")) as engine, warnings_of_the_library() as log:
        for step in range(2):
            for micro in range(2):
                x, y = batch(rank, 2 * step + micro)
                engine.backward(loss_of(engine(x), y))
            engine.step()
            engine.zero_grad()
        assert adapter_of(engine).reducer.step == 2
        return log.getvalue()


def reused_optimizer(rank: int) -> dict[str, Any]:
    """One torch optimizer in two fp32 engines of stage 0, one after the other; NaN in
    the second.
    """
    import deepspeed

    model = seeded_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        settings = config(0, section=RESTARTS)
        made = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        with engines(made) as engine:
            train(engine, range(step, step + 1), rank)
            train(engine, range(3, 4), rank, nan_at=3)
            skipped = engine.skipped_steps, engine.optimizer.overflow, engine.was_step_applied()
            train(engine, range(5, 6), rank)
            after = engine.optimizer.overflow
    return {
        "skipped": skipped,
        "after": after,
        "nan": [n for n, p in model.named_parameters() if torch.isnan(p).any()],
    }


def coalescing_and_plain(rank: int, stage: int) -> dict[str, Any]:
    """A step inside the user's own coalesce_grad_reduction(), then ordinary ones."""
    weights = []
    for section in (None, FULL_RANK):
        with engines(engine_of(config(stage, section=section), "sgd")) as engine:
            for step in range(2):
                with engine.coalesce_grad_reduction():
                    x, y = batch(rank, step)
                    engine.backward(loss_of(engine(x), y))
                engine.step()
            train(engine, range(2, 4), rank)
            weights.append(parameters(engine))
    return {"parameters": gap(*weights)}


class Raises(torch.optim.lr_scheduler.LambdaLR):
    """A scheduler that raises at every second step."""

    def __init__(self, optimizer: Any) -> None:
        self.calls = -1
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls % 2 == 1:
            raise ArithmeticError("a bad schedule")
        super().step(*args, **kwargs)


def raising_scheduler(rank: int, stage: int) -> dict[str, Any]:
    """The parameters have had their step when it raises, so the error memory must have
    had it too.
    """
    weights, steps = [], 0
    for scheduler in (None, Raises):
        with engines(
            engine_of(config(stage, section=RESTARTS), "sgd", lr_scheduler=scheduler)
        ) as engine:
            for step in range(6):
                x, y = batch(rank, step)
                engine.backward(loss_of(engine(x), y))
                with contextlib.suppress(ArithmeticError):
                    engine.step()
            weights.append(parameters(engine))
            steps = adapter_of(engine).reducer.step
    return {"parameters": gap(*weights), "steps": steps}


class OwnGroup:
    """A model-parallel unit that puts this rank into a data-parallel group of
    its own.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_group"):
            return lambda: self.group
        if name.endswith("_world_size"):
            return lambda: 1
        if name.endswith("_rank"):
            return lambda: 0
        raise AttributeError(name)


def engines_of_their_own(rank: int) -> dict[str, Any]:
    """Ranks with engines in groups of their own, as in RLHF: other stages, other
    sections, or no engine at all.
    """
    from deepspeed.utils import groups as groups_of_deepspeed

    from lowrank_comm.integrations.deepspeed import get

    groups = [dist.new_group([one]) for one in range(dist.get_world_size())]
    stage, section = ((0, None), (2, RANK_2))[rank]
    with engines(
        engine_of(config(stage, section=section), "sgd", mpu=OwnGroup(groups[rank]))
    ) as engine:
        losses = train(engine, range(2), rank)
        compressed = get(engine) is not None
    if rank == 0:
        with engines(engine_of(config(0), "sgd", mpu=OwnGroup(groups[0]))) as engine:
            train(engine, range(1), rank)
    # DeepSpeed keeps the last one for whoever comes after
    groups_of_deepspeed.mpu = None
    everyone: list[Any] = [None] * dist.get_world_size()
    # nothing of one engine is left for others to receive
    dist.all_gather_object(everyone, (len(losses), compressed))
    return {"found": everyone}


def other_runs_checkpoints(rank: int, folder: str, stage: int) -> dict[str, Any]:
    """Compressed and uncompressed runs that save into one folder and load each other's
    checkpoints.
    """
    found: dict[str, Any] = {}
    compressed, plain = config(stage, section=RESTARTS), config(stage)
    with engines(engine_of(compressed)) as engine:
        train(engine, range(4), rank)
        engine.save_checkpoint(folder, tag="shared", client_state={"mine": 7})
        engine.save_checkpoint(folder, tag="half_universal")
        saved = state(adapter_of(engine))
        engine.save_checkpoint(folder, tag="best")
        train(engine, range(4, 6), rank)
        # a second save under this tag that dies when our file is there, and DeepSpeed's
        # own is not
        checkpoint.save(adapter_of(engine).reducer, Path(folder) / "best")
    with engines(engine_of(plain)) as engine, warnings_of_the_library() as log:
        _, client_state = engine.load_checkpoint(folder, tag="shared")
        found["loaded without the section"] = (
            log.getvalue(),
            client_state["mine"],
            "lowrank_comm" in client_state,
        )
        found["weights only"] = len(log.getvalue())
        engine.load_checkpoint(folder, tag="shared", load_module_only=True)
        found["weights only"] -= len(log.getvalue())
        train(engine, range(2), rank)
        # over the compressed run's, whose file stays
        engine.save_checkpoint(folder, tag="shared")
    dist.barrier()
    with engines(engine_of(compressed)) as engine, warnings_of_the_library() as log:
        engine.load_checkpoint(folder, tag="shared")
        errors = adapter_of(engine).error_memory()
        found["left by another run"] = (
            log.getvalue(),
            adapter_of(engine).reducer.step,
            max(float(e.abs().max()) for e in errors.values()),
        )
    with engines(engine_of(compressed)) as engine:
        engine.load_checkpoint(folder, tag="best")
        found["after a second save that died"] = gap(saved, state(adapter_of(engine)))
    # what ds_to_universal does to our file: it stays beside the new folder
    if rank == 0:
        (Path(folder) / "half").mkdir()
        (ours,) = (Path(folder) / "half_universal").glob("lowrank_comm-*.safetensors")
        shutil.move(ours, Path(folder) / "half")
    dist.barrier()
    with engines(engine_of(compressed)) as engine:
        engine.load_checkpoint(folder, tag="half_universal")
        found["beside a universal one"] = gap(saved, state(adapter_of(engine)))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(Path(folder) / "half")
    dist.barrier()
    with engines(engine_of(compressed)) as engine:
        try:
            engine.load_checkpoint(folder, tag="half_universal")
        except RuntimeError as error:
            found["lost"] = str(error)
    return found


class Misnamed(nn.Module):
    """A part that is called as wrappers call what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(12, 5)
        self.weight = nn.Parameter(torch.ones(5, 12))

    def forward(self, x: torch.Tensor, detour: bool = False) -> torch.Tensor:
        return self.module(x) + x @ self.weight.T


def a_part_called_module(rank: int) -> list[str]:
    with engines(engine_of(config(1, section=RANK_2), model=Misnamed())) as engine:
        train(engine, range(1), rank)
        return sorted(adapter_of(engine).error_memory())
