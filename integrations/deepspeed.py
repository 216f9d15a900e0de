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
3. DeepSpeed takes over (`_deepspeed_seams`): each rank cuts out the part that it owns.
   Norm, clipping, loss scaling and the optimizer then see the reduced gradients.
4. After DeepSpeed's step the pass is committed if the step was applied, and rolled back
   if not (an fp16 overflow that only the decompressed gradient has). If some worker
   vetoed the pass, gradients are NaN on all ranks, so that DeepSpeed skips the step by
   its own rules, lowers its loss scale and counts it; nothing of the reducer's state
   has changed.

`engine.zero_grad()` or `engine.optimizer.zero_grad()` between backward and step drops
the pass, as it drops gradients.

`save_checkpoint` and `load_checkpoint` of the engine carry the reducer's state in
`<save_dir>/<tag>/`. The name of the save goes into DeepSpeed's own client_state, so
that a file which another run has left there is not taken for this one's.

An engine without the section takes part in one comparison (whether all ranks read the
same file) and warns when it loads a checkpoint whose error memory it cannot use;
nothing else of it is touched.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gc
import inspect
import logging
import os
import weakref
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

from lowrank_comm import CompressedOptimizer
from lowrank_comm.checkpointing import file as checkpoint
from lowrank_comm.communication import Group, Ledger, check_same
from lowrank_comm.config import SECTION, Section
from lowrank_comm.errors import ConfigError, LowRankCommError, UnsupportedError
from lowrank_comm.integrations._deepspeed import internals as seams
from lowrank_comm.integrations._deepspeed.topology import Levels, node_size
from lowrank_comm.integrations._deepspeed.unsupported import refuse_engine, refuse_settings
from lowrank_comm.integrations._deepspeed.zero import choose
from lowrank_comm.optimizer.engine import hint_of_two_levels
from lowrank_comm.optimizer.parameter_names import own_name, wrappers_in_front
from lowrank_comm.reduction.plan import Plan
from lowrank_comm.reduction.reducer import Outcome, Reducer
from lowrank_comm.reduction.report import StepReport

__all__ = ["DeepSpeedAdapter", "get", "install", "skip_shm_extension"]

_KEY = "_lowrank_comm"
_log = logging.getLogger("lowrank_comm")


class DeepSpeedAdapter:
    """What compresses the gradients of one engine; made by `install`, found by
    `get(engine)`.

    Attributes:
        reducer: the compressed averaging itself.
    """

    def __init__(self, engine: Any, seam: seams.Seam, section: Section) -> None:
        self._engine, self._seam = engine, seam
        # frozen or not
        depth = wrappers_in_front(name for name, _ in engine.module.named_parameters())
        shapes = [
            (own_name(name, depth), seams.shape(p), seam.dtype(p))
            for name, p in zip(seam.names, seam.parameters, strict=True)
        ]
        process_group, topology = seams.process_group(engine), section.topology
        size = node_size(topology, Group(process_group), seam.device)
        self._levels = Levels(process_group, size, topology.shard_scope, shapes, seam.device)
        self.reducer = Reducer(
            self._levels.slots,
            section.make_compressor(),
            self._levels.group,
            intra_node=self._levels.intra_node,
            **section.reducer_options(),
        )
        # of the pass whose step has not been taken yet
        self._outcome: Outcome | None = None
        self._stepping = self._accumulating = self._warned_drop = False
        seam.install(self._end_of_backward, self._reduce)
        engine._take_model_step = self._around(engine._take_model_step)
        for owner in (engine, engine.optimizer):
            if hasattr(owner, "zero_grad"):
                owner.zero_grad = self._dropping(owner.zero_grad)
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = _telling(engine.load_checkpoint, self._loaded)

    @property
    def plan(self) -> Plan:
        """What goes low-rank, bytes, memory."""
        stage = int(self._engine.zero_optimization_stage())
        notes = ["one pass for each optimizer step, at every stage", *self._levels.notes()]
        wire = self._engine._config.communication_data_type
        if wire is not None:
            notes.append(
                f"communication_data_type={wire} has no effect: {SECTION}.wire_dtype says how"
                " gradients travel"
            )
        if stage == 0 and self._engine.fp16_enabled():
            notes.append(
                f"fp16 at stage 0: DeepSpeed {seams.TESTED} divides gradients by a loss scale that"
                " it has not multiplied them by, with or without compression; use ZeRO stage 1"
            )
        plan = self.reducer.plan
        engine = f"DeepSpeed {deepspeed.__version__}, {self._seam.description}"
        return replace(plan, engine=engine, notes=(*notes, *hint_of_two_levels(plan)))

    @property
    def last_report(self) -> StepReport | None:
        """The last step's bytes by kind, captured energy, error norm, restarts, times;
        None before the first.
        """
        return self.reducer.last_report

    @property
    def ledger(self) -> Ledger:
        """Totals of the run."""
        return self.reducer.ledger

    def error_memory(self) -> dict[str, Tensor]:
        """Parameter name -> this rank's error, a live view; dense parameters are
        absent.

        In the parameter's full shape. With two levels it is this rank's block of rows
        of its node's error: ceil(m / F) rows, fewer or none on the last ranks of a
        node.
        """
        return self._levels.error_memory(self.reducer)

    # ---------------------------------------------------------------- a step

    def _end_of_backward(self, bucket_size: int | None = None) -> None:
        """In place of `engine.allreduce_gradients`."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._seam.collect(boundary)
        self._accumulating = not boundary
        if boundary:
            self._reduce()

    def _reduce(self, *_: Any) -> None:
        """The pass over all gradients, and their way back into DeepSpeed."""
        self._accumulating = False
        if self._outcome is not None:
            raise UnsupportedError(
                "lowrank_comm: a second backward at the accumulation boundary before engine.step();"
                " the gradients of the first are reduced already. Sum the losses and call backward"
                " once, or let every backward but the last be a micro-step"
                " (gradient_accumulation_steps, or"
                " engine.set_gradient_accumulation_boundary(False)). To give the first up, call"
                " engine.zero_grad()."
            )
        self._outcome = outcome = self._levels.reduce(
            self.reducer, self._seam.gradients(), self._seam.loss_scale
        )
        with torch.no_grad():
            self._seam.hand_over(outcome.grads)

    def _dropping(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        """`zero_grad`, which outside of a step also drops the pass that waits for one."""
        # a torch optimizer may outlive its engine
        me = weakref.ref(self)

        @functools.wraps(zero_grad)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            adapter = me()
            if adapter is not None and not adapter._stepping:
                adapter._drop()

        return wrapped

    def _drop(self) -> None:
        if self._accumulating and not self._warned_drop:
            self._warned_drop = True
            _log.warning(
                "zero_grad() between micro-steps drops what they have accumulated (DeepSpeed by"
                " itself keeps it at ZeRO stages 1 to 3); call it after engine.step() only"
            )
        self._accumulating = False
        if self._outcome is not None:
            self.reducer.rollback()
            self._outcome = None
        self._seam.drop()

    def _around(self, take_model_step: Callable[..., None]) -> Callable[..., None]:
        """The optimizer's step, after which the pass counts or is forgotten."""

        @functools.wraps(take_model_step)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            outcome, self._outcome = self._outcome, None
            if outcome is None:
                raise UnsupportedError(
                    "lowrank_comm: engine.step() reached an accumulation boundary, but no backward"
                    " did: the gradients are not reduced. Call engine.backward(loss) on what the"
                    " engine's forward returned, outside engine.no_sync(), before the step."
                )
            skipping = not outcome.applied and not self._seam.skips_by_itself
            self._seam.before_step()
            self._stepping = True
            try:
                with self._seam.skipped_step() if skipping else contextlib.nullcontext():
                    take_model_step(*args, **kwargs)
            except BaseException:
                # raised by a learning rate scheduler, say, after the parameters had
                # their step
                if outcome.applied and self._engine._step_applied:
                    self.reducer.commit()
                else:
                    self.reducer.rollback()
                raise
            finally:
                self._stepping = False
            if not outcome.applied:
                if self._engine._step_applied:
                    raise LowRankCommError(
                        f"lowrank_comm: DeepSpeed {deepspeed.__version__} applied a step whose"
                        " gradients were NaN; the parameters are lost. Resume from the last"
                        " checkpoint, and report the configuration."
                    )
            elif self._engine._step_applied:
                self.reducer.commit()
            else:
                self.reducer.rollback()

        return wrapped

    # ---------------------------------------------------------------- checkpoints

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """`engine.save_checkpoint`, which also writes the reducer's state; the
        signature stays (Trainer looks at it).
        """
        signature = inspect.signature(save)

        @functools.wraps(save)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._outcome is not None:
                raise LowRankCommError(
                    "lowrank_comm: save_checkpoint between backward and step; call engine.step()"
                    " first."
                )
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            client_state = given["client_state"] or {}
            if SECTION in client_state:
                raise ConfigError(
                    f"client_state[{SECTION!r}] is where this library keeps the name of its file;"
                    " use another key."
                )
            if given["save_dir"]:
                tag = given["tag"]
                folder = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
                # First ours: DeepSpeed ends with the file `latest`, which makes a
                # checkpoint one to resume from.
                name = checkpoint.save(self.reducer, Path(given["save_dir"]) / folder)
                given["client_state"] = {**client_state, SECTION: name}
            return save(*bound.args, **bound.kwargs)

        return wrapped

    def _loaded(self, path: Path | None, name: str | None) -> None:
        """After `engine.load_checkpoint`: restore the reducer's state where the
        optimizer's was.
        """
        self._drop()
        if path is not None:
            self._restore(path, name)

    def _restore(self, path: Path, name: str | None) -> None:
        """From the folder of a checkpoint. ds_to_universal leaves our file where it
        was, beside `<tag>_universal`.
        """
        folder = path if path.is_dir() else path.parent
        check_same(
            {f"client_state[{SECTION!r}] of the checkpoint": name},
            self._levels.everyone,
            self.reducer.device,
        )
        original = folder.with_name(folder.name.removesuffix("_universal"))
        if name is not None:
            found = folder if (folder / checkpoint.FILE_NAME).is_file() else original
            checkpoint.load(self.reducer, found, name)
            return
        if (folder / checkpoint.FILE_NAME).is_file():
            _log.warning(
                "%s was left there by another run, and is ignored", folder / checkpoint.FILE_NAME
            )
        memory = self.reducer.assignment.error_feedback.memory
        _log.warning("%s was saved without compression: the %s starts from zero", folder, memory)
        self.reducer.reset()


def _telling(
    load: Callable[..., Any], loaded: Callable[[Path | None, str | None], None]
) -> Callable[..., Any]:
    """`engine.load_checkpoint`, which then calls loaded(path, name of the save): path
    where the optimizer's state was loaded and None otherwise, name where the checkpoint
    was saved with compression.
    """
    signature = inspect.signature(load)

    @functools.wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        path, client_state = load(*args, **kwargs)
        name = client_state.pop(SECTION, None) if client_state else None
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        restores = (
            path is not None and given["load_optimizer_states"] and not given["load_module_only"]
        )
        loaded(Path(path) if restores else None, name)
        return path, client_state

    return wrapped


def get(engine: Any) -> DeepSpeedAdapter | None:
    """The adapter of an engine; None for an engine without the section "lowrank_comm",
    and for anything else.
    """
    return getattr(engine, "__dict__", {}).get(_KEY)


def skip_shm_extension() -> None:
    """Keep DeepSpeed on a CPU from compiling `deepspeed_shm_comm`, which takes a minute
    or two and serves inference only.

    Call it before the process group is made (by deepspeed.initialize,
    TrainingArguments, ...).
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def install() -> None:
    """Wrap `DeepSpeedEngine.__init__`; done by importing this module, and only once.

    Raises:
        UnsupportedError: an engine with the section is there already.
    """
    original = DeepSpeedEngine.__init__
    if hasattr(original, _KEY):
        return
    for one in gc.get_objects():
        if issubclass(type(one), DeepSpeedEngine) and _asks_for_compression(one):
            raise UnsupportedError(
                f'lowrank_comm: an engine with the section "{SECTION}" was made before'
                " lowrank_comm.integrations.deepspeed was imported, and trains without"
                " compression. Import it before deepspeed.initialize or Trainer."
            )
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        section = _before(signature.bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)
        if section is not None and section.enabled:
            _attach(self, section)
        else:
            _leave_alone(self, section)

    setattr(__init__, _KEY, True)
    DeepSpeedEngine.__init__ = __init__


def _asks_for_compression(engine: Any) -> bool:
    settings = getattr(engine.__dict__.get("_config"), "_param_dict", {})
    section = settings.get(SECTION)
    return section is not None and not (
        isinstance(section, Mapping) and section.get("enabled") is False
    )


def _before(given: Mapping[str, Any]) -> Section | None:
    """Everything that can be found wrong before an engine is built."""
    _refuse_compressed(given.get("optimizer"))
    config = given["config_class"]
    settings = config._param_dict
    section = settings.get(SECTION)
    # Over the ranks with which DeepSpeed is going to share this engine, and no others:
    # engines may differ between groups.
    mpu, mesh = given.get("mpu"), given.get("mesh_device")
    group = Group(
        mpu.get_data_parallel_group()
        if mpu
        else mesh.get_group(mesh_dim="data_parallel")
        if mesh
        else None
    )
    check_same(
        {f"section {SECTION!r}": "absent" if section is None else "present"}, group, _device()
    )
    if section is None:
        close = difflib.get_close_matches(
            SECTION, [key for key in settings if isinstance(key, str)], n=1, cutoff=0.8
        )
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
    check_same(ours, group, _device())
    parsed = Section.parse(section)
    if not parsed.enabled:
        return parsed
    node_size(parsed.topology, group, _device())
    refuse_settings(config, dict(given))
    return parsed


def _device() -> torch.device:
    """Where this rank's tensors are to be. DeepSpeed makes it the current device only
    when it builds the engine.
    """
    accelerator, rank = get_accelerator(), os.environ.get("LOCAL_RANK")
    return torch.device(
        accelerator.current_device_name() if rank is None else accelerator.device_name(int(rank))
    )


def _leave_alone(engine: Any, section: Section | None) -> None:
    """Say that an engine without an enabled section compresses nothing, if it trains,
    and warn when it loads a checkpoint whose error memory it loses.
    """
    if seams.does_not_train(engine):
        return
    if Group(seams.process_group(engine)).rank == 0:
        has = f'no section "{SECTION}"' if section is None else f'"enabled": false in "{SECTION}"'
        print(
            f"lowrank_comm: {has} in the DeepSpeed configuration, nothing is compressed",
            flush=True,
        )

    def loaded(path: Path | None, name: str | None) -> None:
        if path is not None and name is not None:
            _log.warning(
                "%s was saved with compression, and this run has no section %r that is enabled:"
                " its error memory is lost",
                path,
                SECTION,
            )

    engine.load_checkpoint = _telling(engine.load_checkpoint, loaded)


def _attach(engine: Any, section: Section) -> None:
    """Connect a finished engine, and say once what will happen."""
    seam = choose(engine)
    if seam is None:
        return
    _refuse_compressed(engine.basic_optimizer)
    refuse_engine(engine)
    adapter = DeepSpeedAdapter(engine, seam, section)
    engine.__dict__[_KEY] = adapter
    if adapter.reducer.workers.is_writer:
        print(adapter.plan, flush=True)


def _refuse_compressed(optimizer: Any) -> None:
    """A CompressedOptimizer averages by itself and would do so beside the engine."""
    if isinstance(optimizer, CompressedOptimizer):
        raise ConfigError(
            "lowrank_comm: a CompressedOptimizer cannot be handed to DeepSpeed, which averages"
            " gradients itself. Hand over "
            f'the base optimizer, and put a section "{SECTION}" with the compressor\'s settings'
            " into the DeepSpeed JSON."
        )


install()
