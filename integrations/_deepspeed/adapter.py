"""What compresses the gradients of one DeepSpeed engine.

One optimizer step, at every ZeRO stage:

    engine.backward(loss)   a micro-step only accumulates; full local gradients stay on
                            every rank until the accumulation boundary
    the last backward       where DeepSpeed would average, `_reduce` replaces all local
                            gradients by the compressed mean and hands them to DeepSpeed
    engine.step()           DeepSpeed cuts out what each rank owns, clips, and steps;
                            `_step` then commits the pass if the step was applied, and
                            rolls it back if not

`GradientStore` knows where gradients wait and how the averaged ones are handed over;
`Levels` averages them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from lowrank_comm.checkpointing.rehearsed import CHECKPOINTS
from lowrank_comm.communication import Group, Ledger
from lowrank_comm.communication.agreement import options_of
from lowrank_comm.config import SECTION, Section
from lowrank_comm.errors import LowRankCommError, UnsupportedError
from lowrank_comm.integrations._deepspeed import checkpoints
from lowrank_comm.integrations._deepspeed.internals import (
    TESTED,
    GradientStore,
    shape,
)
from lowrank_comm.integrations._deepspeed.levels import Levels
from lowrank_comm.integrations._deepspeed.topology import node_size
from lowrank_comm.integrations._methods import wrap_method
from lowrank_comm.optimizer.engine import hint_of_two_levels
from lowrank_comm.optimizer.parameter_names import own_name, wrappers_in_front
from lowrank_comm.reduction.divergence import DivergenceCheck
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import Plan
from lowrank_comm.reduction.reducer import Outcome, Reducer
from lowrank_comm.reduction.report import StepReport
from lowrank_comm.reduction.skipped_steps import SkippedSteps

_log = logging.getLogger("lowrank_comm")


class DeepSpeedAdapter:
    """Averages the gradients of one engine, compressed; `get(engine)` finds it.

    Args:
        engine: a finished `DeepSpeedEngine`, whose methods are wrapped here.
        store: where its gradients wait.
        section: the settings of the compression.

    Attributes:
        reducer: the compressed averaging itself.
    """

    def __init__(self, engine: Any, store: GradientStore, section: Section) -> None:
        steps = (engine._config.scheduler_params or {}).get("total_num_steps")
        self._engine, self._store = engine, store
        # of all parameters, since wrappers are in front of frozen ones, too
        depth = wrappers_in_front(name for name, _ in engine.module.named_parameters())
        device = store.device
        whole = [
            ParamInfo(own_name(name, depth), shape(p), store.dtype(p), device)
            for name, p in store.named
        ]
        self._everyone, topology = Group(engine.seq_data_parallel_group), section.topology
        size = node_size(topology, self._everyone, device)
        self._levels = Levels(self._everyone, size, topology.shard_scope, whole, device)
        self.reducer = Reducer(
            self._levels.slots,
            section.make_compressor(),
            self._levels.group,
            intra_node=self._levels.intra_node,
            **section.reducer_options(steps if isinstance(steps, int) else None),
        )
        self._divergence = DivergenceCheck(
            section.check_every, section.on_divergence, f"{SECTION}."
        )
        store.check_replicas(section.on_divergence)
        self.reducer.further_settings = lambda in_the_node: {
            "param_groups": options_of(engine.optimizer.param_groups),
            **self._divergence.describe(),
        }
        self._skipped = SkippedSteps(
            "a gradient (with the error memory) was not finite, or too large for the wire",
            section.max_vetoes,
            "error memory and bases start anew by"
            " lowrank_comm.integrations.deepspeed.get(engine).reducer.reset() on all ranks",
        )
        # of the pass whose step has not been taken yet
        self._outcome: Outcome | None = None
        self._stepping = self._accumulating = self._warned_drop = False
        store.install(self._end_of_backward, self._reduce)
        wrap_method(engine, "_take_model_step", self._step)
        for owner in (engine, engine.optimizer):
            if hasattr(owner, "zero_grad"):
                wrap_method(owner, "zero_grad", self._zero_grad)
        wrap_method(engine, "save_checkpoint", self._save_checkpoint)
        checkpoints.observe_load(engine, self._loaded)

    # ---------------------------------------------------------------- what it tells

    @property
    def plan(self) -> Plan:
        """The plan: which matrices are compressed, and the bytes and memory of it."""
        stage = int(self._engine.zero_optimization_stage())
        notes = ["one pass for each optimizer step, at every stage", *self._levels.notes()]
        wire = self._engine._config.communication_data_type
        if wire is not None:
            notes.append(
                f"communication_data_type={wire} has no effect: {SECTION}.wire_dtype says how"
                " gradients are sent"
            )
        if stage == 0 and self._engine.fp16_enabled():
            notes.append(
                f"fp16 at stage 0: DeepSpeed {TESTED} divides gradients by a loss scale that"
                " it has not multiplied them by, with or without compression; use ZeRO stage 1"
            )
        plan = self.reducer.plan_with(self._levels.rows, CHECKPOINTS)
        wrapper = type(self._engine.optimizer).__name__
        engine = f"DeepSpeed {deepspeed.__version__}, ZeRO stage {stage} ({wrapper})"
        return replace(plan, engine=engine, notes=(*notes, *hint_of_two_levels(plan)))

    @property
    def last_report(self) -> StepReport | None:
        """The last step's bytes by kind, captured energy, error norm, restarts, times;
        None before the first.
        """
        return self.reducer.last_report

    @property
    def ledger(self) -> Ledger:
        """Bytes that this rank has handed to collectives, by kind, over the run."""
        return self.reducer.ledger

    def error_memory(self) -> dict[str, Tensor]:
        """Return parameter name -> this rank's error, a live view; dense parameters are
        absent.

        In the parameter's full shape. With two levels it is this rank's block of rows
        of its node's error: ceil(m / F) rows, fewer or none on the last ranks of a
        node.
        """
        return {
            slot.name: shaped["error"]
            for slot, _, shaped in self.reducer.state.blocks()
            if "error" in shaped
        }

    # ---------------------------------------------------------------- a step

    def _end_of_backward(self, bucket_size: int | None = None) -> None:
        """Take the place of `engine.allreduce_gradients`: collect the gradients, and
        reduce them at the accumulation boundary.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._store.collect(boundary)
        self._accumulating = not boundary
        if boundary:
            self._reduce()

    def _reduce(self, *_: Any) -> None:
        """Average all gradients and hand them to DeepSpeed."""
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
        gradients, scale = self._store.gradients(), self._store.loss_scale
        if self._divergence.is_due:
            self.reducer.ensure_agreed()
            self._divergence.run(self.reducer, self._store.replicas())
        refused = self._store.refused
        self._outcome = outcome = self._levels.reduce(self.reducer, gradients, scale, refused)
        with torch.no_grad():
            self._store.hand_over(outcome.grads)
        self._skipped.enter(
            self.reducer.step,
            outcome.applied,
            outcome.grads,
            self.reducer.workers,
            outcome.unsound,
            scale,
        )

    def _step(self, take_model_step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Wrap `engine._take_model_step`: then commit the pass or roll it back."""
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            raise UnsupportedError(
                "lowrank_comm: engine.step() reached an accumulation boundary, but no backward"
                " did: the gradients are not reduced. Call engine.backward(loss) on what the"
                " engine's forward returned, outside engine.no_sync(), before the step."
            )
        self._divergence.steps += 1
        self._stepping = True
        try:
            with self._store.step(outcome.applied):
                take_model_step(*args, **kwargs)
        finally:
            # also where something failed after the parameters had their step, such as a
            # learning rate scheduler
            self._stepping = False
            if outcome.applied and self._engine._step_applied:
                self.reducer.commit()
            else:
                self.reducer.rollback()
        if self._engine._step_applied and not outcome.applied:
            raise LowRankCommError(
                f"lowrank_comm: DeepSpeed {deepspeed.__version__} applied a step whose"
                " gradients were NaN; the parameters are lost. Resume from the last"
                " checkpoint, and report the configuration."
            )

    def _zero_grad(self, zero_grad: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Wrap `zero_grad`: outside of a step, also drop the pass that waits."""
        zero_grad(*args, **kwargs)
        if not self._stepping:
            self._drop()

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
        self._store.drop()

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap `engine.save_checkpoint`: save the reducer's state first."""
        if self._outcome is not None:
            raise LowRankCommError(
                "lowrank_comm: save_checkpoint between backward and step; call engine.step() first."
            )
        return checkpoints.save(self._engine, self.reducer, save, *args, **kwargs)

    def _loaded(self, path: Path | None, name: str | None) -> None:
        """Restore the reducer's state after `engine.load_checkpoint`, where the
        optimizer's was restored.
        """
        self._drop()
        if path is not None:
            checkpoints.restore(self.reducer, self._everyone, path, name)
