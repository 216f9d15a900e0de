"""Builds the reducer of an optimizer's parameters when it is first needed, and again,
with the state so far, when parameters are added or unfrozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.optimizer.attachment import Attachment
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.reduction.reducer import Reducer


class LazyReducer:
    """The reducer of the trainable parameters of a base optimizer.

    Args:
        base: its groups hold the parameters.
        make: makes a reducer of slots, given also a group and `intra_node`.
        attachment: knows the engine, which says what this rank holds of a parameter.
        namer: finds the names of the parameters.
        settings: `further_settings` of the reducer.
        on_rebuild: called when the reducer is built, for parameters that are new.
        on_first: called with a reducer that has no state to go on with.

    Attributes:
        made: the reducer as it was built last; None before that, and after a new engine
            was attached.
        parameters: those of `made`, in slot order, as they were last prepared.
        named: all parameters of the groups by name, then.
        memory: what the error memory is called in messages.

    Raises:
        ConfigError: a bad option.
    """

    def __init__(
        self,
        base: Optimizer,
        make: Callable[..., Reducer],
        attachment: Attachment,
        namer: Namer,
        settings: Callable[[bool], dict[str, Any]],
        on_rebuild: Callable[[], None],
        on_first: Callable[[Reducer], None],
    ) -> None:
        self._base, self._make, self._attachment = base, make, attachment
        self._namer, self._settings = namer, settings
        self._on_rebuild, self._on_first = on_rebuild, on_first
        self.made: Reducer | None = None
        self.parameters: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        # ids in all groups when the reducer was last prepared; since groups and
        # parameters are held, nothing else can have them
        self._seen: list[tuple[int, int, bool]] = []
        self._groups: list[dict[str, Any]] = []
        self._outdated = False
        # bad values fail here
        empty = make([], group=attachment.engine.group, initial_basis=None)
        self.memory = empty.assignment.error_feedback.memory

    def prepare(self) -> Reducer:
        """Return the reducer of the present trainable parameters; while a pass is
        pending, the one that has made it.

        Raises:
            ConfigError: two parameters have one name, or an added one cannot take part.
            StateMismatchError: a parameter has lost the name that its state is kept by.
        """
        if self.made is not None and self.made.pending:
            return self.made
        groups = self._base.param_groups
        seen = [(id(group), id(p), p.requires_grad) for group in groups for p in group["params"]]
        if self.made is None or seen != self._seen:
            named = self._named()
            self.made = self._made_of(named)
            self.parameters = [named[slot.name] for slot in self.made.slots]
            self.named, self._seen, self._groups = named, seen, list(groups)
        return self.made

    def forget(self) -> None:
        """Build the reducer from scratch when it is needed next."""
        self.made = None

    def rebuild(self) -> None:
        """Build the reducer anew when it is needed next, with the state so far."""
        self._outdated, self._seen = True, []

    def learn(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take over names of parameters."""
        self._namer.learn(named)
        self._seen = []

    def names(self) -> list[str]:
        """Return the names of all parameters, in the order of the groups."""
        return [name for name, _ in self._namer.name_all(self._base.param_groups)]

    def _named(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, parameter in self._namer.name_all(self._base.param_groups):
            if named.setdefault(name, parameter) is not parameter:
                raise ConfigError(f"two parameters are called {name!r}; give each its own name.")
        return named

    def _base_steps(self) -> int | None:
        """Return how many steps the base counts; None where it counts none."""
        counts = [state["step"] for state in self._base.state.values() if "step" in state]
        return max(map(int, counts), default=None)

    def _made_of(self, named: dict[str, Tensor]) -> Reducer:
        """Return the reducer as it is, or a new one with its state if further
        parameters are trainable now. Those that were frozen stay in it.
        """
        old = self.made
        known = {slot.name for slot in old.slots} if old is not None else set()
        if not known <= named.keys():
            raise StateMismatchError(
                f"parameter {min(known - named.keys())!r} is no longer known by this name;"
                " call attach(model) before the first step, or build the base from"
                " named_parameters()."
            )
        engine = self._attachment.engine
        taking_part = [
            (name, p)
            for name, p in named.items()
            if (p.requires_grad or name in known) and id(p) not in engine.kept_local
        ]
        if old is not None and len(taking_part) == len(known) and not self._outdated:
            return old
        self._outdated = False
        self._attachment.check_added(taking_part)
        slots = engine.slots(taking_part)
        reducer = self._make(slots, group=engine.group, intra_node=engine.intra_node)
        reducer.further_settings, reducer.base_steps = self._settings, self._base_steps
        self._on_rebuild()
        if old is not None:
            reducer.take_over(old)
        else:
            self._on_first(reducer)
        return reducer
