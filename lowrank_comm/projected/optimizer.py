"""Data-parallel optimizers whose state lives in the projected space: what a step does,
for any rule of the update.

A 2-D parameter W (m x n) has an orthonormal P (s x r) on one of its sides; l is the
length of the other. Worker i has a gradient g_i:

    refresh (t mod tau == 0)
        P_old -> P_new, as `compressors.galore` and `compressors.golore` define it; what
        the state keeps in coordinates of P_old is carried over by T = P_old^T P_new
    R = mean of g_i P
        l r numbers are sent; the whole g_i at GaLore's refreshes only
    direction = rule(R)
        with state of size l x r
    W <- W - lr scale direction P^T - lr weight_decay W

Every worker does the same with the same numbers, so that parameters stay equal and
state dicts fit any number of workers. A parameter is not projected if it has not two
dimensions, if r >= min(m, n), or if its group has `rank=None`: its gradient is averaged
as it is, in the same collective, and updated by the same rule without P. There is no
error memory: it would be of the size of the gradient, which is what this method saves;
what is orthogonal to P is lost until the next refresh. A refresh that falls on a step
in which no worker has a gradient for a parameter is made with its next gradient.

`p.grad` is this worker's own gradient, accumulated by any number of backward passes,
and `step()` does not replace it by the average. Hence `clip_grad_norm_` before `step()`
would clip each worker's gradient by itself; `max_grad_norm` clips the average. If some
worker's numbers are not finite, no worker steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.checkpointing.state_dict import check_groups
from lowrank_comm.checkpointing.tag import refused_together
from lowrank_comm.communication import Ledger
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import ConfigError, LowRankCommError, StateMismatchError
from lowrank_comm.numerics.linalg import unsound
from lowrank_comm.optimizer.backward_hooks import BackwardWatch, runs_last
from lowrank_comm.optimizer.double_averaging import DoubleAveragingGuard
from lowrank_comm.optimizer.environment import refuse_with_deepspeed, warn_user
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.parameter_names import Namer, keeping_names
from lowrank_comm.optimizer.step import run_step
from lowrank_comm.optimizer.wrapper import refuse_meta
from lowrank_comm.options import PositiveInt, check
from lowrank_comm.projected.averaging import Averaged, Averaging, Entry
from lowrank_comm.projected.checks import (
    AboveZero,
    NonNegative,
    check_number,
    check_parameter,
    check_saved,
    describe,
)
from lowrank_comm.projected.projection import Projection, rank_of
from lowrank_comm.projected.update import (
    UpdateRule,
    clip_factor,
    initial_state,
    last_refresh,
    update,
)
from lowrank_comm.reduction.gradients import refuse, unusable_of
from lowrank_comm.reduction.skipped_steps import SkippedSteps, unsound_gradients


class SharedOptions(TypedDict, total=False):
    """Keywords of all projected optimizers. `ProjectedOptimizer` has their defaults;
    `ProjectedAdamW` describes them.
    """

    projection: Literal["galore", "golore"]
    galore_until: int
    side: Literal["short", "long"]
    max_grad_norm: float | None
    free_gradients: bool
    process_group: Any
    wire_dtype: str | None
    named_parameters: Iterable[tuple[str, Tensor]] | None
    seed: int


class ProjectedOptimizer(Optimizer):
    """A data-parallel optimizer with state in the projected space; see the module's
    text, and `ProjectedAdamW` for the other arguments.

    Args:
        params: parameters, pairs with names, or groups.
        rule: of the update.
        restart_every: tau in steps.
        defaults: of the groups.
    """

    # GradScaler must call step() on every worker; see `grad_scaler`
    _step_supports_amp_scaling = True
    __signature__: ClassVar[inspect.Signature]

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule,
        restart_every: int,
        defaults: dict[str, Any],
        *,
        projection: Literal["galore", "golore"] = "galore",
        galore_until: int = 0,
        side: Literal["short", "long"] = "short",
        max_grad_norm: float | None = None,
        free_gradients: bool = False,
        process_group: Any = None,
        wire_dtype: str | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        error = ConfigError(
            f"{owner} averages gradients itself and cannot go with --deepspeed, which does so too;"
            " leave one out."
        )
        refuse_with_deepspeed(self, error)
        self._projection = Projection(owner, projection, restart_every, galore_until, side, seed)
        if max_grad_norm is not None:
            check_number(f"{owner}: max_grad_norm", max_grad_norm, AboveZero)
        check(f"{owner}: free_gradients", free_gradients, bool)
        self.rule = rule
        self.max_grad_norm = max_grad_norm
        self.free_gradients = free_gradients
        self._averaging = Averaging(self._projection, process_group, wire_dtype)
        self._namer = Namer(named_parameters)
        self._double_averaging = DoubleAveragingGuard(
            f", and compression would save nothing. Give {owner} the parameters of the plain model,"
            " and do not wrap it in DistributedDataParallel: the workers need no other averaging."
        )
        self._scaling = LossScaling(id(self))
        # parameter -> this worker's R, where gradients are freed
        self._coordinates: dict[Tensor, Tensor] = {}
        self._compared = self._checked = False
        self._skipped = SkippedSteps("a gradient was not finite, or too large for the wire")
        self._watch: BackwardWatch | None = None
        super().__init__(params, defaults)
        self._watch = BackwardWatch(self._parameters, self._gradient_is_there)

    def __init_subclass__(cls) -> None:
        """Name the shared keywords in the signature that `help` shows."""
        super().__init_subclass__()
        shared = inspect.signature(ProjectedOptimizer.__init__).parameters
        own = inspect.signature(cls.__init__).parameters
        parameters = [p for p in list(own.values())[1:] if p.kind is not p.VAR_KEYWORD]
        parameters += [shared[key] for key in SharedOptions.__annotations__]
        cls.__signature__ = inspect.Signature(parameters)

    def settings(self) -> dict[str, Any]:
        """Return what must be equal on all workers beside groups and parameters."""
        compressor = self._projection.compressor.describe()
        return {
            **{key: value for key, value in compressor.items() if key != "rank"},
            "optimizer": type(self).__name__,
            "seed": self._projection.seed,
            "wire_dtype": self._averaging.wire_name,
            "max_grad_norm": self.max_grad_norm,
            **vars(self.rule),
        }

    # ---------------------------------------------------------------- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters take part from the next step on, on all workers.
        See torch's method.
        """
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "non-leaf" not in str(error):
                raise
            raise ConfigError(
                f"{type(self).__name__}: a parameter is computed from other tensors ({error}), so"
                " no gradient of its own can be averaged. Give the optimizer the tensors that it"
                " is computed from."
            ) from None
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for parameter in group["params"]:
                check_parameter(type(self).__name__, parameter)
        except LowRankCommError:
            self.param_groups.pop()
            raise
        group.setdefault("t", self.t)
        self._averaging.workers.agreed = False
        if self._watch is not None:
            self._watch.add(group["params"])

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        if group["rank"] is not None:
            check(f"{owner}: rank", group["rank"], PositiveInt)
        for key, hint in {
            "lr": NonNegative,
            "weight_decay": NonNegative,
            "scale": AboveZero,
        }.items():
            check_number(f"{owner}: {key}", group[key], hint)
        self.rule.check_group(group)

    @property
    def t(self) -> int:
        """Number of steps made so far, which is t of the next one. It is kept in the
        parameter groups, since every way of saving an optimizer keeps those.
        """
        return max((int(group["t"]) for group in self.param_groups if "t" in group), default=0)

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _entries(self) -> list[Entry]:
        """Return an entry for each trainable parameter, in order."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        named = self._namer.name_all(self.param_groups)
        names = [name for name, _ in named]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise ConfigError(f"two parameters are called {twice!r}; give each its own name.")
        return [
            self._entry(name, parameter, group)
            for (name, parameter), group in zip(named, groups, strict=True)
            if parameter.requires_grad
        ]

    def _entry(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Entry:
        state = self.state.get(parameter, {})
        rank, coordinates = rank_of(parameter, group), self._coordinates.get(parameter)
        basis, refreshed_at = state.get("projector"), last_refresh(state)
        return Entry(name, parameter, group, rank, basis, coordinates, refreshed_at)

    @property
    def ledger(self) -> Ledger:
        """Bytes that this worker has handed to collectives, by kind, over all steps."""
        return self._averaging.ledger

    @property
    def workers(self) -> Workers:
        """The ranks that train together."""
        return self._averaging.workers

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        numbers were not finite.
        """
        return self._skipped.in_a_row > 0

    def state_bytes(self) -> int:
        """Return the bytes of the optimizer's state on this worker: moments and
        projectors.
        """
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    # ---------------------------------------------------------------- a step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, also those that are kept as coordinates only."""
        self._coordinates.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Average, and update the parameters. A collective, to be called by every
        worker.

        Args:
            closure: computes the loss and the gradients; it runs first.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigMismatchError: at the first step, and the first after a load, on every
                worker, if they differ.
            LowRankCommError: at the first step, on every worker, if an engine has
                averaged the gradients already.
        """
        return run_step(
            self,
            closure,
            self._scaling,
            initialise=self._initialise,
            average=self._average,
            update=self._update,
        )

    def _initialise(self) -> None:
        """Make the state of all parameters without a step; no communication."""
        for entry in self._entries():
            if not self.state[entry.parameter]:
                self.state[entry.parameter] = initial_state(entry, self.rule, self._projection)

    def _average(self) -> list[tuple[Entry, Averaged | None]] | None:
        """Average the gradients over the workers; return None if the step is vetoed."""
        entries = self._entries()
        if not entries:
            return []
        self._check(entries)
        if self._coordinates and hasattr(self, "found_inf"):
            raise ConfigError(
                f"{type(self).__name__}: free_gradients=True cannot go with a GradScaler, which"
                " looks at gradients that are gone by then; train in bfloat16, or leave"
                " free_gradients out."
            )
        bad_gradients = unusable_of((e.name, e.parameter) for e in entries)
        if bad_gradients:
            entries = [replace(entry, unusable=entry.name in bad_gradients) for entry in entries]
        for entry in entries:
            # freed in one backward pass, and left whole in another of the same step
            there = entry.coordinates is not None and entry.parameter.grad is not None
            if there and entry.basis is not None and not entry.unusable:
                self._free(entry.parameter, entry.basis)
        averaged = self._averaging.average(entries, self.t)
        self._coordinates.clear()
        applied = averaged is not None
        if not applied:
            refuse(self._averaging.workers, bad_gradients.values())
        bad = ""
        if not applied:
            named = [(e.name, e.parameter) for e in entries]
            bad = unsound_gradients(named, self._held(entries))
        self._skipped.enter(self.t, applied, averaged or (), self._averaging.workers, bad)
        if averaged is None:
            return None
        return list(zip(entries, averaged, strict=True))

    def _check(self, entries: list[Entry]) -> None:
        """Compare parameters, state and settings with the other workers, before any
        collective whose sizes depend on them.
        """
        workers = self._averaging.workers
        workers.device = entries[0].parameter.device
        if not workers.agreed:
            refuse_meta((entry.name, entry.parameter) for entry in entries)
            state = None if self._compared else self.state
            description = describe(self.settings(), self.param_groups, entries, state)
            self.ledger.bytes["fingerprint"] += workers.agree(description)
            self._compared = True
        if not self._checked:
            self._checked = True
            gradients = [entry.parameter.grad for entry in entries]
            sent = self._double_averaging.check(gradients, workers)
            self.ledger.bytes["fingerprint"] += sent
            if not self.free_gradients and self._watch is not None:
                self._watch.remove()

    def _update(self, averaged: list[tuple[Entry, Averaged | None]]) -> None:
        """Update the parameters, clipped together, and count the step."""
        if not averaged:
            return
        there = [(entry, one) for entry, one in averaged if one is not None]
        clip, t = None, self.t
        if self.max_grad_norm is not None and there:
            gradients = [one.gradient for _, one in there]
            clip = clip_factor(gradients, self.max_grad_norm, self._averaging.workers.device)
        for entry, one in there:
            state = self.state[entry.parameter]
            update(entry, one, state, self.rule, self._projection, t, clip)
        for group in self.param_groups:
            group["t"] = t + 1

    def _gradient_is_there(self, parameter: Tensor) -> None:
        """Add a gradient that has arrived in a backward pass to R, and free it, where
        that is asked for and the step has no refresh.
        """
        self._double_averaging.gradient()
        state = self.state.get(parameter, {})
        projector = state.get("projector")
        if self.free_gradients and self._watch is not None and not runs_last(parameter):
            # a user's hook that was placed since is yet to see, or change, the gradient
            self._watch.move_to_the_end(parameter)
            return
        # the first step looks at whole gradients, see `_check`
        if not self.free_gradients or not self._checked or projector is None:
            return
        if self._projection.refreshes(last_refresh(state), self.t) or parameter.grad is None:
            return
        self._free(parameter, projector)

    @torch.no_grad()
    def _free(self, parameter: Tensor, projector: Tensor) -> None:
        """Add a gradient to R, and drop it."""
        assert parameter.grad is not None
        r = self._projection.project(parameter.grad.to(projector.dtype), projector)
        before = self._coordinates.get(parameter)
        self._coordinates[parameter] = r if before is None else before.add_(r)
        parameter.grad = None

    # ---------------------------------------------------------------- state

    def _held(self, entries: Iterable[Entry]) -> dict[str, Tensor]:
        """Return all numbers of the state, by what they are called in messages."""
        return {
            f"{symbol} of {e.name}": tensor
            for e in entries
            for symbol, tensor in self.state.get(e.parameter, {}).items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's optimizers do; never communicates.

        Raises:
            StateMismatchError: the state is not finite, in a run of one worker. Of
                several, one that raised would leave the others waiting: it warns, and
                `checkpoint.save_all` is what raises on all.
        """
        bad = unsound(self._held(self._entries()).items(), torch.finfo(torch.float64).max)
        if bad and self._averaging.workers.world_size == 1:
            raise StateMismatchError(
                f"state_dict(): {bad}: no run would load it. Resume from an earlier checkpoint."
            )
        if bad:
            warn_user(f"state_dict(): {bad}; no run will load it. Resume from an earlier one.")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` gave, at any number of workers; a collective. All
        workers must load the same. Parameters are matched by their order, as torch
        does, and keep the names that they have here.

        Raises:
            StateMismatchError: on every worker, if that of some worker is of another
                optimizer, or of other ranks or sides of the basis, is not finite or
                damaged; then nothing is changed.
        """
        workers = self._averaging.workers
        workers.device = self._parameters[0].device
        with refused_together(workers, "the state dict"):
            check_groups(state_dict, self.param_groups)
            check_saved(
                type(self).__name__,
                state_dict,
                self.param_groups,
                {"t", *self.defaults},
                self._projection,
            )
        super().load_state_dict(keeping_names(state_dict, self.param_groups))
        # torch has cast the state of a bfloat16 parameter to bfloat16: moments and
        # bases must be as they were saved
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, self._parameters, strict=True):
            for symbol, value in state_dict["state"].get(key, {}).items():
                device = parameter.device if value.dim() else "cpu"
                self.state[parameter][symbol] = value.detach().to(device=device, copy=True)
        self._coordinates.clear()
        self._averaging.workers.agreed = self._compared = False
