"""A data-parallel optimizer whose state lives in the projected space: what a step does,
whatever the rule of the update.

A 2-D parameter W (m x n) has an orthonormal P (s x r) on one of its sides; l is the
other. Worker i has a gradient g_i:

    refresh (t mod tau == 0)  P_old -> P_new, by the definitions of `compressors.galore` and `compressors.golore`; what
                              the state keeps in coordinates of P_old is carried over by
                              T = P_old^T P_new
    R = mean of g_i P         l r numbers sent; the whole g_i at GaLore's refreshes only
    direction = rule(R)       with state of size l x r
    W <- W - lr scale direction P^T - lr weight_decay W

Every worker does the same with the same numbers, so that parameters stay equal and
state dicts fit any number of workers. Other parameters (other than two dimensions, r >=
min(m, n), or `rank=None` in their group) are averaged as they are, in the same
collective, and updated by the same rule without P. There is no error memory: it would
be of the size of the gradient, which is what this saves; what is orthogonal to P is
lost until the next refresh. A refresh that falls on a step in which nobody has a
gradient for a parameter comes with its next gradient.

`p.grad` is this worker's own gradient, accumulated by as many backward passes as one
likes, and stays so: nobody needs the averaged one. Hence `clip_grad_norm_` before
`step()` would clip each worker's gradient by itself; `max_grad_norm` clips the average.
If some worker's numbers are not finite, no worker steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.communication import Ledger, check_same
from lowrank_comm.compressors.base import checked_positive_int
from lowrank_comm.compressors.galore import GaLore
from lowrank_comm.compressors.golore import GoLore
from lowrank_comm.errors import ConfigError, LowRankCommError
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.optimizer.double_averaging import DoubleAveragingGuard
from lowrank_comm.optimizer.environment import transformers_uses_deepspeed
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.optimizer.step import StepLog, run_step
from lowrank_comm.projected.averaging import Averaged, Averaging, Entry
from lowrank_comm.projected.checks import check_number, check_parameter, check_saved, described

PROJECTIONS = ("galore", "golore")


class ProjectedOptimizer(Optimizer):
    """Base of the optimizers in the projected space; see the module's text, and
    `ProjectedAdamW` for the arguments.

    Args:
        params: parameters, pairs with names, or groups.
        defaults: of the groups.
    """

    # GradScaler must call step() on every worker; see `loss_scaling`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        restart_every: int,
        projection: str,
        galore_until: int,
        side: str,
        max_grad_norm: float | None,
        free_gradients: bool,
        process_group: Any,
        wire_dtype: str | None,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        seed: int,
    ) -> None:
        owner = type(self).__name__
        if transformers_uses_deepspeed():
            raise ConfigError(
                f"{owner} averages gradients itself and cannot go with --deepspeed, which does so"
                " too; leave one out."
            )
        if projection not in PROJECTIONS:
            known = ", ".join(map(repr, PROJECTIONS))
            raise ConfigError(
                f"{owner}: projection={projection!r} is unknown; choose one of {known}."
            )
        if projection == "galore" and galore_until:
            raise ConfigError(
                f'{owner}: galore_until={galore_until!r} is for projection="golore", whose'
                " refreshes before that step are GaLore's; leave it out, or choose that."
            )
        if max_grad_norm is not None:
            check_number(owner, "max_grad_norm", max_grad_norm, above=0.0)
        if not isinstance(free_gradients, bool):
            raise ConfigError(
                f"{owner}: free_gradients must be True or False, got {free_gradients!r}."
            )
        common: dict[str, Any] = {"restart_every": restart_every, "side": side}
        compressor = (
            GaLore(**common)
            if projection == "galore"
            else GoLore(**common, galore_until=galore_until)
        )
        self._averaging = Averaging(compressor, process_group, seed, wire_dtype)
        self._namer = Namer(named_parameters)
        self.max_grad_norm, self.free_gradients = max_grad_norm, free_gradients
        self._double_averaging = DoubleAveragingGuard(
            f"Give {owner} the parameters of the plain model, and do not wrap it in"
            " DistributedDataParallel: the workers need no other averaging."
        )
        self._scaling = LossScaling(id(self))
        # parameter -> this worker's R, where gradients are freed
        self._coordinates: dict[Tensor, Tensor] = {}
        self._agreed = self._compared = self._checked = False
        self._step_log = StepLog("a gradient was not finite, or too large for the wire")
        self._names: dict[Tensor, str] = {}
        self._watch: BackwardWatch | None = None
        super().__init__(params, defaults)
        self._watch = BackwardWatch([], self._gradient_is_there)
        self._watch.add(self._parameters)

    # ---------------------------------------------------------------- the rule of the update

    @abstractmethod
    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """State before the first step, for gradients (or coordinates of gradients) like
        that one.
        """

    @abstractmethod
    def move(self, state: dict[str, Any], overlap: Tensor) -> None:
        """Carry the state over to a new subspace. overlap: T = P_old^T P_new, (r, r)."""

    @abstractmethod
    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Take a gradient into the state; what the update is lr times of."""

    def check_group(self, group: dict[str, Any]) -> None:
        """ConfigError for a bad value in a parameter group."""
        owner = type(self).__name__
        if group["rank"] is not None:
            checked_positive_int(owner, "rank", group["rank"])
        check_number(owner, "lr", group["lr"])
        check_number(owner, "weight_decay", group["weight_decay"])
        check_number(owner, "scale", group["scale"], above=0.0)

    def settings(self) -> dict[str, Any]:
        """What must be equal on all workers beside the groups and the parameters."""
        compressor = {
            key: value
            for key, value in self._averaging.compressor.describe().items()
            if key != "rank"
        }
        return {
            **compressor,
            "optimizer": type(self).__name__,
            "seed": self._averaging.seed,
            "wire_dtype": self._averaging.wire_name,
            "max_grad_norm": self.max_grad_norm,
        }

    # ---------------------------------------------------------------- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters take part from the next step on, on all workers.
        See torch's method.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for parameter in group["params"]:
                check_parameter(type(self).__name__, parameter)
        except LowRankCommError:
            self.param_groups.pop()
            raise
        group.setdefault("t", self.t)
        self._agreed = False
        if self._watch is not None:
            self._watch.add(group["params"])

    @property
    def t(self) -> int:
        """Steps made so far; t of the next one. Kept in the groups, which every way of
        saving an optimizer keeps.
        """
        return max((int(group["t"]) for group in self.param_groups if "t" in group), default=0)

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def rank_of(self, parameter: Tensor, group: Mapping[str, Any]) -> int | None:
        """r of a parameter's projection; None where it has plain updates."""
        rank = group["rank"]
        return (
            rank
            if parameter.dim() == 2 and rank is not None and rank < min(parameter.shape)
            else None
        )

    @property
    def side(self) -> str:
        """Of the bases."""
        return self._averaging.compressor.side

    def basis_length(self, parameter: Tensor) -> int:
        """s, the rows of P of a projected parameter."""
        return self._averaging.length(parameter)

    def _entries(self) -> list[tuple[Entry, dict[str, Any]]]:
        """The trainable parameters with their groups, in order."""
        groups = [group for group in self.param_groups for _ in group["params"]]
        named = self._namer.name_all(self.param_groups)
        self._names = {parameter: name for name, parameter in named}
        names = [name for name, _ in named]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise ConfigError(f"two parameters are called {twice!r}; give each its own name.")
        return [
            (
                Entry(
                    name,
                    parameter,
                    self.rank_of(parameter, group),
                    self.state[parameter].get("projector") if parameter in self.state else None,
                    self._coordinates.get(parameter),
                    self._refreshed_at(parameter),
                ),
                group,
            )
            for (name, parameter), group in zip(named, groups, strict=True)
            if parameter.requires_grad
        ]

    @property
    def ledger(self) -> Ledger:
        """Bytes that this worker has handed to collectives, by kind, over all steps."""
        return self._averaging.ledger

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        numbers were not finite.
        """
        return self._step_log.skipped_in_a_row > 0

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on this worker: moments and projectors."""
        tensors = [
            value
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return sum(tensor.nbytes for tensor in tensors)

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
            closure: computes the loss and the gradients anew; it runs first.

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
            self.param_groups,
            closure,
            self._scaling,
            initialise=self._initialise,
            average=self._average,
            update=self._update_all,
        )

    def _average(self) -> list[tuple[Entry, dict[str, Any], Averaged | None]] | None:
        """Average over the workers; None if the step is vetoed.

        Returns:
            For each trainable parameter (entry, group, average).
        """
        pairs = self._entries()
        if not pairs:
            return []
        entries = [entry for entry, _ in pairs]
        self._check(entries)
        if self._coordinates and hasattr(self, "found_inf"):
            raise ConfigError(
                f"{type(self).__name__}: free_gradients=True cannot go with a GradScaler, which"
                " looks at gradients that are gone by then; train in bfloat16, or leave"
                " free_gradients out."
            )
        averaged = self._averaging.average(entries, self.t)
        self._coordinates.clear()
        self._step_log.enter(self.t, averaged is not None)
        if averaged is None:
            return None
        return [(*pair, one) for pair, one in zip(pairs, averaged, strict=True)]

    def _update_all(self, averaged: list[tuple[Entry, dict[str, Any], Averaged | None]]) -> None:
        """Update the parameters, clipped together, and count the step."""
        if not averaged:
            return
        means = [one for _, _, one in averaged]
        self._step_log.warn_if_empty(means)
        clip = self._clipping(means)
        for entry, group, one in averaged:
            if one is not None:
                self._update(entry.parameter, group, one, clip)
        t = self.t + 1
        for group in self.param_groups:
            group["t"] = t

    def _check(self, entries: list[Entry]) -> None:
        """Before anything whose sizes depend on it: do the workers have the same
        parameters, state and settings?
        """
        self._averaging.workers.device = entries[0].parameter.device
        for entry in entries:
            if entry.parameter.grad is not None and entry.parameter.grad.is_sparse:
                raise LowRankCommError(
                    f"{entry.name}: sparse gradients cannot be averaged here; use sparse=False."
                )
        if not self._agreed:
            self.ledger.bytes["fingerprint"] += check_same(
                described(self, entries, not self._compared),
                self._averaging.workers.group,
                self._averaging.workers.device,
            )
            self._agreed = self._compared = True
        if not self._checked:
            self._checked = True
            self._double_averaging.check(
                [entry.parameter.grad for entry in entries],
                self._averaging.workers,
                self.ledger,
            )
            if not self.free_gradients and self._watch is not None:
                self._watch.remove()

    def _clipping(self, averaged: list[Averaged | None]) -> Tensor | None:
        """Factor of all gradients, on the device; None without clipping."""
        there = [one.gradient for one in averaged if one is not None]
        if self.max_grad_norm is None or not there:
            return None
        home = self._averaging.workers.device
        norms = [
            torch.linalg.vector_norm(gradient).to(device=home, dtype=torch.float32)
            for gradient in there
        ]
        return (self.max_grad_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp_(
            max=1.0
        )

    def _update(
        self, parameter: Tensor, group: dict[str, Any], averaged: Averaged, clip: Tensor | None
    ) -> None:
        gradient, basis, state = averaged.gradient, averaged.basis, self.state[parameter]
        if clip is not None:
            gradient = gradient * clip.to(gradient)
        if not state:
            state.update(self.initial_state(gradient))
        elif averaged.refreshed and basis is not None:
            self.move(state, state["projector"].mT @ basis)
        if basis is not None and (averaged.refreshed or "projector" not in state):
            # what came is a piece of a packet, and would keep all of it
            state["projector"] = basis.clone()
            state["refreshed_at"] = torch.tensor(float(self.t), dtype=torch.float32, device="cpu")
        direction = self.direction(gradient, state, group)
        lr = float(group["lr"])
        if group["weight_decay"]:
            parameter.mul_(1.0 - lr * float(group["weight_decay"]))
        if basis is None:
            parameter.add_(direction.to(parameter.dtype), alpha=-lr)
            return
        p, q = (basis, direction) if self._averaging.on_rows(parameter) else (direction, basis)
        if parameter.dtype == direction.dtype:
            parameter.addmm_(p, q.mT, alpha=-lr * group["scale"])
        else:
            parameter.add_((p @ q.mT).to(parameter.dtype), alpha=-lr * group["scale"])

    def _refreshed_at(self, parameter: Tensor) -> int | None:
        """Step of a parameter's last refresh; -1 before the first, None in states saved
        without it.
        """
        state = self.state.get(parameter, {})
        at = state.get("refreshed_at")
        return int(at) if at is not None else None if state else -1

    def _gradient_is_there(self, parameter: Tensor) -> None:
        """A gradient has arrived, in a backward pass."""
        self._double_averaging.gradient()
        projector = self.state[parameter].get("projector") if parameter in self.state else None
        name = self._names.get(parameter)
        if not self.free_gradients or projector is None or name is None:
            return
        if self._averaging.refreshes(name, self._refreshed_at(parameter), self.t):
            return
        assert parameter.grad is not None
        with torch.no_grad():
            gradient = parameter.grad.to(projector.dtype)
            r = (gradient.mT if self._averaging.on_rows(parameter) else gradient) @ projector
            before = self._coordinates.get(parameter)
            self._coordinates[parameter] = r if before is None else before.add_(r)
            parameter.grad = None

    # ---------------------------------------------------------------- state

    def _initialise(self) -> None:
        """Make all state without a step, for torch.distributed.checkpoint to load into;
        no communication.
        """
        for entry, _ in self._entries():
            state, parameter = self.state[entry.parameter], entry.parameter
            if state:
                continue
            if entry.rank is None:
                state.update(self.initial_state(torch.zeros_like(parameter, dtype=entry.dtype)))
                continue
            free = parameter.numel() // self._averaging.length(parameter)
            like = torch.zeros(free, entry.rank, dtype=entry.dtype, device=parameter.device)
            state.update(
                {
                    **self.initial_state(like),
                    "projector": self._averaging.initial_basis(entry, entry.rank),
                }
            )
            state["refreshed_at"] = torch.tensor(-1.0, dtype=torch.float32, device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` gave, at any number of workers. All workers must
        load the same.

        Raises:
            StateMismatchError: it is of another optimizer, or of other ranks or sides
                of the basis.
        """
        check_saved(self, state_dict)
        super().load_state_dict(state_dict)
        # torch has cast what belongs to a bfloat16 parameter to bfloat16: moments and
        # bases are to be as they were saved.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, self._parameters, strict=True):
            for symbol, value in state_dict["state"].get(key, {}).items():
                device = parameter.device if value.dim() else "cpu"
                self.state[parameter][symbol] = value.detach().to(device=device, copy=True)
        self._coordinates.clear()
        self._agreed = self._compared = False
