"""`CompressedOptimizer`: a torch optimizer that averages the gradients over the workers
before it steps.

It wraps a base optimizer, to which it delegates `param_groups`, `state` and `defaults`
(`wrapper`). A step is

    reduce_gradients()   p.grad <- mean over the workers, compressed (a collective)
    clip                 by the norm of that, if max_grad_norm is given
    base.step()

All workers call it. `reduce_gradients()` may be called by hand, to clip or look at the
result before `step()`; it is idempotent, until `step()`, `zero_grad()` or a new
backward pass into fresh gradients. Error memory, bases and step counter go on when the
base steps; averaged gradients that are given up before that leave no trace. Gradient
accumulation needs nothing: communication happens once, when the step is due. If any
worker's gradient is not finite, no worker steps.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_comm.checkpointing.rehearsed import CHECKPOINTS
from lowrank_comm.communication import Ledger
from lowrank_comm.communication.agreement import fingerprint, options_of
from lowrank_comm.communication.topology import grid
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import Section
from lowrank_comm.config.enabled import leave_alone
from lowrank_comm.config.hints import nearest_class
from lowrank_comm.config.section import algorithm_of
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import all_finite
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.optimizer.attachment import Attachment
from lowrank_comm.optimizer.backward_reduction import BackwardReduction
from lowrank_comm.optimizer.double_averaging import ATTACH
from lowrank_comm.optimizer.engine import hint_of_two_levels, kept_local, wrapper_of
from lowrank_comm.optimizer.environment import refuse_with_deepspeed
from lowrank_comm.optimizer.lazy_reducer import LazyReducer
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.optimizer.replicas import replicas_of
from lowrank_comm.optimizer.saved_state import SavedState
from lowrank_comm.optimizer.sharpness_aware import SharpnessAware
from lowrank_comm.optimizer.step import run_step
from lowrank_comm.optimizer.wrapper import OptimizerWrapper, parameters_of, refuse_meta
from lowrank_comm.options import Positive, PositiveInt, check
from lowrank_comm.reduction.divergence import DivergenceCheck
from lowrank_comm.reduction.gradients import separate_from_parameters
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import Plan
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.report import StepReport
from lowrank_comm.reduction.skipped_steps import MAX_VETOES, SkippedSteps

_log = logging.getLogger("lowrank_comm")


class CompressedOptimizer(OptimizerWrapper):
    """Wraps any torch optimizer; takes over the averaging of gradients over
    data-parallel workers.

    Delta_i = g_i + e_i
    p.grad <- C(Delta_1, ..., Delta_N)
    e_i <- Delta_i - sent_i
    then the base optimizer's step

    Args:
        optimizer: the base, e.g. `torch.optim.AdamW(model.named_parameters(),
            lr=1e-3)`; SGD(momentum=...) is the paper's MSGD.
        compressor: e.g. `PowerSGDPlus(rank=4, restart_every=200)`.
        process_group: the workers: None for the default group, a `ProcessGroup` or a
            1-D `DeviceMesh`; a 2-D mesh (between nodes, inside a node), by position,
            makes a node one worker: the mean inside it is exact.
        min_compression_rate: a matrix is compressed when m n / (elements sent) is above
            it; 0 compresses every matrix.
        rules: exceptions by parameter name; the first that matches wins.
        error_feedback: its form (EF14, EF21, none, in rounds), and how the error memory
            is kept.
        quantization: what is sent quantized to a few bits: factors, restarts, what is
            not compressed.
        wire_dtype: dtype on the wire, or None for the wider of float32 and the
            parameter's dtype.
        initial_basis: parameter name -> Q (n x r), to be held against a reference.
        named_parameters: names, where the base has none.
        max_grad_norm: clip the averaged gradient to this norm before the base's step.
        seed: of the random draws, equal on all workers.
        reduce_at: "step" reduces inside `step()`; "backward" at the end of the last
            backward pass, so that a loop which clips before `step()` clips the
            averaged gradient. None: "backward" under DDP and FSDP2, else "step".
        shard_scope: with two levels, "shard" compresses each rank's block of rows
            alone, "matrix" carries out the algorithm of the whole matrix together.
        overlap: start compressing a bucket of parameters while the backward pass goes
            on; for a plain model and DDP, with reduce_at="backward".
        bucket_cap_mb: size of such a bucket, in MB of gradients, and of the pieces in
            which restarts and the warm-up send whole matrices; one larger matrix is a
            piece alone.
        warmup_steps: the first steps, which average everything while bases follow the
            means: a number, or a fraction below 1 of the run (at least 5 steps).
        warmup_wire: "bfloat16" or "int8" for what these steps send of matrices; what
            that rounds off stays in the error memory. None: as other steps.
        training_steps: optimizer steps of the whole run, of which `warmup_steps` may be
            a fraction; engines that know them tell `attach`.
        max_vetoes: after how many skipped steps in a row to raise on all workers; None
            for never. With a GradScaler, which lowers its scale s first, 2 log2(s)
            more.
        check_every: compare parameters, bases and step between the ranks that should
            hold the same bits, each time `step()` was called that many times, vetoed
            ones included; None for never. Replicas of a parameter are compared: with
            flat FSDP2 there are none, and the check is of bases and step. On unlike
            processors, whose roundings differ, leave it off.
        on_divergence: "error" raises a DivergenceError on all workers, with nothing of
            the step averaged or applied; "resync" copies parameters, the base's state
            and bases from a rank of the majority, tells so in a line, and raises where
            there is none.

    Raises:
        ConfigError: a bad argument.

    Example:
        >>> import torch
        >>> from lowrank_comm import CompressedOptimizer, PowerSGDPlus
        >>> model = torch.nn.Linear(64, 64)
        >>> base = torch.optim.AdamW(model.named_parameters())
        >>> optimizer = CompressedOptimizer(base, PowerSGDPlus(rank=4))
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.error_memory())
        ['weight']

    Source: Algorithm 2 of arXiv 2509.11254, for any base optimizer.
    """

    compressor: Compressor
    max_grad_norm: float | None

    # GradScaler must call step() on every worker; see `grad_scaler`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        compressor: Compressor,
        process_group: Any = None,
        *,
        min_compression_rate: float = 2.0,
        rules: Sequence[Rule] = (),
        error_feedback: ErrorFeedback | None = None,
        quantization: Quantization | None = None,
        wire_dtype: str | None = None,
        initial_basis: Mapping[str, Tensor] | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        reduce_at: str | None = None,
        shard_scope: str = "shard",
        overlap: bool = False,
        bucket_cap_mb: float = 25.0,
        max_vetoes: int | None = MAX_VETOES,
        check_every: int | None = None,
        on_divergence: str = "error",
        warmup_steps: int | float = 0,
        warmup_wire: str | None = None,
        training_steps: int | None = None,
    ) -> None:
        super().__init__(optimizer, "optimizer")
        if not isinstance(compressor, Compressor):
            raise ConfigError(
                "compressor must be one such as PowerSGDPlus(rank=4), got"
                f" {compressor!r}{nearest_class(compressor)}"
            )
        error = ConfigError(
            "a CompressedOptimizer cannot go with --deepspeed: DeepSpeed averages gradients itself,"
            ' and Trainer would drop this optimizer. Put a section "lowrank_comm" into the'
            f" DeepSpeed JSON, such as {compressor.describe()}, and import"
            " lowrank_comm.integrations.deepspeed; or give Trainer"
            " callbacks=[CompressionCallback(compressor)]."
        )
        refuse_with_deepspeed(self, error)
        check("CompressedOptimizer: max_grad_norm", max_grad_norm, Positive | None)
        check("CompressedOptimizer: reduce_at", reduce_at, Literal["step", "backward"] | None)
        check("CompressedOptimizer: bucket_cap_mb", bucket_cap_mb, Positive, 25.0)
        check("CompressedOptimizer: max_vetoes", max_vetoes, PositiveInt | None, MAX_VETOES)
        divergence = DivergenceCheck(check_every, on_divergence, "CompressedOptimizer: ")
        self._divergence = divergence if check_every is not None else None
        if overlap and reduce_at == "step":
            raise ConfigError(
                'overlap=True works at the end of backward only; leave reduce_at="step" out.'
            )
        self._training_steps = training_steps
        make_reducer = functools.partial(
            Reducer,
            compressor=compressor,
            min_compression_rate=min_compression_rate,
            rules=tuple(rules),
            error_feedback=error_feedback,
            quantization=quantization,
            wire_dtype=wire_dtype,
            seed=seed,
            initial_basis=initial_basis,
            bucket_bytes=int(bucket_cap_mb * 1e6) if overlap else None,
            piece_bytes=int(bucket_cap_mb * 1e6),
            warmup_steps=warmup_steps,
            warmup_wire=warmup_wire,
        )

        def make(slots: Sequence[ParamInfo], **keywords: Any) -> Reducer:
            return make_reducer(slots, training_steps=self._training_steps, **keywords)

        # not by assignment, which would reach a base that has attributes of these names
        vars(self).update(compressor=compressor, max_grad_norm=max_grad_norm)
        self._told_plan = False
        self._attachment = Attachment(self, process_group, shard_scope)
        self._lazy = LazyReducer(
            optimizer,
            make,
            self._attachment,
            Namer(named_parameters, in_ddp=f"{ATTACH[0].lower()}{ATTACH[1:]}"),
            settings=self._settings,
            on_rebuild=lambda: self._backward.watch(),
            on_first=lambda reducer: self._saved.take_over(reducer),
        )
        self._backward = BackwardReduction(
            self._attachment, self._lazy, self._reduce, reduce_at, bool(overlap), self._divergence
        )
        self._saved = SavedState(optimizer, self._lazy, self._attachment)
        self._sharpness_aware = SharpnessAware(optimizer, self._backward)
        self._skipped = SkippedSteps(
            "a gradient (with the error memory) was not finite, or too large for the wire or the"
            " parameter's dtype",
            max_vetoes,
            "error memory and bases start anew by optimizer.reducer.reset() on all ranks",
            empty=": was the optimizer built, or attached, before fully_shard replaced the"
            " parameters, or was every backward pass told not to be the last?",
        )
        self._backward.watch()
        # Some engines hold the base alone and step it, past this optimizer.
        backward = weakref.ref(self._backward)

        def before_the_base_steps(*_: object) -> None:
            there = backward()
            if there is not None:
                there.settle(stepping=True)

        weakref.finalize(self, optimizer.register_step_pre_hook(before_the_base_steps).remove)

    @classmethod
    def from_config(cls, base: Optimizer, section: Mapping[str, Any], **keywords: Any) -> Any:
        """Make an optimizer from a `lowrank_comm` section, as in a JSON file.

        Args:
            base: the base optimizer.
            section: see `config`.
            keywords: of the constructor, for what JSON cannot hold; they win over the
                section. With `training_steps` the warm-up of a preset is a part of the
                run.

        Returns:
            The optimizer; a `BidirectionalOptimizer` where the section names a
            bidirectional method, whose workers each have weights of their own; and
            `base` as it is where the section has "enabled": false, with a line on rank
            0. The engine then averages the gradients, as it does without this library.

        Raises:
            ConfigError: an unknown key, with the nearest valid one, or a value that
                cannot work.

        Example:
            >>> import torch
            >>> base = torch.optim.SGD(torch.nn.Linear(8, 8).named_parameters(), lr=0.1)
            >>> section = {"compressor": "powersgd", "rank": 2}
            >>> CompressedOptimizer.from_config(base, section).compressor.rank
            2
        """
        kind = algorithm_of(section)
        if isinstance(kind, str):
            keywords.pop("training_steps", None)
            return pkgutil.resolve_name(kind).from_config(base, section, **keywords)
        parsed = Section.parse(section)
        if not parsed.enabled:
            return leave_alone(base)
        options = {
            **parsed.reducer_options(keywords.get("training_steps")),
            "shard_scope": parsed.topology.shard_scope,
            "max_vetoes": parsed.max_vetoes,
            "check_every": parsed.check_every,
            "on_divergence": parsed.on_divergence,
            **keywords,
        }
        if parsed.topology.shard_size != 1 and options.get("process_group") is None:
            options["process_group"] = grid(parsed.topology.shard_size)
        return cls(base, parsed.make_compressor(), **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.compressor!r}, {self.base!r})"

    # ---------------------------------------------------------------- the model

    def attach(
        self,
        model: nn.Module,
        scaler: Any = None,
        is_last_backward: Callable[[], bool] | None = None,
        in_use: Callable[[], bool] | None = None,
        training_steps: int | None = None,
    ) -> Plan:
        """Connect to the engine that runs the model, take the parameters' names from
        it, and print the plan on rank 0.

        Under DDP and FSDP2 the engine's own averaging of gradients (under HSDP that
        between nodes) is switched off, and ours takes its place. For a plain model this
        is optional.

        Args:
            model: the one whose parameters the base optimizes, wrapped as it is
                trained.
            scaler: a `torch.amp.GradScaler`, so that an overflow on one worker lowers
                the scale on all.
            is_last_backward: for loops that accumulate gradients and know by themselves
                which backward pass is the last of a step, such as Accelerate's and
                Trainer's: called at the end of each. Gradients are then averaged at the
                end of the last one, for a plain model too.
            in_use: for such loops, too: whether the loop has not ended. Another
                optimizer may take the model over when it has.
            training_steps: optimizer steps of the whole run, where the loop knows them
                and the constructor was not told.

        Returns:
            What was found, what goes low-rank and what dense, bytes a step, memory.

        Raises:
            UnsupportedError: the model is wrapped in a way that cannot be compressed;
                the message names the way out.
            ConfigError: the optimizer and the model do not hold the same parameters, or
                groups do not fit.
        """
        if is_last_backward is not None and self._backward.asked == "step":
            raise ConfigError(
                'attach: reduce_at="step" averages gradients after whoever clips them before'
                " step(), as Accelerate and Trainer do; leave reduce_at out. (is_last_backward says"
                " when a backward pass is the last one of its step.)"
            )
        if self._training_steps is None:
            self._training_steps = training_steps
        attachment, wrapper = self._attachment, wrapper_of(model)
        left_out = attachment.check_model(model, wrapper)
        if self.max_grad_norm is not None and kept_local(model):
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm}: DistributedDataParallel was told to ignore"
                " parameters of the model, whose gradients differ between ranks, so each would clip"
                " by another norm. Leave it out, and clip the averaged gradients alone between"
                " optimizer.reduce_gradients() and step()."
            )
        self._backward.is_last = is_last_backward
        attachment.in_use = in_use or (lambda: True)
        # the engine anew, or this very model after it was given back
        goes_on = attachment.detached if wrapper is None else attachment.was_of(model)
        if wrapper is None:
            attachment.to_plain(model)
        else:
            take_part, overlap = self._take_part_without_gradients, self._backward.overlap
            attachment.to_wrapped(wrapper, model, self._lazy.made, take_part, overlap)
            if not goes_on:
                self._lazy.forget()
        if goes_on:
            self._backward.forget()
            self._lazy.rebuild()
        self._backward.watch()
        self._lazy.learn(model.named_parameters())
        attachment.scaling.attach(scaler)
        plan, workers = self.plan, self.reducer.workers
        if left_out and workers.world_size > 1:
            plan = replace(plan, notes=(*plan.notes, _nobody_averages(left_out)))
        self._told_plan = True
        if workers.is_writer:
            print(plan, flush=True)
        return plan

    def is_attached_to(self, model: nn.Module) -> bool:
        """Return whether `attach` was called with this very model, and `detach` not
        since.
        """
        return self._attachment.is_of(model)

    def detach(self) -> None:
        """Take the hooks off the parameters, for another optimizer to hold them, and
        give the model back to its engine: nothing is averaged at the end of backward
        any more, only in `step()` and `reduce_gradients()`.
        """
        self._attachment.detach()

    def _settings(self, in_the_node: bool) -> dict[str, Any]:
        """Return what must be equal on all workers, or on all ranks of a node, beside
        the reducer's own settings.
        """
        engine, lazy = self._attachment.engine, self._lazy
        settings = {
            "max_grad_norm": self.max_grad_norm,
            "reduce_at": self._backward.reduces_at,
            "optimizer": type(self.base).__name__,
            "param_groups": options_of(self.base.param_groups),
            "engine": engine.name,
            "state found in the base optimizer": self._saved.not_taken_over,
        }
        if self._divergence is not None:
            settings |= self._divergence.describe()
        # blocks differ
        comparable = engine.compares_values and not (in_the_node and not engine.saves_whole)
        # Later, unlike processors may have rounded the values apart by a last bit.
        if comparable and lazy.made is not None and lazy.made.state.last_pass is None:
            settings[
                "values of the parameters (seed all workers alike, or broadcast the parameters from"
                " rank 0)"
            ] = fingerprint([engine.local(p) for p in lazy.parameters])
        return settings

    # ---------------------------------------------------------------- a step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Average the gradients (unless that was done before), clip (if asked to), step
        the base. A collective, to be called by every worker.

        Args:
            closure: computes the loss and the gradients again; it runs first.

        Returns:
            The closure's loss, or None.

        Raises:
            ConfigMismatchError: at the first step, on every worker, if their settings
                or parameters differ.
            LowRankCommError: a GradScaler that `attach` was not told of, and gradients
                that were averaged before.
        """
        return run_step(
            self,
            closure,
            self._attachment.scaling,
            initialise=self._initialise,
            average=self._average,
            update=self._update,
            averaged_before=lambda: self._backward.verdict is not None,
        )

    def _initialise(self) -> None:
        """Let the base create its state; the state dict that torch makes next must have
        a place for the compressor's state too.
        """
        self._lazy.prepare()
        self._step_base()

    def _average(self) -> bool | None:
        """Average the gradients, unless that was done before; None if the step is
        vetoed.
        """
        verdict = self._backward.verdict
        # where step() is the only one to average, other workers may have new gradients
        if self._backward.reduces_at == "step" and self._backward.were_dropped():
            verdict = None
        applied = self._reduce(1.0) if verdict is None else verdict
        self._backward.verdict = None
        self._backward.count_step()
        return applied or None

    def _update(self, _: bool) -> None:
        """Clip the gradients if asked to, and step the base."""
        self._clip()
        self._step_base()

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters_of(self.base), self.max_grad_norm)

    def _of_the_base(self, name: str, value: Any) -> Any:
        return self._sharpness_aware.call(name, value, self)

    # ---------------------------------------------------------------- gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, averaged ones included: the batch leaves no trace."""
        self._backward.forget()
        self._attachment.engine.drop()
        if self._lazy.made is not None:
            self._lazy.made.abandon()
        self.base.zero_grad(set_to_none=set_to_none)

    def reduce_gradients(self) -> bool:
        """Average the gradients over the workers into `p.grad`; a collective, to be
        called by every worker.

        Idempotent: called again before `step()`, `zero_grad()` or a new backward pass,
        it does nothing. Use `optimizer.zero_grad()` to drop averaged gradients without
        a step.

        Returns:
            False if the step is vetoed: some worker's gradient was not finite. `step()`
            will then do nothing.

        Raises:
            ConfigMismatchError: at the first pass, on every worker, if their settings
                or parameters differ.
        """
        self._backward.watch()
        verdict = self._backward.verdict
        if verdict is not None and not self._backward.were_dropped():
            return verdict
        return self._reduce(self._attachment.scaling.scale_of_gradients())

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Let backward passes inside only accumulate, also with reduce_at="backward";
        as DDP's method of this name does.

        Example:
            >>> import torch
            >>> from lowrank_comm import CompressedOptimizer, PowerSGD
            >>> model = torch.nn.Linear(8, 8)
            >>> base = torch.optim.SGD(model.named_parameters(), lr=0.1)
            >>> optimizer = CompressedOptimizer(
            ...     base, PowerSGD(rank=1), reduce_at="backward"
            ... )
            >>> with optimizer.no_sync():
            ...     model(torch.ones(2, 8)).sum().backward()
            >>> model(torch.zeros(2, 8)).sum().backward()
            >>> optimizer.step()
        """
        return self._backward.no_sync()

    def _reduce(self, scale: float, stale: bool = False) -> bool:
        """Average gradients that carry this loss scale into `p.grad`; a collective.

        Args:
            scale: of the loss.
            stale: this worker's parameters stand still, since its data are exhausted.

        Returns:
            False for a veto: then nothing has changed, on all workers.
        """
        self._backward.settle(stepping=False)
        reducer, engine = self._lazy.prepare(), self._attachment.engine
        parameters = self._lazy.parameters
        if reducer.state.last_pass is None:
            self._look_before_the_first_pass(reducer)
        if self._backward.overlap:
            self._backward.begins(reducer)
        # before anything whose sizes follow from what is compared
        reducer.ensure_agreed()
        self._saved.check_taken_over()
        if self._divergence is not None and self._divergence.is_due:
            self._divergence.run(reducer, replicas_of(self._lazy.named, self.base, engine, stale))
        # other engines are known not to average over these workers any more
        if self._attachment.is_plain and reducer.state.last_pass is None:
            gradients = [p.grad for p in parameters]
            sent = self._backward.double_averaging.check(gradients, reducer.workers)
            reducer.ledger.bytes["fingerprint"] += sent
        local = None if self._attachment.is_plain else engine.local
        separate_from_parameters(parameters, self._lazy.named.values(), local)
        gradients = engine.collect(parameters)
        outcome = reducer.reduce(gradients, scale=scale, refused=engine.refused)
        applied = outcome.applied
        # the same on all workers, since they all hold the same numbers now
        if applied and _overflows_float16(outcome.grads, parameters, reducer.workers):
            reducer.rollback()
            applied = False
        if applied:
            engine.deliver(parameters, outcome.grads)
        self._backward.ended(applied)
        self._skipped.enter(
            reducer.step,
            applied,
            outcome.grads,
            reducer.workers,
            outcome.unsound,
            self._attachment.scaling.known_scale,
        )
        return applied

    def _look_before_the_first_pass(self, reducer: Reducer) -> None:
        """Refuse parameters without values; say that nothing is compressed where no
        plan was printed that says so.
        """
        refuse_meta(self._lazy.named.items())
        if self._told_plan or not self.compressor.low_rank or not reducer.workers.is_writer:
            return
        self._told_plan = True
        nothing = reducer.plan.nothing_compressed
        if nothing:
            _log.warning("%s (attach(model) prints the whole plan)", nothing)

    def _take_part_without_gradients(self) -> None:
        """Take part in a pass of the other workers when this one's data are exhausted:
        send what the error memory holds. The others are taken to step with the result.
        """
        self._lazy.prepare()
        for parameter in self._lazy.parameters:
            parameter.grad = None
        self._reduce(1.0, stale=True)
        self._backward.settle(stepping=True)
        self.zero_grad()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        gradient was not finite.
        """
        return self._skipped.in_a_row > 0

    # ---------------------------------------------------------------- the reducer

    @property
    def reducer(self) -> Reducer:
        """The reducer of the present trainable parameters; made at the first step, or
        when it is first asked for.
        """
        return self._lazy.prepare()

    @property
    def workers(self) -> Workers:
        """The ranks that train together."""
        return self._saved.workers()

    def error_memory(self) -> dict[str, Tensor]:
        """Return this worker's error memory, e_i = Delta_i - sent_i of the last step.

        Returns:
            Parameter name -> error in the parameter's shape and in gradient units,
            without the loss scale; live views, until parameters are added. What keeps
            no error is absent: what goes dense, and all of it unless the form of error
            feedback is "ef14".
        """
        reducer, engine = self._lazy.prepare(), self._attachment.engine
        return {
            slot.name: engine.error_view(slot, self._lazy.named[slot.name], shaped["error"])
            for slot, _, shaped in reducer.state.blocks()
            if "error" in shaped
        }

    @property
    def last_report(self) -> StepReport | None:
        """Bytes, captured energy, error norm, restarts and times of the last step; None
        before the first.
        """
        return self._lazy.made.last_report if self._lazy.made is not None else None

    @property
    def ledger(self) -> Ledger:
        """Totals of bytes and steps."""
        return self.reducer.ledger

    @property
    def plan(self) -> Plan:
        """What was found, what goes low-rank, bytes a step, memory."""
        engine = self._attachment.engine
        plan = self.reducer.plan_with(engine.rows, CHECKPOINTS)
        hint = hint_of_two_levels(plan)
        return replace(plan, engine=engine.name, notes=(*plan.notes, *engine.notes(), *hint))

    # ---------------------------------------------------------------- state

    def consolidate_error_memory(self, for_all_ranks: bool = True) -> None:
        """Make every worker's error the mean of all; a collective. Call it on all ranks
        before `state_dict()`.

        Training goes on as it would have: linear compressors use the mean error only.
        It sends the error memory once, as many bytes as the gradients of all compressed
        matrices. Where ranks hold blocks of whole parameters (two levels, but not
        FSDP2), each keeps a copy of the whole error memory on the CPU for the state
        dict, until the next step.

        Args:
            for_all_ranks: False where rank 0's state dict alone is saved; then it alone
                keeps such a copy.
        """
        self._saved.consolidate(for_all_ranks)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the base's state dict with the compressor's state (see
        `checkpointing.state_dict`); never communicates.

        Returns:
            The state dict. It holds the mean error memory, fit for any worker, if
            `consolidate_error_memory()` was called since the last step; else this
            worker's own, and that is warned about once.

        Raises:
            StateMismatchError: the compressor's state is not finite, in a run of one
                rank. Of several, one that raised would leave the others waiting: it
                warns, and `consolidate_error_memory()` is what raises on all.
        """
        return self._state_dict_with_hooks(self._saved.save)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse what `load_state_dict` would refuse, and change nothing; a collective.

        Args:
            state_dict: the base's tensors may be left out of it.

        Raises:
            StateMismatchError: see `load_state_dict`.
        """
        self._saved.check(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base and the compressor; a collective, to be called by every
        worker.

        Args:
            state_dict: from `state_dict()`, at any world size if it holds the mean; a
                plain optimizer's is accepted too, with a warning that the error memory
                starts from zero. Parameters are matched by their order, as torch does,
                and keep the names that they have here.

        Raises:
            StateMismatchError: on every worker, if that of some worker holds another
                worker's own error memory, is not finite or damaged, or error memory
                would be lost; then nothing is changed.
        """
        self._load_with_hooks(state_dict, self._saved.load)
        self._backward.forget()
        self._skipped.start_anew()


def _nobody_averages(names: Sequence[str]) -> str:
    return (
        f"{len(names)} trainable parameters of the model are not this optimizer's (the first:"
        f" {names[0]}): unless another CompressedOptimizer holds them, nothing averages their"
        " gradients, and the workers drift apart; freeze them, or give them to an optimizer"
    )


def _overflows_float16(
    means: Sequence[Tensor | None], parameters: Sequence[Tensor], workers: Workers
) -> bool:
    """Return whether an averaged gradient is too large for its float16 parameter on any
    rank of the node; a collective of these ranks.
    """
    narrow = [mean for mean, p in zip(means, parameters, strict=True) if p.dtype == torch.float16]
    if not narrow:
        return False
    finite = all_finite(mean.to(torch.float16) for mean in narrow if mean is not None)
    return workers.any_in_the_node(not finite)
