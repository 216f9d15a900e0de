"""Real Trainers on a small model, one function for every engine: what
test_transformers.py compares.

`train(engine, ...)` runs in each process of a gloo pool, or of the DeepSpeed processes,
and returns plain values. Engines:

    plain, ddp                     as Trainer makes them by itself
    lora, dora                     PEFT adapters under DDP
    fsdp2, hsdp                    the model sharded at load time (transformers'
                                   DistributedConfig), as a CPU can have it
    fsdp2-plugin, hsdp-plugin      accelerate's FSDP plugin, as `fsdp_config` or
                                   `accelerate launch` make it on GPUs; on a CPU
                                   accelerate keeps DDP instead, unless its state is
                                   told otherwise, as is done here
    zero1, zero2, zero3            --deepspeed
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from lowrank_comm import CompressedOptimizer
from lowrank_comm.config import Section
from lowrank_comm.integrations.accelerate import get
from lowrank_comm.integrations.transformers import CompressionCallback

STEPS = 50
FULL_STEPS = 24
"""Of the runs that are compared number by number with the uncompressed ones."""
CLIP = {"lora": 0.04, "dora": 0.02}
"""Norm to which gradients are clipped, where it is not 0.5; adapters' are small."""
FULL = {
    "compressor": "powersgd_plus",
    "rank": 64,
    "restart_every": 10,
    "min_compression_rate": 0,
    # Accelerate would raise on the word in a DeepSpeed configuration
    "restart": "auto",
}
RANK_2 = {"compressor": "powersgd_plus", "rank": 2, "restart_every": 20, "restart": "randomized"}


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Counting in steps of one to three: something a model learns a good part of in
    fifty steps.
    """

    def __len__(self) -> int:
        return 64

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        ids = (k + (1 + k % 3) * torch.arange(16)) % 50
        return {"input_ids": ids, "labels": ids}


def new_model(engine: str, folder: Path) -> PreTrainedModel:
    """The same weights for every engine and rank."""
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, use_cache=False, tie_word_embeddings=False, **sizes)
    )
    if engine in ("lora", "dora"):
        from peft import LoraConfig, get_peft_model

        to = ["q_proj", "v_proj", "up_proj"]
        return get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules=to, use_dora=engine == "dora")
        )
    if engine in ("fsdp2", "hsdp"):
        from transformers.distributed import DistributedConfig

        if dist.get_rank() == 0:
            model.save_pretrained(folder / "initial")
        dist.barrier()
        replicas = {"dp_replicate_size": 2} if engine == "hsdp" else {}
        return LlamaForCausalLM.from_pretrained(
            folder / "initial",
            distributed_config=DistributedConfig(fsdp_size=2, **replicas),
            use_cache=False,
        )
    return model


@contextlib.contextmanager
def environment(engine: str) -> Iterator[dict[str, Any]]:
    """What a launcher sets, and the arguments of an engine; nothing is left of it
    afterwards.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    variables: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    variables = (
        {}
        if engine == "plain"
        else variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    )
    variables["ACCELERATE_USE_CPU"] = str(not engine.startswith("zero")).lower()
    before, plain_init = dict(os.environ), AcceleratorState.__init__
    os.environ.update({key: str(value) for key, value in variables.items()})
    more: dict[str, Any] = {}
    if engine.endswith("-plugin"):

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **kwargs)
            if (
                kwargs.get("fsdp_plugin") is not None
                and self.distributed_type == DistributedType.MULTI_CPU
            ):
                self.distributed_type = DistributedType.FSDP
                self.fsdp_plugin = kwargs["fsdp_plugin"]

        AcceleratorState.__init__ = init
        # Sharded: what gathers the whole model for rank 0 leaves tensors behind on a
        # CPU that are still on their way.
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config["state_dict_type"] = "SHARDED_STATE_DICT"
        more = {"fsdp": True, "fsdp_config": config}
        if engine.startswith("hsdp"):
            from accelerate.parallelism_config import ParallelismConfig

            more["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    try:
        yield more
    finally:
        AcceleratorState.__init__ = plain_init
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


class Watcher(TrainerCallback):
    """Looks once at what Trainer hands to the optimizer, clipped."""

    def __init__(self) -> None:
        self.largest_rank, self.norm = 0, 0.0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 3:
            whole = [full(p.grad) for p in model.parameters() if p.grad is not None]
            self.largest_rank = max(
                int(torch.linalg.matrix_rank(grad, rtol=1e-4)) for grad in whole if grad.ndim == 2
            )
            self.norm = float(
                torch.linalg.vector_norm(torch.stack([grad.norm() for grad in whole]))
            )


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; a collective for one that is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def arguments(engine: str, folder: Path, steps: int, more: dict[str, Any]) -> TrainingArguments:
    if engine.startswith("zero"):
        stage = {"stage": int(engine[-1])}
        config: dict[str, Any] = {
            "zero_optimization": stage,
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
        }
        config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        more = {"deepspeed": config, **more}
    # Rows of the embedding whose tokens do not occur have no gradient, and with
    # compression one of rounding; the default epsilon of 1e-8 would let Adam make much
    # of it.
    settings: dict[str, Any] = {
        "max_steps": steps, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "ddp_backend": "gloo", "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "disable_tqdm": True, "seed": 0,
        "max_grad_norm": CLIP.get(engine, 0.5), "save_strategy": "no", "adam_epsilon": 1e-5,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(str(folder), **settings | more)


def train(
    engine: str,
    folder: str,
    section: dict[str, Any] | None = None,
    form: str = "section",
    steps: int = STEPS,
    resume: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One run.

    Args:
        engine: see above.
        folder: output_dir.
        section: of the compressor; None: as Trainer trains by itself.
        form: how the callback is told: "section", "compressor", "optimizer" (made by
            the user), or "json" (--deepspeed).
        steps: optimizer steps in all.
        resume: checkpoint to go on from.
        more: further TrainingArguments.
    """
    with environment(engine) as of_the_engine:
        model = new_model(engine, Path(folder))
        of_the_engine |= more
        given: dict[str, Any] = {}
        if section is not None and form == "optimizer":
            base = torch.optim.AdamW(
                (p for p in model.parameters() if p.requires_grad),
                lr=1e-2,
                eps=1e-5,
                weight_decay=0.0,
            )
            optimizer = CompressedOptimizer.from_config(base, section)
            given = {"optimizers": (optimizer, None), "callbacks": [CompressionCallback(optimizer)]}
        elif form == "nothing":
            given = {"callbacks": [CompressionCallback()]}
        elif section is not None:
            told = {
                "section": section,
                "json": None,
                "compressor": Section.parse(section).make_compressor(),
            }[form]
            given = {"callbacks": [CompressionCallback(told)]}
        args = arguments(engine, Path(folder), steps, of_the_engine)
        if form == "json":
            args.hf_deepspeed_config.config["lowrank_comm"] = section
        watcher = Watcher()
        trainer = Trainer(model, args, train_dataset=Sentences(), **given)
        trainer.remove_callback(PrinterCallback)
        if not engine.startswith("zero"):
            trainer.add_callback(watcher)
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        inner = get(trainer.model_wrapped if engine.startswith("zero") else trainer.optimizer)
        return {
            "wrapped": type(trainer.model_wrapped).__name__,
            "engine": inner.plan.engine if inner is not None else None,
            "losses": [log["loss"] for log in logs],
            "norms": [log["grad_norm"] for log in logs],
            "logs": logs,
            "parameters": (
                {}
                if engine == "zero3"
                else {n: full(p) for n, p in trainer.model.named_parameters()}
            ),
            "largest_rank": watcher.largest_rank,
            "clipped_norm": watcher.norm,
            "steps": inner.reducer.step if inner is not None else None,
            "error": (
                sum(float(full(e).norm()) for e in inner.error_memory().values())
                if inner is not None
                else 0.0
            ),
        }


def case(rank: int, *given: Any, **more: Any) -> dict[str, Any]:
    """For the pool."""
    return train(*given, **more)


def zero_cases(folder: str) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Name -> (function, arguments, keywords), for DeepSpeed, which takes a process
    group only once in a process.
    """
    listed: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    for engine, form in (("zero1", "section"), ("zero2", "json"), ("zero3", "compressor")):
        own = f"{folder}/{engine}"
        saving = {"save_strategy": "steps", "save_steps": 25}
        listed[f"{engine} uncompressed"] = (case, (engine, own), {"steps": FULL_STEPS})
        listed[f"{engine} full rank"] = (
            case,
            (engine, own, FULL, "section"),
            {"steps": FULL_STEPS},
        )
        listed[f"{engine} rank 2"] = (case, (engine, own, RANK_2, form), saving)
        listed[f"{engine} resumed"] = (
            case,
            (engine, own, RANK_2, form),
            {"resume": f"{own}/checkpoint-25"},
        )
    listed["wrong use"] = (wrong_use_of_deepspeed, (f"{folder}/wrong",), {})
    return listed


def wrong_use_of_deepspeed(rank: int, folder: str) -> dict[str, str]:
    """What is said to who gives Trainer the wrong things with --deepspeed."""
    from tests.support.deepspeed_worker import message

    said = {}
    said["optimizer in the callback"] = message(
        lambda: train("zero1", folder, RANK_2, "optimizer", steps=1)
    )
    said["nothing"] = message(lambda: train("zero1", folder, None, "nothing", steps=1))

    def two_sections() -> None:
        with environment("zero1"):
            model, args = new_model("zero1", Path(folder)), arguments("zero1", Path(folder), 1, {})
            args.hf_deepspeed_config.config["lowrank_comm"] = {"rank": 8}
            Trainer(
                model, args, train_dataset=Sentences(), callbacks=[CompressionCallback({"rank": 4})]
            )

    said["two sections"] = message(two_sections)

    def optimizer_alone() -> None:
        with environment("zero1"):
            model, args = new_model("zero1", Path(folder)), arguments("zero1", Path(folder), 1, {})
            optimizer = CompressedOptimizer.from_config(
                torch.optim.AdamW(model.parameters()), RANK_2
            )
            Trainer(model, args, train_dataset=Sentences(), optimizers=(optimizer, None)).train()

    said["optimizer and no callback"] = message(optimizer_alone)
    return said


def run_zero(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    """All of them on this rank."""
    from tests.support import deepspeed_worker as worker

    worker.start(rank, 2)
    return worker.run_all(rank, folder, zero_cases(folder))
