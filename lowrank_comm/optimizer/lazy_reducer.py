"""The part of an optimizer that holds a reducer: which parameters it has, their names,
its state, reports and state dicts.

`optimizer` has the order of a step; this file has what a step works on, and how it is
saved.

State dicts: `state_dict()` is the base's, with the compressor's state added inside
`state[parameter]` (keys starting with "lowrank_comm_"; torch.distributed.checkpoint
keeps these and drops unknown top-level keys) and a readable tag at the top. It never
communicates and never raises; see `checkpoint` for what "own" and "mean" are.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_comm.checkpointing import file as checkpoint
from lowrank_comm.checkpointing import state_dict as state_dicts
from lowrank_comm.checkpointing.state_dict import refuse_other_kind
from lowrank_comm.checkpointing.tag import NOBODY
from lowrank_comm.communication import Ledger
from lowrank_comm.communication.agreement import fingerprint
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.optimizer.backward_reduction import BucketScheduler
from lowrank_comm.optimizer.engine import Engine, hint_of_two_levels
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.optimizer.wrapper import OptimizerWrapper
from lowrank_comm.reduction.plan import Plan
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.report import StepReport

_log = logging.getLogger("lowrank_comm")


class LazyReducer(OptimizerWrapper):
    """An optimizer around `base` whose gradients go through a reducer.

    Args:
        base: the optimizer that steps.
        compressor: the scheme.
        engine: what runs the model.
        namer: finds the names of the parameters.
        options: of the reducer.
        bucket_bytes: of the reducer; None without overlap.
    """

    def __init__(
        self,
        base: Optimizer,
        compressor: Compressor,
        engine: Engine,
        namer: Namer,
        options: dict[str, Any],
        bucket_bytes: int | None,
    ) -> None:
        super().__init__(base)
        self.compressor, self._engine, self._namer = compressor, engine, namer
        self._options, self._bucket_bytes = options, bucket_bytes
        self._model: weakref.ref[nn.Module] | None = None
        self._by_name: dict[str, Tensor] = {}
        self._reducer: Reducer | None = None
        self._scheduler: BucketScheduler | None = None
        # of the gradients: None as they came, "averaged", or "vetoed"
        self._status: str | None = None
        self._warned_own = False
        # Gathered for a state dict, with the consolidation that it is of.
        self._whole_state: tuple[object, dict[str, dict[str, Tensor]]] | None = None
        # bad values fail here
        empty = Reducer(
            [],
            compressor,
            engine.group,
            **{**options, "initial_basis": None},
            bucket_bytes=bucket_bytes,
        )
        # for messages
        self._memory = empty.assignment.error_feedback.memory

    @abstractmethod
    def _watch_backward(self) -> None:
        """Notice the gradients of all parameters, those that were added too."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What must be equal on all workers beside the reducer's own settings and the
        parameters' values.
        """

    @property
    def reducer(self) -> Reducer:
        """The reducer of the present trainable parameters; made at the first step, or
        when it is first asked for.
        """
        return self._prepared()

    def _prepared(self) -> Reducer:
        """Build the reducer, or build it anew with the state so far when parameters
        were added or unfrozen.
        """
        self._by_name = {}
        named = self._namer.name_all(self.param_groups)
        for name, parameter in named:
            if name in self._by_name and self._by_name[name] is not parameter:
                raise ConfigError(f"two parameters are called {name!r}; give each its own name.")
            self._by_name[name] = parameter
        known = {slot.name for slot in self._reducer.slots} if self._reducer else set()
        if not known <= self._by_name.keys():
            raise StateMismatchError(
                f"parameter {min(known - self._by_name.keys())!r} is no longer known by this name;"
                " call attach(model) before the first step, or build the base from"
                " named_parameters()."
            )
        if self._reducer is not None and all(
            name in known or not p.requires_grad for name, p in named
        ):
            return self._reducer
        taking_part = [(name, p) for name, p in named if p.requires_grad or name in known]
        self._refuse_added(taking_part)
        slots = self._engine.slots(taking_part)
        engine = self._engine
        options = {
            **self._options,
            "intra_node": engine.intra_node,
            "bucket_bytes": self._bucket_bytes,
        }
        fresh = Reducer(slots, self.compressor, engine.group, **options)
        fresh.further_settings = self._further_settings
        self._watch_backward()
        if self._reducer is not None:
            fresh.take_over(self._reducer)
        self._reducer, self._scheduler = fresh, None
        return fresh

    @property
    def _parameters(self) -> list[Tensor]:
        """In slot order, of the reducer as it was last prepared."""
        assert self._reducer is not None
        return [self._by_name[slot.name] for slot in self._reducer.slots]

    def _prepared_parameters(self) -> list[Tensor]:
        self._prepared()
        return self._parameters

    def _check_parameters(self, model: nn.Module, wrapper: str | None) -> None:
        """ConfigError where the optimizer was built from another model, or before the
        model's parameters were replaced.
        """
        held = {id(p) for p in model.parameters()}
        everything = [p for group in self.param_groups for p in group["params"]]
        foreign = [p for p in everything if id(p) not in held]
        if len(foreign) == len(everything) or (wrapper is not None and foreign):
            of_them = "none" if len(foreign) == len(everything) else f"all but {len(foreign)}"
            raise ConfigError(
                f"attach: the optimizer holds {of_them} of this model's parameters: of"
                f" {len(everything)} parameters of the optimizer {len(foreign)} are not the"
                " model's. Build it from this model, after fully_shard and the like, which replace"
                " the parameters."
            )
        holds = {id(p) for p in everything}
        left_out = [
            name for name, p in model.named_parameters() if p.requires_grad and id(p) not in holds
        ]
        if wrapper is not None and left_out:
            raise ConfigError(
                f"attach: the model has {len(left_out)} trainable parameters that the optimizer"
                f" does not hold (the first: {left_out[0]}), and nobody would average their"
                " gradients any more. Give them to this optimizer, as a parameter group of its own"
                " if they need other settings, or freeze them."
            )

    def _refuse_added(self, taking_part: Sequence[tuple[str, Tensor]]) -> None:
        """ConfigError for a parameter that the engine which the model is attached to
        has never seen.
        """
        model = self._model() if self._model is not None else None
        if model is None or type(self._engine) is Engine:
            return
        held = {id(p) for p in model.parameters()}
        added = [name for name, p in taking_part if id(p) not in held]
        if added:
            raise ConfigError(
                f"parameter {added[0]!r} was added to the optimizer after attach, and is not one of"
                f" the attached model, so {self._engine.name} knows nothing of it. Add it to the"
                " model before it is wrapped, and attach then."
            )

    def _further_settings(self, in_the_node: bool) -> dict[str, Any]:
        """What must be equal on all workers, or on all ranks of a node, beside the
        reducer's own settings.
        """
        settings = {
            **self._settings(),
            "optimizer": type(self.base).__name__,
            "engine": self._engine.name,
        }
        # Later, unlike processors may have rounded the values apart by a last bit.
        # blocks differ
        comparable = self._engine.compares_values and not (
            in_the_node and not self._engine.saves_whole
        )
        if comparable and not self.reducer.state.has_passed:
            values = fingerprint([self._engine.local(p) for p in self._parameters])
            settings[
                "values of the parameters (seed all workers alike, or broadcast the parameters from"
                " rank 0)"
            ] = values
        return settings

    def error_memory(self) -> dict[str, Tensor]:
        """This worker's error memory, e_i = Delta_i - sent_i of the last step.

        Returns:
            Parameter name -> error in the parameter's shape and in gradient units,
            without the loss scale; live views, until parameters are added. What keeps
            no error is absent: what goes dense, and all of it unless the form of error
            feedback is "ef14".
        """
        return {
            slot.name: self._engine.error_view(slot, self._by_name[slot.name], shaped["error"])
            for slot, _, shaped in self.reducer.state.blocks()
            if "error" in shaped
        }

    @property
    def last_report(self) -> StepReport | None:
        """Bytes, captured energy, error norm, restarts and times of the last step; None
        before the first.
        """
        return self._reducer.last_report if self._reducer else None

    @property
    def ledger(self) -> Ledger:
        """Totals of bytes and steps."""
        return self.reducer.ledger

    @property
    def plan(self) -> Plan:
        """What was found, what goes low-rank, bytes a step, memory."""
        plan = self.reducer.plan
        hint = hint_of_two_levels(plan)
        return replace(
            plan, engine=self._engine.name, notes=(*plan.notes, *self._engine.notes(), *hint)
        )

    # ---------------------------------------------------------------- state

    def consolidate_error_memory(self) -> None:
        """Every worker's error becomes the mean of all; a collective. Call it on all
        ranks before `state_dict()`.

        Training goes on as it would have: linear compressors use the mean error only.
        It sends the error memory once, as many bytes as the gradients of all compressed
        matrices. Where ranks hold blocks of whole parameters (two levels, but not
        FSDP2), each keeps a copy of the whole error memory on the CPU for the state
        dict, until the next is made.
        """
        self.reducer.consolidate_error_memory()
        if self._holds_blocks:
            self._whole_state = (
                self.reducer.state.consolidation,
                checkpoint.whole_tensors_of(self.reducer),
            )

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state dict with the compressor's state (see `state_dicts`); never
        communicates, never raises.

        Returns:
            The state dict. It holds the mean error memory, fit for any worker, if
            `consolidate_error_memory()` was called since the last step; else this
            worker's own, and that is warned about once.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = self.base.state_dict()
        if self._reducer is not None:
            tag = checkpoint.tag_of(self._reducer)
            whole = self._gathered()
            # consolidated, but not gathered
            if self._holds_blocks and whole is None and tag.step > 0:
                tag = replace(tag, kind="own")
            if tag.kind == "own" and not self._engine.saves_whole:
                # Sharded checkpoints keep one node's DTensors and one rank's tag: then
                # nobody is to take them for its own.
                tag = replace(tag, rank=NOBODY)
            if tag.kind == "own" and tag.step > 0 and not self._warned_own:
                self._warned_own = True
                warnings.warn(
                    f"state_dict() holds {tag.whose} own {self._memory} only. Call"
                    " consolidate_error_memory() on all ranks before saving; then it fits every"
                    " worker, at any world size.",
                    stacklevel=2,
                )
            tensors = self._engine.saved(self._reducer, whole)
            state_dicts.add(
                result, self._reducer, tensors, tag, self._numbered(result["param_groups"])
            )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base and the compressor.

        Args:
            state_dict: from `state_dict()`, at any world size if it holds the mean; a
                plain optimizer's is accepted too, with a warning that the error memory
                starts from zero.

        Raises:
            StateMismatchError: it holds another worker's own error memory, or error
                memory would be lost.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        refuse_other_kind(state_dict)
        # Names only where they are needed: Accelerate loads an empty state before it
        # has wrapped the model that has them.
        numbered = self._numbered(state_dict["param_groups"]) if state_dict["state"] else []
        plain, tag, tensors = state_dicts.split(state_dict, numbered)
        if tag is not None:
            # before anything is touched
            checkpoint.check_fits(self.reducer, tag, tensors)
        self.base.load_state_dict(plain)
        self._status = None
        if tag is not None:
            checkpoint.restore(self.reducer, tag, tensors)
            # what was given is whole, and right until the next step
            if self._holds_blocks:
                self._whole_state = (
                    (self.reducer.state.consolidation, copy.deepcopy(tensors))
                    if tag.kind == "mean"
                    else None
                )
        else:
            if state_dict["state"] or (self._reducer is not None and self._reducer.step > 0):
                _log.warning(
                    "the state dict holds no compressor state: the %s starts from zero",
                    self._memory,
                )
            if self._reducer is not None:
                self._reducer.reset()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _gathered(self) -> dict[str, dict[str, Tensor]] | None:
        """The state of whole parameters, if it was gathered at the last consolidation
        and no step was made since.
        """
        reducer = self._reducer
        if reducer is None or self._whole_state is None or not reducer.state.consolidated:
            return None
        of, tensors = self._whole_state
        return tensors if of is reducer.state.consolidation else None

    @property
    def _holds_blocks(self) -> bool:
        """Whether this rank's state is of blocks of parameters, and a state dict's is
        to be of whole ones.
        """
        return self._engine.intra_node.size > 1 and self._engine.saves_whole

    def _numbered(self, saved_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
        """(parameter name, key in the state dict) for all parameters, by their order in
        the groups.
        """
        keys = [key for group in saved_groups for key in group["params"]]
        names = [name for name, _ in self._namer.name_all(self.param_groups)]
        # the base complains about another number of parameters
        return list(zip(names, keys, strict=False))
