"""Settings of DeepSpeed under which a compressed step would be wrong, or its checks
would not see it: refused by name before training.

Each refusal names the key, the value found, why it cannot be, and what to write
instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lowrank_comm.errors import ConfigError

Refusal = tuple[str, Any, str, str]
"""Key, value, why, what to do."""


def raise_first(refusals: Iterator[Refusal]) -> None:
    """Raise ConfigError for the first refusal, if there is one."""
    for key, value, why, fix in refusals:
        raise ConfigError(
            f"lowrank_comm: {key}={value!r} is not possible with gradient compression: {why}."
            f" {fix}."
        )


def of_settings(config: Any, model: Any) -> Iterator[Refusal]:
    """Yield the settings of a parsed DeepSpeed configuration that cannot go with
    compression.

    Args:
        config: `DeepSpeedConfig`.
        model: that the engine is going to train.
    """

    def setting(path: str, default: Any = None) -> Any:
        """Return a parsed setting; the default where this DeepSpeed or this file has
        none.
        """
        value = config
        for part in path.split("."):
            value = getattr(value, part, None)
        return default if value is None else value

    stage = int(setting("zero_config.stage", 0))
    sharded_gradients = stage in (1, 2)
    fp16, bf16 = setting("float16_config.enabled"), setting("bfloat16_config.enabled")

    for path, key, why, fix in _MUST_BE_OFF:
        if setting(path):
            yield key, True, why, fix
    if setting("zero_config.zenflow") is not None:
        why = "it selects and transposes gradients on its own schedule"
        yield "zero_optimization.zenflow", "{...}", why, "Remove the section"
    if sharded_gradients and not setting("zero_config.contiguous_gradients", True):
        why = (
            f"ZeRO stage {stage} then averages through a path without a place for the reduced"
            " gradients"
        )
        yield "zero_optimization.contiguous_gradients", False, why, _TRUE
    if sharded_gradients and not setting("zero_config.ignore_unused_parameters", True):
        why = (
            "a parameter without a gradient on one rank gets the mean of the others, so DeepSpeed"
            " would not find it unused and stop"
        )
        yield "zero_optimization.ignore_unused_parameters", False, why, _TRUE
    if sharded_gradients and bf16 and not setting("bfloat16_config.check_grad_overflow", True):
        why = "a step that some worker vetoed for NaN would be applied"
        yield "bf16.check_grad_overflow", False, why, _TRUE
    if not setting("zero_config.compute_grad_norm", True) and not fp16 and not bf16:
        why = (
            "in fp32 DeepSpeed finds NaN by this norm, and would apply a step that some worker"
            " vetoed"
        )
        yield "zero_optimization.compute_grad_norm", False, why, _TRUE
    operation = setting("gradient_allreduce_op", "mean")
    if operation != "mean":
        why = "error feedback is defined for the mean of the workers' gradients"
        fix = 'Use "mean", and multiply the learning rate where needed'
        yield "gradient_allreduce_op", operation, why, fix
    autocast = setting("torch_autocast_enabled")
    if autocast and setting("torch_autocast_dtype") == torch.float16:
        why = "its loss scaler is torch's, and the error memory must be kept free of the scale"
        fix = 'Use "bfloat16", or the section "fp16" instead'
        yield "torch_autocast.dtype", "float16", why, fix
    if setting("tensor_parallel_config.autotp_size", 0) > 1:
        size = config.tensor_parallel_config.autotp_size
        yield "tensor_parallel.autotp_size", size, _SHARDS, "Set it to 1 or remove the section"
    sequence = config._param_dict.get("sequence_parallel_size", 1)
    if sequence > 1:
        yield "sequence_parallel_size", sequence, _SEQUENCE, "Set it to 1"
    if str(setting("optimizer_name", "")).lower() == "muon":
        yield "optimizer.type", config.optimizer_name, _MUON, _OTHER_OPTIMIZER
    kind = type(model).__name__
    if kind in ("PipelineModule", "DualPipeVModule"):
        why = "pipeline engines reduce gradients between stages at their own time"
        yield "model", kind, why, "Use ZeRO without pipeline stages"


def of_engine(engine: Any) -> Iterator[Refusal]:
    """Yield what only the finished engine shows: the model, the optimizer, and parallel
    groups.
    """
    modules = dict(engine.module.named_modules())
    if engine.has_moe_layers:
        layers = [name for name, module in modules.items() if "MoE" in type(module).__name__]
        # the model itself has no name
        named = [name or type(engine.module).__name__ for name in layers[:3]]
        found = f"MoE layers {', '.join(named)}"
        yield "model", found, _EXPERTS, "Remove the 'lowrank_comm' section"
    optimizer = type(engine.basic_optimizer).__name__
    if "Muon" in optimizer:
        yield "optimizer", optimizer, _MUON, _OTHER_OPTIMIZER
    if engine.mp_world_size > 1:
        yield "mpu model parallel size", engine.mp_world_size, _SHARDS, "Use data parallelism only"
    if engine.sequence_parallel_size > 1:
        yield "sequence_parallel_size", engine.sequence_parallel_size, _SEQUENCE, "Set it to 1"
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    for name, module in modules.items():
        if isinstance(module, embeddings) and module.sparse:
            why = "its gradient is sparse, and the reduction is dense"
            fix = "Build the embedding with sparse=False; it is then compressed"
            yield f"{name or 'model'}.sparse", True, why, fix


_EXPERTS = "experts are averaged over groups of their own"
_SHARDS = "each rank holds a slice of the matrices only"
_SEQUENCE = "ranks that share a sequence are not workers with gradients of their own"
_MUON = "DeepSpeed's Muon takes part in the reduction of the gradients"
_TRUE = "Set it to true, or leave it out"
_OTHER_OPTIMIZER = "Use another optimizer"

_MUST_BE_OFF = (
    (
        "zero_config.zero_quantized_gradients",
        "zero_optimization.zero_quantized_gradients",
        "it compresses gradients by itself, without error feedback",
        "Set it to false",
    ),
    (
        "zero_config.offload_optimizer.super_offload",
        "zero_optimization.offload_optimizer.super_offload",
        "its optimizer takes gradients from DeepSpeed's own reduction",
        "Set it to false; plain offload_optimizer works",
    ),
    (
        "compile_config.deepcompile",
        "compile.deepcompile",
        "compiled graphs reduce the gradients themselves",
        "Set it to false",
    ),
    (
        "hybrid_engine.enabled",
        "hybrid_engine.enabled",
        "it has never been run with it",
        "Set it to false",
    ),
    (
        "expert_parallel_config.enabled",
        "expert_parallel.enabled",
        _EXPERTS,
        "Remove the section",
    ),
    (
        "use_node_local_storage",
        "checkpoint.use_node_local_storage",
        "rank 0 alone writes the compressor's state, and the other nodes would not find it",
        "Save to a folder that all nodes share",
    ),
)
"""Switches of DeepSpeed: path in the parsed configuration, key, why, what to do."""
