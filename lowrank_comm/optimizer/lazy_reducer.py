"""Builds the reducer of an optimizer's parameters when it is first needed, and again,
with the state so far, when parameters are added or unfrozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.communication.agreement import fingerprint
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.optimizer.attachment import Attachment
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.reduction.reducer import Reducer


class LazyReducer:
    """The reducer of the trainable parameters of a base optimizer.

    Args:
        base: its groups hold the parameters.
        compressor: the scheme.
        attachment: knows the engine, which says what this rank holds of a parameter.
        namer: finds the names of the parameters.
        options: of the reducer.
        settings: what must be equal on all workers beside the reducer's own settings
            and the parameters' values.
        on_rebuild: called when the reducer is built, for parameters that are new.

    Attributes:
        made: the reducer as it was built last; None before that, and after a new engine
            was attached.
        parameters: those of `made`, in slot order, as they were last prepared.
        memory: what the error memory is called in messages.

    Raises:
        ConfigError: a bad option.
    """

    def __init__(
        self,
        base: Optimizer,
        compressor: Compressor,
        attachment: Attachment,
        namer: Namer,
        options: dict[str, Any],
        settings: Callable[[], dict[str, Any]],
        on_rebuild: Callable[[], None],
    ) -> None:
        self._base, self._compressor, self._attachment = base, compressor, attachment
        self._namer, self._options = namer, options
        self._settings, self._on_rebuild = settings, on_rebuild
        self.made: Reducer | None = None
        self.parameters: list[Tensor] = []
        # of all groups when the reducer was last prepared; what is held is the same
        # while its id is
        self._seen: list[tuple[int, int, bool]] = []
        self._held: tuple[list[dict[str, Any]], dict[str, Tensor]] = ([], {})
        # bad values fail here
        without = {**options, "initial_basis": None}
        empty = Reducer([], compressor, attachment.engine.group, **without)
        self.memory = empty.assignment.error_feedback.memory

    def prepare(self) -> Reducer:
        """Return the reducer of the present trainable parameters.

        Raises:
            ConfigError: two parameters have one name, or an added one cannot take part.
            StateMismatchError: a parameter has lost the name that its state is kept by.
        """
        groups = self._base.param_groups
        seen = [(id(group), id(p), p.requires_grad) for group in groups for p in group["params"]]
        if self.made is None or seen != self._seen:
            named = self._named()
            by_name = dict(named)
            self.made = self._made_of(named, by_name.keys())
            self.parameters = [by_name[slot.name] for slot in self.made.slots]
            self._seen, self._held = seen, (list(groups), by_name)
        return self.made

    def forget(self) -> None:
        """Build the reducer from scratch when it is needed next."""
        self.made = None

    def learn(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take over names of parameters."""
        self._namer.learn(named)
        self._seen = []

    def names(self) -> list[str]:
        """Return the names of all parameters, in the order of the groups."""
        return [name for name, _ in self._namer.name_all(self._base.param_groups)]

    def _named(self) -> list[tuple[str, Tensor]]:
        named = self._namer.name_all(self._base.param_groups)
        by_name: dict[str, Tensor] = {}
        for name, parameter in named:
            if by_name.setdefault(name, parameter) is not parameter:
                raise ConfigError(f"two parameters are called {name!r}; give each its own name.")
        return named

    def _made_of(self, named: list[tuple[str, Tensor]], names: Set[str]) -> Reducer:
        """The reducer as it is, or a new one with its state if further parameters are
        trainable now. Those that were frozen stay in it.
        """
        old = self.made
        known = {slot.name for slot in old.slots} if old is not None else set()
        if not known <= names:
            raise StateMismatchError(
                f"parameter {min(known - names)!r} is no longer known by this name;"
                " call attach(model) before the first step, or build the base from"
                " named_parameters()."
            )
        taking_part = [(name, p) for name, p in named if p.requires_grad or name in known]
        if old is not None and len(taking_part) == len(known):
            return old
        self._attachment.check_added(taking_part)
        engine = self._attachment.engine
        slots = engine.slots(taking_part)
        reducer = Reducer(
            slots, self._compressor, engine.group, intra_node=engine.intra_node, **self._options
        )
        reducer.further_settings = self._further_settings
        self._on_rebuild()
        if old is not None:
            reducer.take_over(old)
        return reducer

    def _further_settings(self, in_the_node: bool) -> dict[str, Any]:
        """What must be equal on all workers, or on all ranks of a node, beside the
        reducer's own settings.
        """
        engine = self._attachment.engine
        settings = {
            **self._settings(),
            "optimizer": type(self._base).__name__,
            "engine": engine.name,
        }
        # blocks differ
        comparable = engine.compares_values and not (in_the_node and not engine.saves_whole)
        # Later, unlike processors may have rounded the values apart by a last bit.
        if comparable and self.made is not None and self.made.state.last_pass is None:
            values = fingerprint([engine.local(p) for p in self.parameters])
            settings[
                "values of the parameters (seed all workers alike, or broadcast the parameters from"
                " rank 0)"
            ] = values
        return settings
