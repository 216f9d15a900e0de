"""Cases of test_deepspeed_levels.py: four ranks in two nodes of two, each case on all
of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support import deepspeed_cases as training
from tests.support import deepspeed_mishaps as mishaps
from tests.support import engines as harness
from tests.support.deepspeed_toy import (
    CLIP,
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
from tests.support.deepspeed_worker import Case, message, run_all, start

WORLD, F = 4, 2
SCOPES = ("shard", "matrix")
STEPS = 10
# by the number of micro-steps
LOW_RANK = {1: RESTARTS | {"seed": 3}, 3: RANK_2 | {"seed": 3}}
SIZES = {
    "no divisor": (3, [None] * 4),
    "node without a launcher": ("node", [None] * 4),
    "node, one rank not told": ("node", ["2", "2", "2", None]),
    "node, no number": ("node", ["two"] * 4),
    "no whole node": ("node", ["3"] * 4),
    "nodes that differ": ("node", ["2", "2", "1", "1"]),
}


def two_levels(
    section: dict[str, Any], scope: str = "shard", size: int | str = F
) -> dict[str, Any]:
    return section | {"topology": {"shard_size": size, "shard_scope": scope}}


@contextmanager
def launched_with(ranks: str | None, by: str = "LOCAL_WORLD_SIZE") -> Iterator[None]:
    """What a launcher tells of the ranks on this node: torchrun by this name, deepspeed
    by LOCAL_SIZE.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        if ranks is not None:
            os.environ[by] = ranks
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(kept)


def parity(
    rank: int, stage: int, gas: int, section: dict[str, Any], dtype: str = "fp32", **top: Any
) -> dict[str, Any]:
    """Full rank against DeepSpeed's own training."""
    losses, weights, norms = [], [], []
    for given in (None, section):
        top_of_run = {
            key: dict(value) if isinstance(value, dict) else value for key, value in top.items()
        }
        with engines(engine_of(config(stage, dtype, gas, given, **top_of_run))) as engine:
            losses.append(train(engine, range(6), rank))
            weights.append(parameters(engine))
            norms.append(engine.get_global_grad_norm())
            hpz = getattr(engine.optimizer, "zero_hpz_partition_size", 1)
    return {
        "losses": gap(*losses),
        "parameters": gap(*weights),
        "norms": [None if norm is None else float(norm) for norm in norms],
        "moved": gap(weights[0]["first.weight"], seeded_toy().first.weight.detach()),
        "hpz": hpz,
    }


def rank_2(rank: int, stage: int, gas: int, scope: str) -> dict[str, Any]:
    """Low rank: losses, parameters, memory, and the bytes of each step."""
    with engines(
        engine_of(config(stage, gas=gas, section=two_levels(LOW_RANK[gas], scope)))
    ) as engine:
        adapter, losses, reports = adapter_of(engine), [], []
        for step in range(STEPS):
            losses += train(engine, range(step, step + 1), rank)
            reports.append(adapter.last_report)
        # A matrix that nobody uses owes a restart from the first step on, where there
        # are restarts, and sends nothing.
        idle = sum(
            row.bytes
            for row in adapter.plan.rows
            if adapter.reducer.state.restarts.deferred(row.name)
        )
        return {
            "losses": losses,
            "parameters": parameters(engine),
            "errors": {name: tuple(e.shape) for name, e in adapter.error_memory().items()},
            "largest": max(
                float(e.abs().max()) for e in adapter.error_memory().values() if e.numel()
            ),
            "reports": [(r.restarts, r.bytes, r.inside_bytes) for r in reports],
            "step bytes": adapter.plan.step_bytes - idle,
            "plan": str(adapter.plan),
        }


def simulated(gas: int, scope: str) -> list[list[float]]:
    """The same in one process: nodes as workers, in shard scope each block of rows a
    matrix of its own.
    """
    from lowrank_comm import PowerSGD, PowerSGDPlus

    model = seeded_toy()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    compressor = {1: PowerSGDPlus(rank=2, restart_every=3), 3: PowerSGD(rank=2)}[gas]
    # with seed 3
    setup = harness.Setup("plain", compressor, nodes=2, scope=scope)
    average = harness._averages(setup, model, WORLD // F, F)
    losses: list[list[float]] = [[] for _ in range(WORLD)]
    for step in range(STEPS):
        gradients: list[dict[str, Tensor | None]] = []
        for rank in range(WORLD):
            model.zero_grad()
            for micro in range(gas):
                x, y = batch(rank, gas * step + micro)
                loss = loss_of(model(x), y)
                (loss / gas).backward()
                losses[rank].append(loss.item())
            gradients.append(
                {n: None if p.grad is None else p.grad.clone() for n, p in named.items()}
            )
        nodes = [harness._mean(gradients[k : k + F]) for k in range(0, WORLD, F)]
        for name, mean in average(nodes).items():
            named[name].grad = torch.zeros_like(named[name]) if mean is None else mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return losses


def some_users(rank: int, stage: int) -> dict[str, Any]:
    """A matrix that one rank of one node uses, against DeepSpeed's own stage 0."""
    weights = []
    for section, at in ((None, 0), (two_levels(FULL_RANK), stage)):
        with engines(engine_of(config(at, section=section), "sgd")) as engine:
            train(engine, range(4), rank, detour=lambda rank, step: rank == 3 and step > 1)
            weights.append(parameters(engine))
    return {
        "parameters": gap(*weights),
        "moved": gap(weights[0]["sometimes.weight"], seeded_toy().sometimes.weight),
    }


def one_element(rank: int, stage: int, scope: str) -> dict[str, Any]:
    """One NaN on rank 3, in a row that rank 0 of each node holds: the others' blocks
    are finite.
    """
    with engines(engine_of(config(stage, section=two_levels(RESTARTS, scope)))) as engine:
        adapter = adapter_of(engine)
        train(engine, range(2), rank)
        before = (parameters(engine), state(adapter))

        def poison(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[0, 0] = torch.nan
            return gradient

        if rank == 3:
            handle = engine.module.second.weight.register_hook(poison)
        train(engine, range(2, 3), rank)
        changed = gap(before, (parameters(engine), state(adapter)))
        if rank == 3:
            handle.remove()
        train(engine, range(3, 4), rank)
        return {
            "changed": changed,
            "skipped": engine.skipped_steps,
            "steps": adapter.reducer.step,
            "vetoed": adapter.ledger.vetoed,
            "nan": [name for name, p in parameters(engine).items() if torch.isnan(p).any()],
        }


def sizes(rank: int) -> dict[str, str]:
    """Sizes that cannot be, and "node" where the launcher tells."""
    found = {}
    for name, (size, told) in SIZES.items():
        with launched_with(told[rank]):
            found[name] = message(
                lambda size=size: engine_of(config(2, section=two_levels(RANK_2, size=size)))
            )
    for name, size, by in (
        ("node", "node", "LOCAL_WORLD_SIZE"),
        ("node, by deepspeed", "node", "LOCAL_SIZE"),
        ("hint", 1, "LOCAL_WORLD_SIZE"),
    ):
        with (
            launched_with("2", by),
            engines(engine_of(config(1, section=two_levels(RANK_2, size=size)))) as engine,
        ):
            train(engine, range(1), rank)
            found[name] = str(adapter_of(engine).plan)
    return found


def other_models(rank: int) -> str:
    """Rank 3 trains fewer parameters than the others: to be told before anything is
    sent that would not fit.
    """
    model = seeded_toy()
    if rank == 3:
        model.second.weight.requires_grad_(False)
    with engines(engine_of(config(0, section=two_levels(RANK_2)), model=model)) as engine:
        return message(lambda: train(engine, range(1), rank))


def mesh(rank: int) -> dict[str, Any]:
    """DeepSpeed's own device mesh, whose data-parallel group is another object than the
    default group.
    """
    from deepspeed.utils import groups as groups_of_deepspeed

    losses = []
    try:
        for section in (None, two_levels(FULL_RANK)):
            with engines(engine_of(config(2, section=section), mesh_param=(WORLD, 1))) as engine:
                losses.append(train(engine, range(4), rank))
        reducer = adapter_of(engine).reducer
        return {
            "losses": gap(*losses),
            "who": (reducer.workers.group.size, reducer.workers.intra_node.size),
        }
    finally:
        groups_of_deepspeed.mesh_device = None


class OwnGroup:
    """A model-parallel unit with a data-parallel group of some ranks."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> Any:
        return self.group

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def part_of_the_world(rank: int) -> dict[str, Any]:
    """An engine of ranks 0, 2 and 3 that are one node, while rank 1 does something
    else; and where that cannot be.
    """
    from deepspeed.utils import groups as groups_of_deepspeed

    group = dist.new_group([0, 2, 3])
    found: dict[str, Any] = {}
    if rank != 1:
        losses = []
        for section in (None, two_levels(FULL_RANK, size=3)):
            with engines(
                engine_of(config(1, section=section), "sgd", mpu=OwnGroup(group))
            ) as engine:
                losses.append(train(engine, range(3), rank))
                if section is not None:
                    shards = adapter_of(engine).reducer.workers.intra_node
                    found = {
                        "node": (shards.rank, shards.size),
                        "workers": adapter_of(engine).reducer.workers.group.size,
                    }
        found["losses"] = gap(*losses)
        found["no divisor"] = message(
            lambda: engine_of(config(1, section=two_levels(FULL_RANK)), "sgd", mpu=OwnGroup(group))
        )
    dist.barrier()
    further = dist.new_group([1, 2, 3])
    # rank 2 is in one group more than rank 3
    extra = [dist.new_group([2])]
    if rank != 0:
        found["uneven"] = message(
            lambda: engine_of(
                config(1, section=two_levels(FULL_RANK, size=3)), "sgd", mpu=OwnGroup(further)
            )
        )
    groups_of_deepspeed.mpu = None
    dist.barrier()
    for one in (group, further, *extra):
        if one is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(one)
    return found


def copies(adapter: Any) -> dict[str, Tensor]:
    return {name: error.detach().clone() for name, error in adapter.error_memory().items()}


def checkpoints(rank: int, folder: str, stage: int, scope: str) -> dict[str, Any]:
    """Two levels -> two levels, bit by bit; two levels -> one -> two, by the mean
    error.
    """
    two, one = config(stage, section=two_levels(RESTARTS, scope)), config(stage, section=RESTARTS)
    found: dict[str, Any] = {}
    with engines(engine_of(two)) as engine:
        train(engine, range(4), rank)
        engine.save_checkpoint(folder, tag="two")
        found["saved"] = copies(adapter_of(engine))
        went_on = train(engine, range(4, 7), rank)
        final = (parameters(engine), state(adapter_of(engine)))
    with engines(engine_of(two)) as engine:
        engine.load_checkpoint(folder, tag="two")
        found["step"] = adapter_of(engine).reducer.step
        found["resumed"] = gap(went_on, train(engine, range(4, 7), rank))
        found["state"] = gap(final, (parameters(engine), state(adapter_of(engine))))
    with engines(engine_of(one)) as engine:
        engine.load_checkpoint(folder, tag="two")
        found["by one level"] = copies(adapter_of(engine))
        train(engine, range(4, 6), rank)
        engine.save_checkpoint(folder, tag="one")
        found["saved by one level"] = copies(adapter_of(engine))
    with engines(engine_of(two)) as engine:
        engine.load_checkpoint(folder, tag="one")
        found["and back"] = copies(adapter_of(engine))
        found["goes on"] = train(engine, range(6, 8), rank)
        found["step back"] = adapter_of(engine).reducer.step
    return found


def ef21_in_other_blocks(rank: int, folder: str) -> dict[int, dict[str, Tensor]]:
    """What EF21 keeps of this rank's blocks: before two ranks of a node save it, and
    where one or four load it.
    """
    section = RESTARTS | {"error_feedback": {"form": "ef21_sgdm"}}
    found = {}
    for size in (F, 1, WORLD):
        with engines(engine_of(config(1, section=two_levels(section, size=size)))) as engine:
            if size == F:
                train(engine, range(4), rank)
            else:
                engine.load_checkpoint(folder)
            bases = adapter_of(engine).reducer.state.bases()
            # which averages
            if size == F:
                engine.save_checkpoint(folder)
            found[size] = {
                f"{name}/{k}": tensor
                for name, kept in bases.items()
                for k, tensor in kept.items()
                if k != "Q"
            }
    return found


def cases(folder: str) -> dict[str, Case]:
    """Every case by name."""
    listed: dict[str, Case] = {}

    def add(name: str, case: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        listed[name] = (case, arguments, options)

    add("sizes", sizes)
    for stage in range(4):
        for gas, scope in ((1, "shard"), (3, "matrix")):
            add(f"parity {stage} {gas}", parity, stage, gas, two_levels(FULL_RANK, scope))
        for scope in SCOPES:
            add(f"one element {stage} {scope}", one_element, stage, scope)
            for gas in (1, 3):
                add(f"rank 2 {stage} {scope} {gas}", rank_2, stage, gas, scope)
        for k, dtype in enumerate(("fp32", "bf16")):
            add(
                f"veto {stage} {dtype}",
                training.veto,
                stage,
                dtype,
                two_levels(RESTARTS, SCOPES[k]),
                nan_on=3,
            )
        # ZeRO-3 gathers a module when it runs: all ranks must run the same
        if stage < 3:
            add(f"some users {stage}", some_users, stage)
        scope = SCOPES[stage % 2]
        add(f"checkpoints {stage}", checkpoints, f"{folder}/levels_{stage}", stage, scope)
    for stage in range(3):
        for how in ("error", "resync"):
            section = two_levels({"on_divergence": how})
            add(f"flipped {stage} {how}", mishaps.flipped, stage, 2, section)
    accumulate = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage in (1, 3):
        add(f"veto {stage} fp16", training.veto, stage, "fp16", two_levels(RESTARTS), nan_on=3)
        add(
            f"veto {stage} bf16 fp32",
            training.veto,
            stage,
            "bf16",
            two_levels(RESTARTS),
            nan_on=1,
            **accumulate,
        )
        add(f"late overflow {stage}", training.late_overflow, stage, two_levels(RANK_2))
    hpz = {"zero_hpz_partition_size": F, "stage3_param_persistence_threshold": 0}
    for dtype in ("fp32", "bf16"):
        add(f"hpz {dtype}", parity, 3, 2, two_levels(FULL_RANK), dtype, zero=hpz)
    add("one node", parity, 2, 1, two_levels(FULL_RANK, size=WORLD))
    for stage in (1, 3):
        add(f"dropped pass {stage}", mishaps.dropped_pass, stage, "engine", two_levels(RESTARTS))
    add("EF21 in other blocks", ef21_in_other_blocks, f"{folder}/ef21")
    add("other models", other_models)
    add("part of the world", part_of_the_world)
    add("mesh", mesh)
    return listed


def run(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    """All cases on this rank, inside the process group that is there."""
    start(rank, WORLD)
    return run_all(rank, folder, cases(folder))
