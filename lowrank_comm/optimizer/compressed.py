"""`CompressedOptimizer`: a torch optimizer that averages the gradients over the workers
before it steps.

It is a real `torch.optim.Optimizer` around a base optimizer. It owns nothing that the
base owns: `param_groups`, `state` and `defaults` are the base's, through properties, so
nothing can drift apart. A step is

    reduce_gradients()   p.grad <- mean over the workers, compressed (a collective; all workers call it)
    clip                 by the norm of that, if max_grad_norm is given
    base.step()

`reduce_gradients()` may be called by hand, to clip or look at the result before
`step()`; it is idempotent, until `step()`, `zero_grad()` or a new backward pass into
fresh gradients. Gradient accumulation needs nothing: communication happens once, when
the step is due. If any worker's gradient is not finite, no worker steps.
"""

from __future__ import annotations

import contextlib
import pkgutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.communication.topology import grid
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import OPTIMIZERS, Section
from lowrank_comm.config.enabled import leave_alone
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, LowRankCommError
from lowrank_comm.numerics.device import current_stream
from lowrank_comm.numerics.linalg import all_finite
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.optimizer.attachment import AVERAGES, Attachment
from lowrank_comm.optimizer.backward_reduction import BucketScheduler
from lowrank_comm.optimizer.double_averaging import DoubleAveragingGuard
from lowrank_comm.optimizer.engine import Engine
from lowrank_comm.optimizer.environment import transformers_uses_deepspeed
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.optimizer.step import StepLog, run_step
from lowrank_comm.reduction.policy import Rule


class CompressedOptimizer(Attachment):
    """Wraps any torch optimizer; takes over the averaging of gradients over
    data-parallel workers.

    Delta_i = g_i + e_i;  p.grad <- C(Delta_1, ..., Delta_N);  e_i <- Delta_i - sent_i;  then the base optimizer's step

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
        quantization: what travels as codes of a few bits: factors, restarts, what stays
            dense.
        wire_dtype: dtype on the wire, or None for the wider of float32 and the
            parameter's dtype.
        initial_basis: parameter name -> Q (n x r), to be held against a reference.
        named_parameters: names, where the base has none.
        max_grad_norm: clip the averaged gradient to this norm before the base's step.
        seed: of the random draws, equal on all workers.
        reduce_at: "step" reduces inside `step()`; "backward" at the end of the last
            backward pass, so that whoever clips before `step()` clips the averaged
            gradient. None: "backward" under DDP and FSDP2, else "step".
        shard_scope: with two levels, "shard" compresses each rank's block of rows
            alone, "matrix" carries out the algorithm of the whole matrix together.
        overlap: start compressing a bucket of parameters while the backward pass goes
            on; for a plain model and DDP, with reduce_at="backward".
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

    # GradScaler must call step() on every worker; see `loss_scaling`
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
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, CompressedOptimizer):
            raise ConfigError(
                f"optimizer must be a plain torch.optim.Optimizer, got {type(optimizer).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "optimizer=LBFGS evaluates the loss several times a step; use SGD, Adam, or another"
                " that does not."
            )
        if not isinstance(compressor, Compressor):
            raise ConfigError(
                f"compressor must be one such as PowerSGDPlus(rank=4), got {compressor!r}."
            )
        if transformers_uses_deepspeed():
            raise ConfigError(
                "a CompressedOptimizer cannot go with --deepspeed: DeepSpeed averages gradients"
                " itself, and Trainer would "
                f'drop this optimizer. Put a section "lowrank_comm" into the DeepSpeed JSON,'
                f" such as "
                f"{compressor.describe()}, and import lowrank_comm.integrations.deepspeed; or give"
                " Trainer "
                "callbacks=[CompressionCallback(compressor)]."
            )
        number = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
        if max_grad_norm is not None and not (number and max_grad_norm > 0):
            raise ConfigError(
                f"max_grad_norm must be above 0, or None for no clipping; got {max_grad_norm!r}."
            )
        if reduce_at not in (None, "step", "backward"):
            raise ConfigError(
                f'reduce_at={reduce_at!r} is unknown; use "step", "backward" or None.'
            )
        if overlap and reduce_at == "step":
            raise ConfigError(
                'overlap=True works at the end of backward only; leave reduce_at="step" out.'
            )
        if (
            isinstance(bucket_cap_mb, bool)
            or not isinstance(bucket_cap_mb, int | float)
            or not bucket_cap_mb > 0
        ):
            raise ConfigError(
                f"bucket_cap_mb must be a number of MB above 0, got {bucket_cap_mb!r}."
            )
        options: dict[str, Any] = {
            "min_compression_rate": min_compression_rate,
            "rules": tuple(rules),
            "error_feedback": error_feedback,
            "quantization": quantization,
            "wire_dtype": wire_dtype,
            "seed": seed,
            "initial_basis": initial_basis,
        }
        bucket_bytes = int(bucket_cap_mb * 1e6) if overlap else None
        super().__init__(
            optimizer,
            compressor,
            process_group,
            shard_scope,
            Namer(named_parameters),
            options,
            bucket_bytes,
        )
        self.max_grad_norm = max_grad_norm
        self._averaged: list[weakref.ref[Tensor]] = []
        self._asked_reduce_at, self._overlap = reduce_at, bool(overlap)
        self._only_accumulates = False
        # that of the last reduction
        self._stream: Any = None
        self._double_averaging = DoubleAveragingGuard()
        self._step_log = StepLog(
            "a gradient (with the error memory) was not finite, or too large for the wire or the"
            " parameter's dtype",
            empty=": was the optimizer built, or attached, before fully_shard replaced the"
            " parameters, or was every backward pass told not to be the last?",
        )
        self._watch_backward()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, on all workers, since some worker's
        gradient was not finite.
        """
        return self._step_log.skipped_in_a_row > 0

    @property
    def _reduces_at(self) -> str:
        if self._detached:
            return "step"
        if self._overlap or self._told_last is not None:
            return self._asked_reduce_at or "backward"
        return self._asked_reduce_at or self._engine.reduces_at

    def _is_last_backward(self) -> bool:
        if self._only_accumulates or not self._engine.is_last_backward():
            return False
        return self._told_last is None or self._told_last()

    @classmethod
    def from_config(cls, base: Optimizer, section: Mapping[str, Any], **keywords: Any) -> Any:
        """From a `lowrank_comm` section, as in a JSON file.

        Args:
            base: the base optimizer.
            section: see `config`.
            keywords: of the constructor, for what JSON cannot hold; they win over the
                section.

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
            >>> CompressedOptimizer.from_config(base, {"compressor": "powersgd", "rank": 2}).compressor
            PowerSGD(rank=2)
        """
        if isinstance(section, Mapping) and section.get("compressor") in OPTIMIZERS:
            extension = pkgutil.resolve_name(OPTIMIZERS[section["compressor"]])
            return extension.from_config(base, section, **keywords)
        parsed = Section.parse(section)
        if not parsed.enabled:
            return leave_alone(base)
        options = {
            **parsed.reducer_options(),
            "shard_scope": parsed.topology.shard_scope,
            **keywords,
        }
        if parsed.topology.shard_size != 1 and options.get("process_group") is None:
            options["process_group"] = grid(parsed.topology.shard_size)
        return cls(base, parsed.make_compressor(), **options)

    # ---------------------------------------------------------------- a step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self._status = None
        self._engine.drop()
        if self._reducer is not None:
            self._reducer.abandon()
        self.base.zero_grad(set_to_none=set_to_none)

    def __repr__(self) -> str:
        return f"CompressedOptimizer({self.compressor!r}, {self.base!r})"

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
        self._watch_backward()
        dropped = bool(self._averaged) and all(
            p.grad is None for group in self.param_groups for p in group["params"]
        )
        if self._status is not None and not dropped:
            return self._status == "averaged"
        return self._reduce(self._scaling.scale_of_gradients())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes only accumulate, also with reduce_at="backward"; as
        DDP's method of this name.

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
        self._stream = current_stream(reducer.device)
        if reducer.begun and (
            self._scheduler is None or self._scheduler.is_of_another_pass(reducer)
        ):
            # of a backward pass that has failed
            reducer.abandon()
        first = not reducer.state.has_passed
        # before anything whose sizes follow from what is compared
        reducer.ensure_agreed()
        # the others are known not to average over these workers any more
        if first and type(self._engine) is Engine:
            self._double_averaging.check(
                [p.grad for p in parameters], reducer.workers, reducer.ledger
            )
        grads = self._engine.collect(parameters)
        outcome = reducer.reduce(grads, scale=scale)
        applied = outcome.applied
        if applied:
            self._step_log.warn_if_empty(outcome.grads)
            narrow = [
                (g, p.dtype)
                for g, p in zip(outcome.grads, parameters, strict=True)
                if p.dtype == torch.float16
            ]
            if narrow and reducer.workers.any_in_the_node(
                not all_finite(g.to(t) for g, t in narrow if g is not None)
            ):
                # the same on all workers, since they all hold the same numbers now
                reducer.rollback()
                applied = False
            else:
                self._engine.deliver(parameters, outcome.grads)
                reducer.commit()
        if not applied:
            self._engine.forget()
        self._step_log.enter(reducer.step, applied)
        self._averaged = [weakref.ref(p.grad) for p in parameters if p.grad is not None]
        self._status = "averaged" if applied else "vetoed"
        return applied

    def _take_part_without_gradients(self) -> None:
        """A pass of the other workers, when this one's data are exhausted: it sends
        what its error memory holds.
        """
        for parameter in self._prepared_parameters():
            parameter.grad = None
        self._reduce(1.0)
        self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Reduce (if nobody has), clip (if asked to), step the base. A collective, to
        be called by every worker.

        Args:
            closure: computes the loss and the gradients anew; it runs first.

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
            self.base.param_groups,
            closure,
            self._scaling,
            initialise=self._initialise,
            average=self._average,
            update=self._update,
            averaged_before=lambda: self._status is not None,
        )

    def _initialise(self) -> None:
        """Let the base create its state; the state dict that torch makes next must have
        a place for the compressor's state too.
        """
        self._prepared()
        self.base.step()

    def _average(self) -> bool | None:
        """Average the gradients, unless that was done before; None if the step is
        vetoed.
        """
        applied = self._reduce(1.0) if self._status is None else self._status == "averaged"
        self._status = None
        return applied or None

    def _update(self, _: bool) -> None:
        if self.max_grad_norm is not None:
            everything = [p for group in self.base.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(
                [p for p in everything if p.grad is not None], self.max_grad_norm
            )
        self.base.step()

    def _watch_backward(self) -> None:
        """Notice new gradients, and the end of backward."""
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self._watch is None:
            at_end = self._reduce_after_backward if self._reduces_at == "backward" else None
            self._watch = self._engine.watch(trainable, self._new_gradient, at_end)
            if at_end is not None:
                vars(self.base)[AVERAGES] = self
        else:
            self._watch.add(trainable)

    def _new_gradient(self, parameter: Tensor) -> None:
        self._double_averaging.gradient()
        if self._reduces_at == "step":
            self._status = None
            return
        if self._overlap and self._reducer is not None and self._reducer.state.has_passed:
            self._begin_early(parameter)

    def _holds_averaged(self) -> bool:
        """Whether gradients wait in `p.grad` that were averaged for a step which has
        not been made.
        """
        averaged = {id(grad) for ref in self._averaged if (grad := ref()) is not None}
        return self._status is not None and any(
            id(p.grad) in averaged
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        )

    def _begin_early(self, parameter: Tensor) -> None:
        """Start the buckets that are complete with this parameter's gradient."""
        if not self._is_last_backward() or not self._engine.begins_early:
            return
        reducer = self._reducer
        if (
            reducer is None
            or self._scheduler is None
            or self._scheduler.is_of_another_pass(reducer)
        ):
            # once a pass, as is the scale, for which the host waits
            reducer = self._prepared()
            reducer.abandon()
            self._scheduler = BucketScheduler(
                reducer, self._parameters, self._scaling.scale_of_gradients()
            )
            self._scheduler.blocked = self._holds_averaged()
        if self._scheduler.blocked:
            return
        if current_stream(reducer.device) != self._stream:
            # of what is made on one stream and freed on another, the allocator may give
            # the memory away too early
            return
        for bucket in self._scheduler.complete_with(parameter):
            reducer.begin(bucket, [p.grad for p in self._parameters], scale=self._scheduler.scale)

    def _reduce_after_backward(self) -> None:
        """End of a backward pass in mode "backward"; a veto leaves NaN in p.grad, so
        that whoever looks at it skips.
        """
        if self._holds_averaged():
            raise LowRankCommError(
                'reduce_at="backward": a second backward pass came before step(), on gradients'
                " that are averaged already. To accumulate gradients, write"
                f" `{self._engine.accumulates_by}` for all passes but the last (with Accelerate"
                " `with accelerator.accumulate(model):` around all of them). Or build"
                ' CompressedOptimizer(reduce_at="step"), and clip by its max_grad_norm, or after'
                " optimizer.reduce_gradients(). To drop the first pass instead, call"
                " optimizer.zero_grad()."
            )
        if not self._is_last_backward():
            self._status = None
            return
        if not self._reduce(self._scaling.scale_of_gradients()):
            self._engine.fill_nan(self._parameters)
            self._averaged = [weakref.ref(p.grad) for p in self._parameters if p.grad is not None]

    def _settings(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm, "reduce_at": self._reduces_at}
