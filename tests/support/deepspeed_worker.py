"""What the two processes of test_deepspeed.py run: real DeepSpeed engines on a toy
model, one case after the other.

A process group can be given to DeepSpeed only once in a process, so all cases run in
one go, and the results go back by name: `{"value": ...}` or `{"error": traceback}` for
each rank. The tests then look at one case each.
"""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import deepspeed_cases as training
from tests.support import deepspeed_mishaps as mishaps
from tests.support.deepspeed_toy import (
    DTYPES,
    RANK_2,
    RESTARTS,
    WORLD,
    Toy,
    adapter_of,
    batch,
    config,
    count_collectives,
    engine_of,
    engines,
    loss_of,
    seeded_toy,
    state,
    train,
)  # fmt: skip


def message(call: Callable[[], Any]) -> str:
    """What a call raises, or "no error"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def misuse(rank: int, stage: int) -> dict[str, str]:
    """Calls in the wrong order; each must say what is wrong."""
    found = {}
    with engines(engine_of(config(stage, section=RANK_2))) as engine:
        x, y = batch(rank, 0)
        engine.backward(loss_of(engine(x), y))
        found["second backward"] = message(lambda: engine.backward(loss_of(engine(x), y)))
    with engines(engine_of(config(stage, section=RANK_2))) as engine:
        found["step without backward"] = message(engine.step)
        found["reduction of DeepSpeed's own"] = message(engine.buffered_allreduce_fallback)
        if stage in (1, 2):
            hook = engine.optimizer.gradient_reduction_w_predivide
            found["hook"] = message(lambda: hook(torch.zeros(3), torch.float32))
        if stage == 3:
            hook = engine.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads
            found["hook"] = message(lambda: hook([], torch.float32))
    with engines(engine_of(config(stage, section=RANK_2))) as engine:
        x, y = batch(rank, 0)
        engine.backward(loss_of(engine(x), y))
        found["save between backward and step"] = message(lambda: engine.save_checkpoint("nowhere"))
    return found


def refusals(rank: int) -> dict[str, str]:
    """Settings that cannot be; the message of each."""
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    from lowrank_comm import CompressedOptimizer, PowerSGD

    class Sparse(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 3, sparse=True)

    class Experts(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MoE(20, nn.Linear(20, 20), num_experts=2, ep_size=1)

    def pipeline() -> nn.Module:
        return PipelineModule([nn.Linear(12, 12), nn.Linear(12, 5)], num_stages=1)

    def compressed(model: nn.Module) -> Any:
        return CompressedOptimizer(
            torch.optim.AdamW(model.named_parameters()), compressor=PowerSGD(rank=2)
        )

    autocast = {"enabled": True, "dtype": "float16"}
    offload = {"device": "cpu", "super_offload": True}
    asked: dict[str, dict[str, Any]] = {
        "unknown key": {"section": RANK_2 | {"restart_evry": 3}},
        "rank": {"section": RANK_2 | {"rank": 0}},
        "tau": {"section": RESTARTS | {"restart_every": 2.5}},
        "compressor": {"section": RANK_2 | {"compressor": "powersdg"}},
        "shard_size": {"section": RANK_2 | {"topology": {"shard_size": 3}}},
        "no object": {"section": "powersgd"},
        "no JSON": {"section": RANK_2 | {"wire_dtype": torch.bfloat16}},
        "misspelt section": {"section": None, "lowrank_com": RANK_2},
        "zero_quantized_gradients": {"stage": 3, "zero": {"zero_quantized_gradients": True}},
        "zenflow": {"stage": 2, "zero": {"zenflow": {"topk_ratio": 0.1}}},
        "super_offload": {"stage": 3, "zero": {"offload_optimizer": offload}},
        "deepcompile": {"stage": 3, "compile": {"deepcompile": True}},
        "contiguous_gradients": {"stage": 2, "zero": {"contiguous_gradients": False}},
        "ignore_unused_parameters": {"stage": 2, "zero": {"ignore_unused_parameters": False}},
        "check_grad_overflow": {
            "stage": 1,
            "bf16": {"enabled": True, "check_grad_overflow": False},
        },
        "compute_grad_norm": {
            "stage": 2,
            "zero": {"compute_grad_norm": False},
            "gradient_clipping": 0.0,
        },
        "gradient_allreduce_op": {"gradient_allreduce_op": "sum"},
        "torch_autocast": {"stage": 1, "torch_autocast": autocast},
        "hybrid_engine": {"hybrid_engine": {"enabled": True}},
        "autotp": {"stage": 1, "tensor_parallel": {"autotp_size": 2}},
        "sequence": {"sequence_parallel_size": 2},
        "muon": {"stage": 1, "optimizer": {"type": "Muon", "params": {"lr": 0.1}}},
        "expert_parallel": {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        "node_local": {"checkpoint": {"use_node_local_storage": True}},
        "pipeline": {"model": pipeline},
        "mixture of experts": {"model": Experts},
        "sparse": {"model": Sparse},
        "client optimizer": {"client": compressed},
        "client optimizer, no section": {"client": compressed, "section": None},
        "client callable": {"client": lambda model: lambda parameters: compressed(model)},
    }
    import deepspeed

    found = {}
    for name, given in asked.items():
        model = given.pop("model", seeded_toy)()
        client = given.pop("client", lambda m: torch.optim.SGD(m.parameters(), lr=0.1))(model)
        settings = config(given.pop("stage", 0), section=given.pop("section", RANK_2), **given)
        if "optimizer" in settings:
            client = None
        start = functools.partial(
            deepspeed.initialize, model=model, config=settings, dist_init_required=False
        )
        found[name] = message(functools.partial(start, optimizer=client))
        deepspeed.zero.partition_parameters.restore_init_context()
    return found


def mismatch(rank: int) -> dict[str, str]:
    """The two ranks read different files; both must raise."""
    found = {}
    pairs: dict[str, list[dict[str, Any] | None]] = {
        "value": [RANK_2, RANK_2 | {"rank": 3}],
        "absent": [RANK_2, None],
        "typo": [RANK_2, RANK_2 | {"rnk": 3}],
    }
    for name, sections in pairs.items():
        found[name] = message(functools.partial(engine_of, config(0, section=sections[rank])))
    return found


def left_alone(rank: int) -> dict[str, Any]:
    """An engine without the section, and one with it that does not train: ordinary
    engines.
    """
    import deepspeed

    from lowrank_comm.integrations.deepspeed import get

    found = {}
    settings = config(3, section=RANK_2)
    inference = deepspeed.initialize(model=seeded_toy(), config=settings, dist_init_required=False)[
        0
    ]
    for name, made in {"no section": engine_of(config(2)), "no optimizer": inference}.items():
        with engines(made) as engine:
            touched = [
                key
                for key in ("allreduce_gradients", "save_checkpoint", "_take_model_step")
                if key in vars(engine)
            ]
            found[name] = (
                get(engine),
                touched,
                getattr(engine.optimizer, "_coalesce_grad_reduction", False),
            )
    return found


Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def cases(folder: str) -> dict[str, Case]:
    """Every case by name."""
    listed: dict[str, Case] = {}

    def add(name: str, case: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        listed[name] = (case, arguments, options)

    accumulate = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage in range(4):
        for gas in (1, 3):
            add(f"parity {stage} {gas}", training.parity, stage, gas)
            add(f"rank 2 {stage} {gas}", training.rank_2, stage, gas)
        add(f"algorithms {stage}", training.algorithms, stage)
        for dtype in DTYPES:
            add(f"veto {stage} {dtype}", training.veto, stage, dtype)
            if stage > 0 and dtype == "bf16":
                add(f"veto {stage} bf16 fp32", training.veto, stage, dtype, **accumulate)
        add(f"identical {stage} fp32", training.identical, stage, "fp32")
        add(f"identical {stage} bf16", training.identical, stage, "bf16")
        add(f"late overflow {stage}", training.late_overflow, stage)
        # at stage 0 this DeepSpeed never multiplies the loss by its scale
        if stage > 0:
            add(f"high scale {stage}", training.high_scale, stage)
        add(
            f"resume {stage} fp32",
            training.resume,
            f"{folder}/resume_{stage}_fp32",
            stage,
            "fp32",
            2,
        )
        add(f"traffic {stage}", training.traffic, stage, 2)
        add(f"direct {stage}", training.direct_backward, stage)
        add(f"owned boundary {stage}", training.owned_boundary, stage)
        add(f"frozen and tied {stage}", training.frozen_and_tied, stage)
        add(f"misuse {stage}", misuse, stage)
        add(f"recomputed {stage}", training.recomputed, stage)
        add(f"dropped {stage}", training.dropped, stage)
        for who in training.USERS:
            # ZeRO-3 gathers a module when it runs: all ranks must run the same
            if (stage, who) != (3, "rank 1"):
                add(f"detour {stage} {who}", training.detours, stage, who)
        if stage > 0:
            add(f"own coalescing {stage}", training.own_coalescing, stage)
            offload = {"offload_optimizer": {"device": "cpu"}}
            add(
                f"variant offload {stage}",
                training.variant,
                stage=stage,
                zero=offload,
                zero_force_ds_cpu_optimizer=False,
            )
            add(
                f"variant buckets {stage}",
                training.variant,
                stage=stage,
                zero={"reduce_bucket_size": 300},
                gas=2,
            )
            add(
                f"variant overlap {stage}",
                training.variant,
                stage=stage,
                zero={"overlap_comm": stage < 3},
                gas=2,
            )
    add("resume 1 bf16 fp32", training.resume, f"{folder}/resume_bf16", 1, "bf16", 2, **accumulate)
    add("resume 3 fp16", training.resume, f"{folder}/resume_fp16", 3, "fp16", 1)
    add(
        "variant secondary partition",
        training.variant,
        stage=3,
        zero={"zero_hpz_partition_size": 2},
    )
    parameters_on_cpu = {
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    }
    add("variant offload of parameters", training.variant, stage=3, zero=parameters_on_cpu)
    add("variant round robin", training.variant, stage=2, zero={"round_robin_gradients": True})
    add(
        "variant autocast",
        training.variant,
        stage=2,
        torch_autocast={"enabled": True, "dtype": "bfloat16"},
    )
    for who in ("nobody", "rank 1"):
        add(f"float accumulation {who}", training.float_accumulation, who)
    for stage in (0, 1):
        add(f"no_sync {stage}", training.no_sync, stage)
    add("partitioned from birth", training.partitioned_from_birth)
    for stage in range(4):
        for whose in ("engine", "optimizer"):
            add(f"dropped pass {stage} {whose}", mishaps.dropped_pass, stage, whose)
        add(f"frozen midway {stage}", mishaps.frozen_midway, stage)
        add(f"stuck {stage}", mishaps.stuck, stage)
        add(f"flipped {stage}", mishaps.flipped, stage, 1, {"on_divergence": "resync"})
        add(f"dropped micro-steps {stage}", mishaps.dropped_micro_steps, stage)
        add(
            f"zero_grad after own boundaries {stage}", mishaps.zero_grad_after_own_boundaries, stage
        )
        add(f"raising scheduler {stage}", mishaps.raising_scheduler, stage)
        add(
            f"other runs {stage}",
            mishaps.other_runs_checkpoints,
            f"{folder}/other_runs_{stage}",
            stage,
        )
        if stage > 0:
            add(f"coalescing and plain {stage}", mishaps.coalescing_and_plain, stage)
            add(f"unused later {stage}", mishaps.unused_later, stage)
            for dtype, gas in (("fp32", 1), ("fp32", 2), ("bf16", 1), ("fp16", 1)):
                add(
                    f"offloaded veto {stage} {dtype} {gas}",
                    mishaps.offloaded_veto,
                    stage,
                    dtype,
                    gas,
                )
    for shard_size in (1, 2):
        add(f"unfrozen later {shard_size}", mishaps.unfrozen_later, shard_size)
    add("reused optimizer", mishaps.reused_optimizer)
    add("engines of their own", mishaps.engines_of_their_own)
    add("a part called module", mishaps.a_part_called_module)
    add("refusals", refusals)
    add("mismatch", mismatch)
    add("left alone", left_alone)
    return listed


def start(rank: int, world: int) -> None:
    """Hand the process group that is there to DeepSpeed."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
    }
    # DeepSpeed wants to see them; nobody connects
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    count_collectives()
    logging.disable(logging.WARNING)
    import deepspeed

    from lowrank_comm.integrations.deepspeed import skip_shm_extension

    skip_shm_extension()
    # DeepSpeed refuses fp16 on a processor without instructions for it. torch computes
    # it on any, and these tests are not about speed; without this line they would
    # depend on the machine.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)


def run(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    """All cases on this rank, inside the process group that is there."""
    start(rank, WORLD)
    return run_all(rank, folder, cases(folder))


def run_all(rank: int, folder: str, listed: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Case after case; what each returned or raised."""
    results = {}
    for name, (case, arguments, options) in listed.items():
        # for whoever wonders which case a process died in
        (Path(folder) / f"running_{rank}").write_text(name)
        try:
            results[name] = {"value": case(rank, *arguments, **options)}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


def alone(rank: int, folder: str) -> dict[str, Any]:
    """One process resumes what two have saved."""
    start(rank, 1)
    with engines(engine_of(config(0, gas=2, section=RESTARTS))) as engine:
        engine.load_checkpoint(f"{folder}/resume_0_fp32")
        found = state(adapter_of(engine))
        return {
            "loaded": found,
            "losses": train(engine, range(4, 8), rank),
            "steps": adapter_of(engine).reducer.step,
        }
