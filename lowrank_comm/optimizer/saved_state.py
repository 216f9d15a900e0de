"""What an optimizer's state dict holds of the compressor's state, and how it is loaded.

`checkpointing.state_dict` has the format; `checkpointing.file` says what "own" and
"mean" are. Here stand the choices: which of them a state dict holds, and where ranks of
a node hold blocks of parameters, whether the whole was gathered for it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.checkpointing import state_dict as entries
from lowrank_comm.checkpointing.tag import NOBODY, Tag, refused_together, tag_of
from lowrank_comm.checkpointing.tensors import check_fits, restore
from lowrank_comm.checkpointing.whole_tensors import by_name, whole_tensors
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.optimizer.attachment import Attachment
from lowrank_comm.optimizer.environment import warn_user
from lowrank_comm.optimizer.lazy_reducer import LazyReducer
from lowrank_comm.optimizer.parameter_names import keeping_names
from lowrank_comm.optimizer.wrapper import parameters_of
from lowrank_comm.reduction.reducer import Reducer

_log = logging.getLogger("lowrank_comm")


class _Found(NamedTuple):
    """What a state dict holds: the base's, the tag or None, the compressor's tensors by
    parameter name and symbol; and whether they have to wait for a reducer.
    """

    plain: dict[str, Any]
    tag: Tag | None
    tensors: dict[str, dict[str, Tensor]]
    waits: bool


class SavedState:
    """Saves the state of a reducer in its optimizer's state dicts, and restores it.

    Args:
        base: the optimizer that steps.
        lazy: makes the reducer.
        attachment: knows the engine.

    Attributes:
        not_taken_over: why the state that the base had loaded could not be used.

    Raises:
        StateMismatchError: the base has rounded what it had loaded.
    """

    def __init__(self, base: Optimizer, lazy: LazyReducer, attachment: Attachment) -> None:
        self._base, self._lazy, self._attachment = base, lazy, attachment
        self._warned_own = self._warned_not_finite = False
        # what the base has loaded of a compressor's state before it was wrapped, until
        # there is a reducer for it
        self._found = entries.take_from(base)
        if self._found is not None:
            entries.refuse_rounded(self._found, base)
        self.not_taken_over = ""

    @property
    def _holds_blocks(self) -> bool:
        """Whether this rank's state is of blocks of parameters, and a state dict's is
        to be of whole ones.
        """
        engine = self._attachment.engine
        return engine.intra_node.size > 1 and engine.saves_whole

    def consolidate(self, for_all_ranks: bool) -> None:
        """Make the error memory the mean of all workers', and gather whole parameters'
        if a state dict needs it; a collective.

        Args:
            for_all_ranks: whether all ranks are to have that, and not rank 0 alone.
        """
        reducer = self._lazy.prepare()
        reducer.consolidate_error_memory()
        if self._holds_blocks:
            keep = for_all_ranks or reducer.workers.is_writer
            gathered = by_name(whole_tensors(reducer), keep)
            reducer.state.whole = gathered if keep else None

    def save(self) -> dict[str, Any]:
        """Return the base's state dict with the reducer's state; no communication.

        Raises:
            StateMismatchError: the state of the only rank is not finite.
        """
        result = self._base.state_dict()
        reducer, engine = self._lazy.made, self._attachment.engine
        if reducer is None:
            for number, found in (self._found or {"state": {}})["state"].items():
                result["state"][number] = {**found, **result["state"].get(number, {})}
            return result
        whole = reducer.state.whole if reducer.state.consolidated else None
        tag = self._tag(reducer, gathered=whole is not None)
        if tag.kind == "own" and tag.step > 0 and not self._warned_own:
            self._warned_own = True
            warn_user(
                f"state_dict() holds {tag.whose} own {self._lazy.memory} only. Call"
                " consolidate_error_memory() on all ranks before saving; then it fits every"
                " worker, at any world size."
            )
        bad = reducer.state.not_finite()
        if bad and reducer.workers.world_size == 1:
            raise StateMismatchError(
                f"state_dict(): {bad}: no run would load it. Resume from an earlier checkpoint, or"
                " call optimizer.reducer.reset(), which starts it anew."
            )
        # raised here, the others would wait for this rank
        if bad and not self._warned_not_finite:
            self._warned_not_finite = True
            warn_user(f"state_dict(): {bad}; no run will load it. See consolidate_error_memory().")
        numbered = self._numbered(result["param_groups"])
        entries.add(result, reducer, engine.saved(reducer, whole), tag, numbered)
        return result

    def _tag(self, reducer: Reducer, gathered: bool) -> Tag:
        tag = tag_of(reducer)
        # consolidated, but not gathered
        if self._holds_blocks and not gathered and tag.step > 0:
            tag = replace(tag, kind="own")
        # A sharded checkpoint keeps one node's DTensors and one rank's tag: then no
        # rank is to take them for its own.
        if tag.kind == "own" and not self._attachment.engine.saves_whole:
            tag = replace(tag, rank=NOBODY)
        return tag

    def check(self, state_dict: dict[str, Any]) -> _Found:
        """Look at what is to be loaded; a collective that changes nothing.

        Args:
            state_dict: the tensors of the base may be left out of it.

        Raises:
            StateMismatchError: on every worker, if what is saved does not fit on some.
        """
        with refused_together(self.workers(), "the state dict"):
            # Names only where they are needed: Accelerate loads an empty state before
            # it has wrapped the model that has them.
            entries.refuse_other_kind(state_dict)
            entries.check_groups(state_dict, self._base.param_groups)
            numbered = self._numbered(state_dict["param_groups"]) if state_dict["state"] else []
            plain, tag, tensors = entries.split(state_dict, numbered)
            waits = self._lazy.made is None and self._found is not None
            if tag is not None and not waits:
                check_fits(self._lazy.prepare(), tag, tensors)
        return _Found(plain, tag, tensors, waits)

    def load(self, state_dict: dict[str, Any]) -> None:
        """Restore the base and the reducer; a collective.

        Raises:
            StateMismatchError: see `check`; then nothing is changed.
        """
        plain, tag, tensors, waits = self.check(state_dict)
        self._base.load_state_dict(keeping_names(plain, self._base.param_groups))
        self._found, self.not_taken_over = None, ""
        if tag is None:
            self._start_from_zero(is_empty=not state_dict["state"])
        elif waits:
            # Accelerate gives back what it was given before the model is attached
            self._found = entries.of_compressor(state_dict)
        else:
            self._restore(self._lazy.prepare(), tag, tensors)

    def _restore(self, reducer: Reducer, tag: Tag, tensors: Mapping[str, Any]) -> None:
        restore(reducer, tag, tensors)
        # what was given is whole, and right until the next step
        if self._holds_blocks and tag.kind == "mean":
            reducer.state.whole = copy.deepcopy(dict(tensors))

    def take_over(self, reducer: Reducer) -> None:
        """Go on with the state that the base had loaded before it was wrapped, if it
        had; no communication. What does not fit is told at the first step, by all.
        """
        found, self._found = self._found, None
        if found is None:
            return
        try:
            _, tag, tensors = entries.split(found, self._numbered(found["param_groups"]))
            if tag is None:
                return
            self._restore(reducer, tag, tensors)
        except StateMismatchError as error:
            self.not_taken_over = str(error)
            return
        _log.warning(
            "%s had loaded a compressed checkpoint before it was wrapped: its %s goes on from step"
            " %d",
            type(self._base).__name__,
            self._lazy.memory,
            tag.step,
        )

    def check_taken_over(self) -> None:
        """Raise what `take_over` could not say; all workers have compared it."""
        if self.not_taken_over:
            raise StateMismatchError(
                "the base optimizer had loaded a compressed checkpoint before it was wrapped:"
                f" {self.not_taken_over}"
            )

    def workers(self) -> Workers:
        """Return those who load together, also before there is a reducer."""
        if self._lazy.made is not None:
            return self._lazy.made.workers
        engine, parameters = self._attachment.engine, parameters_of(self._base)
        return Workers(engine.group, engine.intra_node, parameters[0].device)

    def _start_from_zero(self, is_empty: bool) -> None:
        reducer = self._lazy.made
        if not is_empty or (reducer is not None and reducer.step > 0):
            _log.warning(
                "the state dict holds no compressor state: the %s starts from zero",
                self._lazy.memory,
            )
        if reducer is not None:
            reducer.reset()

    def _numbered(self, saved_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
        """Return (parameter name, key in the state dict) for all parameters, by their
        order in the groups.
        """
        keys = [key for group in saved_groups for key in group["params"]]
        # the base complains about another number of parameters
        return list(zip(self._lazy.names(), keys, strict=False))
