"""`CompressedOptimizer`: a torch optimizer that averages the gradients over the workers before it steps.

It is a real `torch.optim.Optimizer` around a base optimizer. It owns nothing that the base owns: `param_groups`,
`state` and `defaults` are the base's, through properties, so nothing can drift apart. A step is

    reduce_gradients()   p.grad <- mean over the workers, compressed (a collective; all workers call it)
    clip                 by the norm of that, if max_grad_norm is given
    base.step()

`reduce_gradients()` may be called by hand, to clip or look at the result before `step()`; it is idempotent, until
`step()`, `zero_grad()` or a new backward pass into fresh gradients. Gradient accumulation needs nothing: communication
happens once, when the step is due. If any worker's gradient is not finite, no worker steps.

State dicts: `state_dict()` is the base's, with the compressor's state added inside `state[parameter]` (keys starting
with "lowrank_comm_"; torch.distributed.checkpoint keeps these and drops unknown top-level keys) and a readable tag at
the top. It never communicates and never raises; see `checkpoint` for what "own" and "mean" are.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, state_dicts
from .arrivals import Arrivals
from .backward_end import BackwardWatch
from .communication import Ledger
from .communication.group import collectives_so_far
from .communication.topology import grid
from .compressors.base import Compressor
from .config import Section
from .diagnostics import Plan, StepReport
from .engine import Engine, connect, hint_of_two_levels, refuse_averaged, wrapper_of
from .error_feedback import ErrorFeedback
from .errors import ConfigError, LowRankCommError, StateMismatchError
from .linalg import all_finite
from .loss_scaling import LossScaling
from .naming import Namer
from .policy import Rule
from .reducer import Reducer
from .wrapping import OptimizerAroundAnother, fingerprint, only_initialises_state

_log = logging.getLogger("lowrank_comm")


class CompressedOptimizer(OptimizerAroundAnother):
    """Wraps any torch optimizer; takes over the averaging of gradients over data-parallel workers.

    Delta_i = g_i + e_i;  p.grad <- C(Delta_1, ..., Delta_N);  e_i <- Delta_i - sent_i;  then the base optimizer's step

    Args:
        optimizer: the base, e.g. `torch.optim.AdamW(model.named_parameters(), lr=1e-3)`; SGD(momentum=...) is the
            paper's MSGD.
        compressor: e.g. `PowerSGDPlus(rank=4, restart_every=200)`.
        process_group: the workers: None for the default group, a `ProcessGroup` or a 1-D `DeviceMesh`; a 2-D mesh (between
            nodes, inside a node), by position, makes a node one worker: the mean inside it is exact.
        min_compression_rate: a matrix is compressed when m n / (elements sent) is above it; 0 compresses every matrix.
        rules: exceptions by parameter name; the first that matches wins.
        error_feedback: how the error memory is kept.
        wire_dtype: dtype on the wire, or None for the wider of float32 and the parameter's dtype.
        initial_basis: parameter name -> Q (n x r), to be held against a reference.
        named_parameters: names, where the base has none.
        max_grad_norm: clip the averaged gradient to this norm before the base's step.
        seed: of the random draws, equal on all workers.
        reduce_at: "step" reduces inside `step()`; "backward" at the end of the last backward pass, so that whoever clips
            before `step()` clips the averaged gradient. None: "backward" under DDP and FSDP2, else "step".
        shard_scope: with two levels, "shard" compresses each rank's block of rows alone, "matrix" carries out the algorithm
            of the whole matrix together.
        overlap: start compressing a bucket of parameters while the backward pass goes on; for a plain model and DDP, with
            reduce_at="backward".
        bucket_cap_mb: size of such a bucket, in MB of gradients.

    Raises:
        ConfigError: a bad argument.

    Example:
        >>> import torch
        >>> from lowrank_comm import CompressedOptimizer, PowerSGDPlus
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = CompressedOptimizer(torch.optim.AdamW(model.named_parameters()), PowerSGDPlus(rank=4))
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.error_memory())
        ['weight']

    Source: Algorithm 2 of arXiv 2509.11254, for any base optimizer.
    """

    _step_supports_amp_scaling = True  # GradScaler must call step() on every worker; see `loss_scaling`

    def __init__(
        self,
        optimizer: Optimizer,
        compressor: Compressor,
        process_group: Any = None,
        *,
        min_compression_rate: float = 2.0,
        rules: Sequence[Rule] = (),
        error_feedback: ErrorFeedback | None = None,
        wire_dtype: str | None = None,
        initial_basis: Mapping[str, Tensor] | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        reduce_at: str | None = None,
        shard_scope: str = "shard",
        overlap: bool = False,
        bucket_cap_mb: float = 25.0,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, CompressedOptimizer):
            raise ConfigError(f"optimizer must be a plain torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "optimizer=LBFGS evaluates the loss several times a step; use SGD, Adam, or another that does not."
            )
        if not isinstance(compressor, Compressor):
            raise ConfigError(f"compressor must be one such as PowerSGDPlus(rank=4), got {compressor!r}.")
        number = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
        if max_grad_norm is not None and not (number and max_grad_norm > 0):
            raise ConfigError(f"max_grad_norm must be above 0, or None for no clipping; got {max_grad_norm!r}.")
        if reduce_at not in (None, "step", "backward"):
            raise ConfigError(f'reduce_at={reduce_at!r} is unknown; use "step", "backward" or None.')
        if overlap and reduce_at == "step":
            raise ConfigError('overlap=True works at the end of backward only; leave reduce_at="step" out.')
        if isinstance(bucket_cap_mb, bool) or not isinstance(bucket_cap_mb, int | float) or not bucket_cap_mb > 0:
            raise ConfigError(f"bucket_cap_mb must be a number of MB above 0, got {bucket_cap_mb!r}.")
        super().__init__(optimizer)
        self.compressor, self.max_grad_norm = compressor, max_grad_norm
        self._process_group, self._shard_scope = process_group, shard_scope
        self._options: dict[str, Any] = {
            "min_compression_rate": min_compression_rate,
            "rules": tuple(rules),
            "error_feedback": error_feedback,
            "wire_dtype": wire_dtype,
            "seed": seed,
            "initial_basis": initial_basis,
        }
        self._namer = Namer(named_parameters)
        self._engine = Engine(process_group, shard_scope)
        self._model: weakref.ref[nn.Module] | None = None
        self._reducer: Reducer | None = None
        self._status: str | None = None  # of the gradients: None as they came, "averaged", or "vetoed"
        self._averaged: list[weakref.ref[Tensor]] = []
        self._vetoes_in_a_row = 0
        self._warned_own = False
        self._scaling = LossScaling(id(self))
        self._asked_reduce_at, self._overlap = reduce_at, bool(overlap)
        self._bucket_bytes = int(bucket_cap_mb * 1e6) if overlap else None
        Reducer([], compressor, self._engine.group, **{**self._options, "initial_basis": None})  # bad values fail here
        self._watch: BackwardWatch | None = None
        self._accumulated = self._only_accumulates = self._detached = False
        self._arrivals: Arrivals | None = None
        self._collectives_before: int | None = None  # when the first gradient of the first backward pass was there
        self._watch_backward()

    @property
    def _reduces_at(self) -> str:
        if self._detached:
            return "step"
        return self._asked_reduce_at or ("backward" if self._overlap else self._engine.reduces_at)

    @classmethod
    def from_config(cls, base: Optimizer, section: Mapping[str, Any], **keywords: Any) -> CompressedOptimizer:
        """From a `lowrank_comm` section, as in a JSON file.

        Args:
            base: the base optimizer.
            section: see `config`.
            keywords: of the constructor, for what JSON cannot hold; they win over the section.

        Returns:
            The optimizer.

        Raises:
            ConfigError: an unknown key, with the nearest valid one, or a value that cannot work.

        Example:
            >>> import torch
            >>> base = torch.optim.SGD(torch.nn.Linear(8, 8).named_parameters(), lr=0.1)
            >>> CompressedOptimizer.from_config(base, {"compressor": "powersgd", "rank": 2}).compressor
            PowerSGD(rank=2)
        """
        parsed = Section.parse(section)
        options = {**parsed.reducer_options(), "shard_scope": parsed.topology.shard_scope, **keywords}
        if parsed.topology.shard_size != 1 and options.get("process_group") is None:
            options["process_group"] = grid(parsed.topology.shard_size)
        return cls(base, parsed.make_compressor(), **options)

    # ---------------------------------------------------------------- a step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self._status = None
        self._engine.drop()
        self.base.zero_grad(set_to_none=set_to_none)

    def __repr__(self) -> str:
        return f"CompressedOptimizer({self.compressor!r}, {self.base!r})"

    def attach(self, model: nn.Module, scaler: Any = None) -> Plan:
        """Connect to whatever runs the model, take the parameters' names from it, and tell the plan; rank 0 prints it.

        Under DDP and FSDP2 the engine's own averaging of gradients (under HSDP that between nodes) is switched off, and ours
        takes its place. For a plain model this is optional.

        Args:
            model: the one whose parameters the base optimizes, wrapped as it is trained.
            scaler: a `torch.amp.GradScaler`, so that an overflow on one worker lowers the scale on all.

        Returns:
            What was found, what goes low-rank and what dense, bytes a step, memory.

        Raises:
            UnsupportedError: the model is wrapped in a way that cannot be compressed; the message names the way out.
            ConfigError: the optimizer and the model do not hold the same parameters, or groups do not fit.
        """
        wrapper = wrapper_of(model)
        self._check_parameters(model, wrapper)
        if wrapper is not None:
            self._connect(wrapper, model)
        self._namer.learn(model.named_parameters())
        self._scaling.attach(scaler)
        plan = self.plan
        if self.reducer.is_writer:
            print(plan, flush=True)
        return plan

    def _connect(self, wrapper: str, model: nn.Module) -> None:
        """Let the engine of a wrapped model take the place of that of a plain one."""
        if self._reducer is not None and self._reducer.has_passed:
            raise ConfigError("attach: the optimizer has made steps already; call attach(model) before the first one.")
        engine = connect(wrapper, model, self._process_group, self._shard_scope)
        if self._overlap and not engine.can_overlap:
            engine.release()
            raise ConfigError(f"overlap=True is not possible with {engine.name}; leave it out.")
        self.detach()
        self._detached, self._engine, self._model, self._reducer = False, engine, weakref.ref(model), None
        engine.shadow(self._take_part_without_gradients)
        self._watch_backward()

    def reduce_gradients(self) -> bool:
        """Average the gradients over the workers into `p.grad`; a collective, to be called by every worker.

        Idempotent: called again before `step()`, `zero_grad()` or a new backward pass, it does nothing. Use
        `optimizer.zero_grad()` to drop averaged gradients without a step.

        Returns:
            False if the step is vetoed: some worker's gradient was not finite. `step()` will then do nothing.

        Raises:
            ConfigMismatchError: at the first pass, on every worker, if their settings or parameters differ.
        """
        self._watch_backward()
        dropped = bool(self._averaged) and all(p.grad is None for group in self.param_groups for p in group["params"])
        if self._status is not None and not dropped:
            return self._status == "averaged"
        return self._reduce(self._scaling.scale_of_gradients())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes only accumulate, also with reduce_at="backward"; as DDP's method of this name.

        Example:
            >>> import torch
            >>> from lowrank_comm import CompressedOptimizer, PowerSGD
            >>> model = torch.nn.Linear(8, 8)
            >>> base = torch.optim.SGD(model.named_parameters(), lr=0.1)
            >>> optimizer = CompressedOptimizer(base, PowerSGD(rank=1), reduce_at="backward")
            >>> with optimizer.no_sync():
            ...     model(torch.ones(2, 8)).sum().backward()
            >>> model(torch.zeros(2, 8)).sum().backward()
            >>> optimizer.step()
        """
        before, self._only_accumulates = self._only_accumulates, True
        try:
            yield
        finally:
            self._only_accumulates = before

    def _reduce(self, scale: float) -> bool:
        reducer = self._prepared()
        parameters = self._parameters
        grads = self._engine.collect(parameters)
        if not reducer.has_passed:
            happened = self._collectives_before is not None and collectives_so_far() > self._collectives_before
            reducer.ensure_agreed()
            refuse_averaged(grads, reducer, happened)
        outcome = reducer.reduce(grads, scale=scale)
        applied = outcome.applied
        if applied:
            narrow = [(g, p.dtype) for g, p in zip(outcome.grads, parameters, strict=True) if p.dtype == torch.float16]
            if narrow and reducer.any_in_the_node(not all_finite(g.to(t) for g, t in narrow if g is not None)):
                reducer.rollback()  # the same on all workers, since they all hold the same numbers now
                applied = False
            else:
                self._engine.deliver(parameters, outcome.grads)
                reducer.commit()
        if not applied:
            self._engine.forget()
        self._vetoes_in_a_row = 0 if applied else self._vetoes_in_a_row + 1
        if not applied:
            _log.warning(
                "step %d is skipped on all workers (%d in a row): a gradient (with the error memory) was not finite, or too "
                "large for the wire or the parameter's dtype",
                reducer.step,
                self._vetoes_in_a_row,
            )
        self._averaged = [weakref.ref(p.grad) for p in parameters if p.grad is not None]
        self._status = "averaged" if applied else "vetoed"
        return applied

    def _take_part_without_gradients(self) -> None:
        """A pass of the other workers, when this one's data are exhausted: it sends what its error memory holds."""
        for parameter in self._prepared_parameters():
            parameter.grad = None
        self._reduce(1.0)
        self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Reduce (if nobody has), clip (if asked to), step the base. A collective, to be called by every worker.

        Args:
            closure: computes the loss and the gradients anew; it runs first.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigMismatchError: at the first step, on every worker, if their settings or parameters differ.
            LowRankCommError: a GradScaler that `attach` was not told of, and gradients that were averaged before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if only_initialises_state(self.param_groups):
            self._prepared()  # the state dict that torch makes next must have a place for the compressor's state
            self.base.step()
            return loss
        everything = [p for group in self.param_groups for p in group["params"]]
        self._scaling.unscale(self, everything, reduced=self._status is not None)
        applied = self._reduce(1.0) if self._status is None else self._status == "averaged"
        self._status = None
        if not applied:
            self._scaling.overflowed()
            return loss
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in everything if p.grad is not None], self.max_grad_norm)
        self.base.step()
        return loss

    def _watch_backward(self) -> None:
        """Notice new gradients, and the end of backward."""
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self._watch is None:
            at_end = self._reduce_after_backward if self._reduces_at == "backward" else None
            self._watch = self._engine.watch(trainable, self._new_gradient, at_end)
        else:
            self._watch.add(trainable)

    def detach(self) -> None:
        """Take the hooks off the parameters, for another optimizer to hold them, and give the model back to its engine:
        nothing is averaged at the end of backward any more, only in `step()` and `reduce_gradients()`."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._engine.release()
        self._detached = True

    def _new_gradient(self, parameter: Tensor) -> None:
        if self._collectives_before is None:
            self._collectives_before = collectives_so_far()
        if self._reduces_at == "step":
            self._status = None
            return
        if self._status is not None:
            self._accumulated |= any(ref() is parameter.grad for ref in self._averaged)
        if self._overlap and self._reducer is not None and self._reducer.has_passed and not self._accumulated:
            self._begin_early(parameter)

    def _begin_early(self, parameter: Tensor) -> None:
        """Start the buckets that are complete with this parameter's gradient."""
        if self._only_accumulates or not self._engine.is_last_backward():
            return
        reducer = self._prepared()
        if self._arrivals is None or self._arrivals.is_of_another_pass(reducer):
            reducer.abandon()
            self._arrivals = Arrivals(reducer, self._parameters)
        for bucket in self._arrivals.complete_with(parameter):
            reducer.begin(bucket, [p.grad for p in self._parameters], scale=self._scaling.scale_of_gradients())

    def _reduce_after_backward(self) -> None:
        """End of a backward pass in mode "backward"; a veto leaves NaN in p.grad, so that whoever looks at it skips."""
        accumulated, self._accumulated = self._accumulated, False
        if accumulated:
            raise LowRankCommError(
                'reduce_at="backward": a second backward pass came before step(), on gradients that are averaged '
                f"already. To accumulate gradients, use {self._engine.accumulates_by} for all passes but the last, or "
                'CompressedOptimizer(reduce_at="step").'
            )
        if self._only_accumulates or not self._engine.is_last_backward():
            self._status = None
            return
        if not self._reduce(self._scaling.scale_of_gradients()):
            self._engine.poison(self._parameters)
            self._averaged = [weakref.ref(p.grad) for p in self._parameters if p.grad is not None]

    # ---------------------------------------------------------------- the reducer

    @property
    def reducer(self) -> Reducer:
        """The reducer of the present trainable parameters; made at the first step, or when it is first asked for."""
        return self._prepared()

    def _prepared(self) -> Reducer:
        """Build the reducer, or build it anew with the state so far when parameters were added or unfrozen."""
        self._by_name: dict[str, Tensor] = {}
        named = self._namer.name_all(self.param_groups)
        for name, parameter in named:
            if name in self._by_name and self._by_name[name] is not parameter:
                raise ConfigError(f"two parameters are called {name!r}; give each its own name.")
            self._by_name[name] = parameter
        known = {slot.name for slot in self._reducer.slots} if self._reducer else set()
        if not known <= self._by_name.keys():
            raise StateMismatchError(
                f"parameter {min(known - self._by_name.keys())!r} is no longer known by this name; call attach(model) "
                "before the first step, or build the base from named_parameters()."
            )
        if self._reducer is not None and all(name in known or not p.requires_grad for name, p in named):
            return self._reducer
        taking_part = [(name, p) for name, p in named if p.requires_grad or name in known]
        self._refuse_added(taking_part, known)
        slots = self._engine.slots(taking_part)
        engine = self._engine
        options = {**self._options, "shards": engine.shards, "bucket_bytes": self._bucket_bytes}
        fresh = Reducer(slots, self.compressor, engine.group, **options)
        fresh.further_settings = self._further_settings
        if self._watch is not None:
            self._watch_backward()
        if self._reducer is not None:
            fresh.take_over(self._reducer)
        self._reducer, self._arrivals = fresh, None
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
        """ConfigError where the optimizer was built from another model, or before the model's parameters were replaced."""
        held = {id(p) for p in model.parameters()}
        everything = [p for group in self.param_groups for p in group["params"]]
        foreign = [p for p in everything if id(p) not in held]
        if len(foreign) == len(everything) or (wrapper is not None and foreign):
            of_them = "none" if len(foreign) == len(everything) else f"all but {len(foreign)}"
            raise ConfigError(
                f"attach: the optimizer holds {of_them} of this model's parameters: of {len(everything)} parameters of the "
                f"optimizer {len(foreign)} are not the model's. Build it from this model, after fully_shard and the like, "
                "which replace the parameters."
            )

    def _refuse_added(self, taking_part: Sequence[tuple[str, Tensor]], known: set[str]) -> None:
        """ConfigError for a parameter that the engine which the model is attached to has never seen."""
        model = self._model() if self._model is not None else None
        if model is None or type(self._engine) is Engine:
            return
        held = {id(p) for p in model.parameters()}
        added = [name for name, p in taking_part if id(p) not in held]
        if added:
            raise ConfigError(
                f"parameter {added[0]!r} was added to the optimizer after attach, and is not one of the attached model, so "
                f"{self._engine.name} knows nothing of it. Add it to the model before it is wrapped, and attach then."
            )

    def _further_settings(self) -> dict[str, Any]:
        """What must be equal on all workers beside the reducer's own settings."""
        settings = {
            "optimizer": type(self.base).__name__,
            "max_grad_norm": self.max_grad_norm,
            "reduce_at": self._reduces_at,
            "engine": self._engine.name,
        }
        # Later, unlike processors may have rounded the values apart by a last bit.
        if self._engine.compares_values and not self.reducer.has_passed:
            values = fingerprint([self._engine.local(p) for p in self._parameters])
            settings["values of the parameters (seed all workers alike, or broadcast the parameters from rank 0)"] = values
        return settings

    def error_memory(self) -> dict[str, Tensor]:
        """This worker's error memory, e_i = Delta_i - sent_i of the last step.

        Returns:
            Parameter name -> error in the parameter's shape and in gradient units, without the loss scale; live views, until
            parameters are added. What goes dense is absent.
        """
        reducer = self.reducer
        memory = reducer.error_memory()
        views = {}
        for slot in reducer.slots:
            if reducer.treatment_of_largest(slot).low_rank:
                error = memory.get(slot.name)
                if error is None:  # another rank of the node holds all of its rows
                    error = torch.zeros(slot.shape, dtype=slot.compute_dtype, device=slot.device)
                views[slot.name] = self._engine.error_view(slot, self._by_name[slot.name], error)
        return views

    @property
    def last_report(self) -> StepReport | None:
        """Bytes, captured energy, error norm, restarts and times of the last step; None before the first."""
        return self._reducer.last_report if self._reducer else None

    @property
    def ledger(self) -> Ledger:
        """Totals of bytes and steps."""
        return self.reducer.ledger

    @property
    def plan(self) -> Plan:
        """What was found, what goes low-rank, bytes a step, memory."""
        plan = self.reducer.plan
        hint = hint_of_two_levels(plan, self._engine)
        return replace(plan, engine=self._engine.name, notes=(*plan.notes, *self._engine.notes(), *hint))

    # ---------------------------------------------------------------- state

    def consolidate_error_memory(self) -> None:
        """Every worker's error becomes the mean of all; a collective. Call it on all ranks before `state_dict()`.

        Training goes on as it would have: linear compressors use the mean error only. It sends the error memory once, as
        many bytes as the gradients of all compressed matrices.
        """
        self.reducer.consolidate_error_memory()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state dict with the compressor's state (see `state_dicts`); never communicates, never raises.

        Returns:
            The state dict. It holds the mean error memory, fit for any worker, if `consolidate_error_memory()` was called
            since the last step; else this worker's own, and that is warned about once.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = self.base.state_dict()
        if self._reducer is not None:
            tag = checkpoint.tag_of(self._reducer)
            if tag.kind == "own" and tag.step > 0 and not self._warned_own:
                self._warned_own = True
                warnings.warn(
                    f"state_dict() holds rank {tag.rank}'s own error memory only. Call consolidate_error_memory() on all "
                    "ranks before saving; then it fits every worker, at any world size.",
                    stacklevel=2,
                )
            state_dicts.add(result, self._reducer, tag, self._numbered(result["param_groups"]))
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base and the compressor.

        Args:
            state_dict: from `state_dict()`, at any world size if it holds the mean; a plain optimizer's is accepted too,
                with a warning that the error memory starts from zero.

        Raises:
            StateMismatchError: it holds another worker's own error memory, or error memory would be lost.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        plain, tag, tensors = state_dicts.split(state_dict, self._numbered(state_dict["param_groups"]))
        if tag is not None:
            checkpoint.check_fits(self.reducer, tag, tensors)  # before anything is touched
        self.base.load_state_dict(plain)
        self._status = None
        if tag is not None:
            checkpoint.restore(self.reducer, tag, tensors)
        else:
            if state_dict["state"] or (self._reducer is not None and self._reducer.step > 0):
                _log.warning("the state dict holds no compressor state: the error memory starts from zero")
            if self._reducer is not None:
                self._reducer.reset()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _numbered(self, saved_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
        """(parameter name, key in the state dict) for all parameters, by their order in the groups."""
        keys = [key for group in saved_groups for key in group["params"]]
        names = [name for name, _ in self._namer.name_all(self.param_groups)]
        return list(zip(names, keys, strict=False))  # the base complains about another number of parameters
