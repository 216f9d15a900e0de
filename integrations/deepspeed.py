"""DeepSpeed: a section `"lowrank_comm": {...}` in its JSON, and `import lowrank_comm.integrations.deepspeed` in the script.

Importing this module wraps `DeepSpeedEngine.__init__`. An engine whose configuration has the section gets a `Reducer` in
the place of DeepSpeed's own gradient averaging; any other engine is left as it is. An optimizer step at every ZeRO stage:

1. Micro-steps only accumulate. Full local gradients stay on every rank until the accumulation boundary.
2. At the end of the last micro-step's backward, where DeepSpeed reduces, one pass of the reducer replaces all local
   gradients by the compressed mean, times the loss scale; the error memory is kept free of the scale.
3. DeepSpeed takes over (`_deepspeed_seams`): each rank cuts out the part that it owns. Norm, clipping, loss scaling and
   the optimizer then see the reduced gradients.
4. After DeepSpeed's step the pass is committed if the step was applied, and rolled back if not (an fp16 overflow that only
   the decompressed gradient has). If some worker vetoed the pass, gradients are NaN on all ranks, so that DeepSpeed skips
   the step by its own rules, lowers its loss scale and counts it; nothing of the reducer's state has changed.

`save_checkpoint` and `load_checkpoint` of the engine carry the reducer's state in `<save_dir>/<tag>/`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from lowrank_comm import CompressedOptimizer, checkpoint
from lowrank_comm.communication import Group, Ledger, check_same
from lowrank_comm.config import SECTION, Section
from lowrank_comm.diagnostics import Plan, StepReport, human_bytes
from lowrank_comm.errors import ConfigError, LowRankCommError, UnsupportedError
from lowrank_comm.naming import own_names
from lowrank_comm.reducer import Outcome, Reducer, Slot

from . import _deepspeed_seams as seams
from ._deepspeed_refusals import refuse_engine, refuse_settings

__all__ = ["DeepSpeedAdapter", "get", "install", "skip_shm_extension"]

_KEY = "_lowrank_comm"


class DeepSpeedAdapter:
    """What compresses the gradients of one engine; made by `install`, found by `get(engine)`.

    Attributes:
        reducer: the compressed averaging itself.
    """

    def __init__(self, engine: Any, seam: seams.Seam, section: Section) -> None:
        self._engine, self._seam = engine, seam
        slots = [
            Slot(name, seams.shape(p), seam.dtype(p), seam.device)
            for name, p in zip(own_names(seam.names), seam.parameters, strict=True)
        ]
        group = Group(seams.process_group(engine))
        self.reducer = Reducer(slots, section.make_compressor(), group, **section.reducer_options())
        self._outcome: Outcome | None = None  # of the pass whose step has not been taken yet
        seam.install(self._end_of_backward, self._reduce)
        engine._take_model_step = self._around(engine._take_model_step)
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = self._loading(engine.load_checkpoint)

    @property
    def plan(self) -> Plan:
        """What goes low-rank, bytes, memory."""
        local = sum(slot.numel * slot.dtype.itemsize for slot in self.reducer.slots)
        notes = [
            f"DeepSpeed {deepspeed.__version__}, {self._seam.description}: one pass for each optimizer step. Whatever the",
            f"stage, every rank holds all its local gradients until then ({human_bytes(local)}),",
            'and the whole error memory, which "error_feedback": {"offload": true} moves to the CPU',
        ]
        wire = self._engine._config.communication_data_type
        if wire is not None:
            notes.append(f"communication_data_type={wire} has no effect: {SECTION}.wire_dtype says how gradients travel")
        return replace(self.reducer.plan, notes=tuple(notes))

    @property
    def last_report(self) -> StepReport | None:
        """The last step's bytes by kind, captured energy, error norm, restarts, times; None before the first."""
        return self.reducer.last_report

    @property
    def ledger(self) -> Ledger:
        """Totals of the run."""
        return self.reducer.ledger

    def error_memory(self) -> dict[str, Tensor]:
        """Parameter name -> this rank's error, a live view of the parameter's full shape; dense parameters are absent."""
        return self.reducer.error_memory()

    # ---------------------------------------------------------------- a step

    def _end_of_backward(self, bucket_size: int | None = None) -> None:
        """In place of `engine.allreduce_gradients`."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._seam.collect(boundary)
        if boundary:
            self._reduce()

    def _reduce(self, *_: Any) -> None:
        """The pass over all gradients, and their way back into DeepSpeed."""
        if self._outcome is not None:
            raise UnsupportedError(
                "lowrank_comm: a second backward at the accumulation boundary before engine.step(); the gradients of the "
                "first are reduced already. Sum the losses and call backward once, or let every backward but the last be "
                "a micro-step (gradient_accumulation_steps, or engine.set_gradient_accumulation_boundary(False))."
            )
        outcome = self.reducer.reduce(self._seam.gradients(), scale=self._seam.loss_scale)
        gradients = outcome.grads if outcome.applied else self._poisoned(outcome.grads)
        self._outcome = outcome
        with torch.no_grad():
            self._seam.hand_over(gradients)

    def _poisoned(self, gradients: seams.Gradients) -> seams.Gradients:
        """NaN everywhere. DeepSpeed looks only at what a rank owns or has a gradient for, so every rank gets all of it."""
        slots = self.reducer.slots
        return [
            torch.full(slot.shape, torch.nan, dtype=slot.dtype, device=slot.device) if g is None else g.fill_(torch.nan)
            for g, slot in zip(gradients, slots, strict=True)
        ]

    def _around(self, take_model_step: Callable[..., None]) -> Callable[..., None]:
        """The optimizer's step, after which the pass counts or is forgotten."""

        @functools.wraps(take_model_step)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            outcome, self._outcome = self._outcome, None
            if outcome is None:
                raise UnsupportedError(
                    "lowrank_comm: engine.step() reached an accumulation boundary, but no backward did: the gradients are "
                    "not reduced. Call engine.backward(loss) on what the engine's forward returned, outside "
                    "engine.no_sync(), before the step."
                )
            skipping = not outcome.applied and not self._seam.skips_by_itself
            try:
                with self._seam.skipped_step() if skipping else contextlib.nullcontext():
                    take_model_step(*args, **kwargs)
            except BaseException:
                self.reducer.rollback()
                raise
            if not outcome.applied:
                if self._engine._step_applied:
                    raise LowRankCommError(
                        f"lowrank_comm: DeepSpeed {deepspeed.__version__} applied a step whose gradients were NaN; the "
                        "parameters are lost. Resume from the last checkpoint, and report the configuration."
                    )
            elif self._engine._step_applied:
                self.reducer.commit()
            else:
                self.reducer.rollback()

        return wrapped

    # ---------------------------------------------------------------- checkpoints

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """`engine.save_checkpoint`, which also writes the reducer's state; the signature stays (Trainer looks at it)."""
        signature = inspect.signature(save)

        @functools.wraps(save)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._outcome is not None:
                raise LowRankCommError("lowrank_comm: save_checkpoint between backward and step; call engine.step() first.")
            given = signature.bind(*args, **kwargs).arguments
            if given["save_dir"]:
                tag = given.get("tag")
                folder = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
                # First ours: DeepSpeed ends with the file `latest`, which makes a checkpoint one to resume from.
                checkpoint.save(self.reducer, Path(given["save_dir"]) / folder)
            return save(*args, **kwargs)

        return wrapped

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """`engine.load_checkpoint`, which also restores the reducer's state, where the optimizer's is restored."""
        signature = inspect.signature(load)

        @functools.wraps(load)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            result = load(*args, **kwargs)
            if self._outcome is not None:
                self.reducer.rollback()
                self._outcome = None
            path, _ = result
            given = bound.arguments
            if path is not None and given["load_optimizer_states"] and not given["load_module_only"]:
                found = Path(path)
                checkpoint.load(self.reducer, found if found.is_dir() else found.parent)
            return result

        return wrapped


def get(engine: Any) -> DeepSpeedAdapter | None:
    """The adapter of an engine; None for an engine without the section "lowrank_comm", and for anything else."""
    return getattr(engine, "__dict__", {}).get(_KEY)


def skip_shm_extension() -> None:
    """Keep DeepSpeed on a CPU from compiling `deepspeed_shm_comm`, which takes a minute or two and serves inference only.

    Call it before the process group is made (by deepspeed.initialize, TrainingArguments, ...).
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def install() -> None:
    """Wrap `DeepSpeedEngine.__init__`; done by importing this module, and only once."""
    original = DeepSpeedEngine.__init__
    if hasattr(original, _KEY):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        section = _before(signature.bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)
        if section is not None:
            _attach(self, section)

    setattr(__init__, _KEY, True)
    DeepSpeedEngine.__init__ = __init__


def _before(given: Mapping[str, Any]) -> Section | None:
    """Everything that can be found wrong before an engine is built."""
    _refuse_compressed(given.get("optimizer"))
    config = given["config_class"]
    section = config._param_dict.get(SECTION)
    _compare(config, section)
    if section is None:
        return None
    parsed = Section.parse(section)
    refuse_settings(config, dict(given))
    return parsed


def _compare(config: Any, section: Mapping[str, Any] | None) -> None:
    """ConfigMismatchError on all ranks if a rank read another file; otherwise they would wait for each other for ever."""
    description = {
        f"section {SECTION!r}": "absent" if section is None else "present",
        SECTION: section or {},
        "zero_optimization.stage": int(config.zero_config.stage),
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }
    check_same(description, Group(), torch.device(get_accelerator().current_device_name()))


def _attach(engine: Any, section: Section) -> None:
    """Connect a finished engine, and say once what will happen."""
    seam = seams.choose(engine)
    if seam is None:
        return
    _refuse_compressed(engine.basic_optimizer)
    refuse_engine(engine)
    adapter = DeepSpeedAdapter(engine, seam, section)
    engine.__dict__[_KEY] = adapter
    if adapter.reducer.group.rank == 0:
        print(adapter.plan, flush=True)


def _refuse_compressed(optimizer: Any) -> None:
    """A CompressedOptimizer averages by itself and would do so beside the engine."""
    if isinstance(optimizer, CompressedOptimizer):
        raise ConfigError(
            "lowrank_comm: a CompressedOptimizer cannot be handed to DeepSpeed, which averages gradients itself. Hand over "
            f'the base optimizer, and put a section "{SECTION}" with the compressor\'s settings into the DeepSpeed JSON.'
        )


install()
