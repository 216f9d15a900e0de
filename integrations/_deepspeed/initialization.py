"""What happens around `DeepSpeedEngine.__init__`.

Before it, `section_of` finds what can be found wrong in the configuration. After it,
`attach` connects an engine with the section, and `leave_alone` warns for one without.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import deepspeed.runtime.utils
import torch
from deepspeed.accelerator import get_accelerator
from torch.optim import Optimizer

from lowrank_comm import CompressedOptimizer
from lowrank_comm.checkpointing.state_dict import take_from
from lowrank_comm.communication import Group, check_same
from lowrank_comm.config import SECTION, Section
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.integrations._compression_argument import is_disabled
from lowrank_comm.integrations._deepspeed.adapter import DeepSpeedAdapter
from lowrank_comm.integrations._deepspeed.checkpoints import observe_load, warn_of_lost_memory
from lowrank_comm.integrations._deepspeed.internals import (
    ENGINE,
    ENGINE_STATE,
    TESTED,
    GradientStore,
    check,
)
from lowrank_comm.integrations._deepspeed.topology import node_size
from lowrank_comm.integrations._deepspeed.unsupported import of_engine, of_settings, raise_first
from lowrank_comm.integrations._deepspeed.whole import BF16Gradients, PlainGradients
from lowrank_comm.integrations._deepspeed.zero import PartitionedGradients, PartitionedParameters

_log = logging.getLogger("lowrank_comm")


def asks_for_compression(engine: Any) -> bool:
    """Return whether the configuration of an engine has a section that is enabled."""
    section = getattr(engine.__dict__.get("_config"), "_param_dict", {}).get(SECTION)
    return section is not None and not is_disabled(section)


def section_of(given: Mapping[str, Any]) -> Section | None:
    """Return the section of an engine that is going to be built, None without one; a
    collective of the ranks that will share the engine.

    Args:
        given: the arguments of `DeepSpeedEngine.__init__` by name.

    Raises:
        ConfigError: on all ranks, for everything that can be found wrong before an
            engine is built.
    """
    optimizer = given.get("optimizer")
    _refuse_compressed(optimizer)
    if isinstance(optimizer, Optimizer) and take_from(optimizer) is not None:
        _log.warning(
            "the optimizer that DeepSpeed is given had loaded a compressed checkpoint: its error"
            " memory is dropped; engine.load_checkpoint() restores that of engine.save_checkpoint()"
        )
    config = given["config_class"]
    settings = config._param_dict
    section = settings.get(SECTION)
    group, device = _group_of(given), _device()
    presence = "absent" if section is None else "present"
    check_same({f"section {SECTION!r}": presence}, group, device)
    if section is None:
        if SECTION in settings:
            raise ConfigError(
                f"{SECTION!r} in the DeepSpeed configuration is null; write {{}} for the defaults,"
                ' {"enabled": false} for no compression, or leave it out.'
            )
        keys = [key for key in settings if isinstance(key, str)]
        close = difflib.get_close_matches(SECTION, keys, n=1, cutoff=0.8)
        if close:
            raise ConfigError(
                f"{close[0]!r} in the DeepSpeed configuration is not a section; did you mean"
                f" {SECTION!r}?"
            )
        return None
    ours = {
        SECTION: section,
        "zero_optimization.stage": int(config.zero_config.stage),
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    check_same(ours, group, device)
    parsed = Section.parse(section)
    if not parsed.enabled:
        return parsed
    node_size(parsed.topology, group, device)
    raise_first(of_settings(config, given.get("model")))
    return parsed


def _group_of(given: Mapping[str, Any]) -> Group:
    """Return the ranks with which DeepSpeed is going to share this engine, and no
    others: engines may differ between groups.
    """
    mpu, mesh = given.get("mpu"), given.get("mesh_device")
    if mpu:
        return Group(mpu.get_data_parallel_group())
    return Group(mesh.get_group(mesh_dim="data_parallel") if mesh else None)


def _device() -> torch.device:
    """Return the device of this rank's tensors. DeepSpeed makes it the current device
    only when it builds the engine.
    """
    accelerator, rank = get_accelerator(), os.environ.get("LOCAL_RANK")
    return torch.device(
        accelerator.current_device_name() if rank is None else accelerator.device_name(int(rank))
    )


def leave_alone(engine: Any, section: Section | None) -> None:
    """Say that an engine without an enabled section compresses nothing, and let it warn
    when it loads a checkpoint whose error memory is lost.
    """
    if Group(engine.seq_data_parallel_group).rank == 0:
        has = f'no section "{SECTION}"' if section is None else f'"enabled": false in "{SECTION}"'
        print(
            f"lowrank_comm: {has} in the DeepSpeed configuration, nothing is compressed",
            flush=True,
        )
    observe_load(engine, warn_of_lost_memory)


def attach(engine: Any, section: Section) -> DeepSpeedAdapter:
    """Connect a finished engine, which trains, and print the plan."""
    store = _store_of(engine)
    _refuse_compressed(engine.basic_optimizer)
    raise_first(of_engine(engine))
    adapter = DeepSpeedAdapter(engine, store, section)
    if adapter.reducer.workers.is_writer:
        print(adapter.plan, flush=True)
    return adapter


def _store_of(engine: Any) -> GradientStore:
    """Return the store where the gradients of a live engine wait.

    What the optimizer's wrapper can do decides, not the stage's number: ZeRO-1 in
    bfloat16 with fp32 accumulation is no ZeRO optimizer, for example.
    """
    optimizer = engine.optimizer
    check(engine, (*ENGINE, *ENGINE_STATE), "the engine")
    # Before this function existed, ZeRO in fp32 and stage 3 in any dtype applied steps
    # whose gradients were NaN.
    check(deepspeed.runtime.utils, ("is_invalid_grad_norm",), "deepspeed.runtime.utils")
    if hasattr(optimizer, "fp32_groups_gradients"):
        return BF16Gradients(engine)
    if hasattr(optimizer, "gradient_reduction_w_predivide"):
        return PartitionedGradients(engine)
    if hasattr(optimizer, "partition_grads"):
        return PartitionedParameters(engine)
    if int(engine.zero_optimization_stage()) == 0:
        return PlainGradients(engine)
    raise UnsupportedError(
        f"lowrank_comm: DeepSpeed {deepspeed.__version__} uses {type(optimizer).__name__} here,"
        f" which the adapter does not know. It is tested with DeepSpeed {TESTED}; remove the"
        " 'lowrank_comm' section, or use another stage."
    )


def _refuse_compressed(optimizer: Any) -> None:
    """Raise ConfigError for a CompressedOptimizer, which would average again."""
    if isinstance(optimizer, CompressedOptimizer):
        raise ConfigError(
            "lowrank_comm: a CompressedOptimizer cannot be handed to DeepSpeed, which averages"
            " gradients itself. Hand over the base optimizer, and put a section"
            f' "{SECTION}" with the compressor\'s settings into the DeepSpeed JSON.'
        )
