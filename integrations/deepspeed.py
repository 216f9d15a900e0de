"""DeepSpeed: a section `"lowrank_comm": {...}` in its JSON, and `import
lowrank_comm.integrations.deepspeed` in the script.

Importing this module wraps `DeepSpeedEngine.__init__`. An engine whose configuration
has the section gets a `Reducer` in the place of DeepSpeed's own gradient averaging; any
other engine is left as it is. An optimizer step at every ZeRO stage:

1. Micro-steps only accumulate. Full local gradients stay on every rank until the
   accumulation boundary.
2. At the end of the last micro-step's backward, where DeepSpeed reduces, one pass of
   the reducer replaces all local gradients by the compressed mean, times the loss
   scale; the error memory is kept free of the scale. With two levels
   (`topology.shard_size`) the ranks of a node first average exactly, and share the pass
   by blocks of rows.
3. DeepSpeed takes over: each rank cuts out the part that it owns. Norm, clipping, loss
   scaling and the optimizer then see the reduced gradients.
4. After DeepSpeed's step the pass is committed if the step was applied, and rolled back
   if not (an fp16 overflow that only the decompressed gradient has). If some worker
   vetoed the pass, gradients are NaN on all ranks, so that DeepSpeed skips the step by
   its own rules, lowers its loss scale and counts it; nothing of the reducer's state
   has changed.

`engine.zero_grad()` or `engine.optimizer.zero_grad()` between backward and step drops
the pass, as it drops gradients. `save_checkpoint` and `load_checkpoint` of the engine
carry the reducer's state.

An engine without the section takes part in one comparison (whether all ranks read the
same file) and warns when it loads a checkpoint whose error memory it cannot use;
nothing else of it is touched.

The parts, in `_deepspeed`:

    initialization   what happens before and after `DeepSpeedEngine.__init__`
    adapter          the compressed step of one engine (points 1 to 4)
    internals        DeepSpeed's private names, checked; what a `GradientStore` is
    whole, zero      where gradients wait at stage 0, and at the ZeRO stages
    topology         what a worker is: every rank, or a node
    levels           the averaging of whole gradients, on one level or on two
    checkpoints      the reducer's state in the engine's checkpoints
    unsupported      settings that are refused, and why
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm.torch
import deepspeed.ops
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.cpp_extension import get_default_build_root

from lowrank_comm.config import SECTION
from lowrank_comm.errors import UnsupportedError
from lowrank_comm.integrations._deepspeed.adapter import DeepSpeedAdapter
from lowrank_comm.integrations._deepspeed.initialization import (
    asks_for_compression,
    attach,
    leave_alone,
    section_of,
)
from lowrank_comm.integrations._deepspeed.internals import does_not_train

__all__ = ["DeepSpeedAdapter", "get", "install", "skip_shm_extension"]

_KEY = "_lowrank_comm"
_SHM = "deepspeed_shm_comm"


def get(engine: Any) -> DeepSpeedAdapter | None:
    """Return the adapter of an engine; None for an engine without the section
    "lowrank_comm", and for anything else.
    """
    return getattr(engine, "__dict__", {}).get(_KEY)


def skip_shm_extension() -> None:
    """Keep DeepSpeed on a CPU from compiling `deepspeed_shm_comm`, which takes a minute
    or two and serves inference only.

    Call it before the process group is made (by deepspeed.initialize,
    TrainingArguments, ...).
    """
    deepspeed.ops.__compatible_ops__[_SHM] = False


def _telling(build: Callable[[], Any]) -> Callable[[], Any]:
    """Return DeepSpeed's `build_shm_op` with a line before it compiles, on one rank of
    a host: it is silent for minutes.
    """

    @functools.wraps(build)
    def build_shm_op() -> Any:
        asked = deepspeed.ops.__compatible_ops__.get(_SHM, False)
        cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
        found = {path.suffix or path.name for path in cache.glob(f"**/{_SHM}/*")}
        if asked and ".so" not in found and os.environ.get("LOCAL_RANK", "0") == "0":
            line = (
                f"lowrank_comm: DeepSpeed compiles {_SHM} in {cache}, once, which takes minutes"
                " and serves inference only; skip_shm_extension() of"
                " lowrank_comm.integrations.deepspeed spares it."
            )
            if "lock" in found:
                line += (
                    " A file 'lock' is there: another process compiles, or was killed while it"
                    " did. If none does, delete it, or this one waits for ever."
                )
            print(line, flush=True)
        return build()

    return build_shm_op


def install() -> None:
    """Wrap `DeepSpeedEngine.__init__`; done by importing this module, and only once.

    Raises:
        UnsupportedError: an engine with the section is there already.
    """
    original = DeepSpeedEngine.__init__
    if hasattr(original, _KEY):
        return
    for one in gc.get_objects():
        if issubclass(type(one), DeepSpeedEngine) and asks_for_compression(one):
            raise UnsupportedError(
                f'lowrank_comm: an engine with the section "{SECTION}" was made before'
                " lowrank_comm.integrations.deepspeed was imported, and trains without"
                " compression. Import it before deepspeed.initialize or Trainer."
            )
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        section = section_of(signature.bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)
        if does_not_train(self):
            return
        if section is None or not section.enabled:
            leave_alone(self, section)
        else:
            self.__dict__[_KEY] = attach(self, section)

    setattr(__init__, _KEY, True)
    DeepSpeedEngine.__init__ = __init__
    # on a CPU, DeepSpeed calls it when it makes the process group
    build = getattr(deepspeed.comm.torch, "build_shm_op", None)
    if build is not None:
        deepspeed.comm.torch.build_shm_op = _telling(build)


install()
