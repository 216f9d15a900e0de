"""Decides when the gradients of a backward pass are averaged: in `step()`, at the end
of the last backward pass of a step, or, with overlap, bucket by bucket during that
pass.

Averaged gradients become true when the base optimizer steps: then the reducer's pending
pass is committed (`settle`). If they are given up before that, the pass is rolled back,
and error memory, bases, restarts and step counter are as if the batch had never been
seen. Gradients are given up by `optimizer.zero_grad()`, which calls `forget`; or
without a word to the optimizer, by `model.zero_grad()` or `p.grad = None`, which is
seen in `p.grad` when the base steps or the next pass begins.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowrank_comm.errors import LowRankCommError
from lowrank_comm.numerics.device import current_stream
from lowrank_comm.optimizer.attachment import Attachment
from lowrank_comm.optimizer.backward_hooks import runs_last
from lowrank_comm.optimizer.double_averaging import DoubleAveragingGuard
from lowrank_comm.optimizer.lazy_reducer import LazyReducer
from lowrank_comm.reduction.divergence import DivergenceCheck
from lowrank_comm.reduction.reducer import Reducer


class BackwardReduction:
    """Watches backward passes and starts the averaging where it is due.

    Args:
        attachment: knows the engine and the scaler.
        lazy: makes the reducer.
        reduce: averages gradients that carry this loss scale into `p.grad`; returns
            False for a veto.
        reduce_at: "step", "backward", or None for what the engine needs.
        overlap: whether buckets start during the backward pass.
        divergence: a comparison of all ranks that comes before some passes, if there is
            one; then no bucket starts early.

    Attributes:
        asked, overlap: `reduce_at` and `overlap` as they were given.
        verdict: on the gradients in `p.grad`: None while they are as backward has left
            them, True when they were averaged, False when that was vetoed.
        is_last: says whether the backward pass that ends is the last one of its step;
            None if nothing does beside the engine.
        double_averaging: looks for engines that average as well.
    """

    def __init__(
        self,
        attachment: Attachment,
        lazy: LazyReducer,
        reduce: Callable[[float], bool],
        reduce_at: str | None,
        overlap: bool,
        divergence: DivergenceCheck | None = None,
    ) -> None:
        self._divergence = divergence
        self._attachment, self._lazy, self._reduce = attachment, lazy, reduce
        self.asked, self.overlap = reduce_at, overlap
        self.verdict: bool | None = None
        self.is_last: Callable[[], bool] | None = None
        self.double_averaging = DoubleAveragingGuard()
        # the verdict of the last pass until its step is counted
        self._uncounted: bool | None = None
        self._only_accumulates = False
        # the gradients that were averaged last, by place of their slot, each with its
        # version when it was put into p.grad
        self._averaged: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        # the backward pass in which it was last asked whether they were zeroed
        self._looked_in = -1
        self._look_before_adding = RemovableHandle(OrderedDict())
        self._scheduler: BucketScheduler | None = None
        # that of the last reduction
        self._stream: Any = None

    @property
    def reduces_at(self) -> str:
        """When gradients are averaged: at "step" or "backward"."""
        if self._attachment.detached:
            return "step"
        if self.asked is not None:
            return self.asked
        at_backward = self.overlap or self.is_last is not None
        return "backward" if at_backward else self._attachment.engine.reduces_at

    def watch(self) -> None:
        """Notice gradients, also of parameters that are new, and the ends of backward
        passes.
        """
        at_end = self._pass_has_ended if self.reduces_at == "backward" else None
        self._attachment.watch(self._gradient_has_arrived, at_end)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes inside only accumulate."""
        before, self._only_accumulates = self._only_accumulates, True
        try:
            yield
        finally:
            self._only_accumulates = before

    # ------------------------------------------------------------ gradients in p.grad

    def begins(self, reducer: Reducer) -> None:
        """Drop the buckets of a backward pass that has failed; with overlap, called
        before a pass of all buckets.
        """
        self._stream = current_stream(reducer.device)
        if reducer.begun and self._scheduler_of(reducer) is None:
            reducer.abandon()

    def ended(self, verdict: bool) -> None:
        """Remember the verdict of a pass, and which gradients it is about."""
        self.verdict = self._uncounted = verdict
        self._averaged = {
            k: (weakref.ref(p.grad), p.grad._version)
            for k, p in enumerate(self._lazy.parameters)
            if p.grad is not None
        }
        self._look_before_adding.remove()
        if len(self._averaged) == 1:
            self._look_before_adding = self._looks_before_adding(*self._averaged)

    def forget(self) -> None:
        """Give averaged gradients up: forget them, and the pass that has made them."""
        self.verdict, self._averaged = None, {}
        self._count_skipped()
        self._uncounted = None
        if self._lazy.made is not None:
            self._lazy.made.rollback()

    def count_step(self) -> None:
        """Count a step, applied or vetoed, for the comparison of every K-th one."""
        self._uncounted = None
        if self._divergence is not None:
            self._divergence.steps += 1

    def _count_skipped(self) -> None:
        """Count the step of a vetoed pass, if the loop has skipped it by itself: it saw
        NaN in `p.grad`, and called neither this optimizer's step nor the base's. Ranks
        may notice it in different places, but all before their next pass.
        """
        if self._uncounted is False:
            self.count_step()

    def settle(self, stepping: bool) -> None:
        """Commit a pending pass for the averaged gradients that are in use, and roll it
        back for those that were given up. The same is to happen on all workers.

        Args:
            stepping: the base is about to step with what is in `p.grad`, be it the
                averaged gradient or what the caller has made of it. Else another pass
                is about to begin, and what matters is whether gradients are still
                added to the averaged ones.
        """
        if stepping and self._uncounted is not None:
            self.count_step()
        self._count_skipped()
        reducer = self._lazy.made
        if reducer is None or not reducer.pending:
            return
        used = self._in_use(stepping)
        if used or (stepping and not self._averaged):
            reducer.commit(self._averaged.keys() - used)
            self.verdict, self._averaged = None, {}
        else:
            self.forget()

    def _in_use(self, stepping: bool) -> set[int]:
        """Return the places of the averaged gradients that were not given up."""
        parameters = self._lazy.parameters
        return {
            k
            for k, (averaged, _) in self._averaged.items()
            if (grad := parameters[k].grad) is not None and (stepping or grad is averaged())
        }

    def were_dropped(self) -> bool:
        """Return whether averaged gradients were set to None since."""
        return bool(self._averaged) and not self._in_use(stepping=True)

    def _waits_for_step(self) -> bool:
        """Return whether gradients wait in `p.grad` that were averaged for a step which
        has not been made.
        """
        return self.verdict is not None and bool(self._in_use(stepping=False))

    def _looks_before_adding(self, place: int) -> RemovableHandle:
        """Let the next backward pass look at the only averaged gradient before it adds
        to it; where there are several, the others tell.
        """
        me = weakref.ref(self)

        def look(_: Tensor) -> None:
            there = me()
            if there is not None:
                there._notice_zeroed(None)

        handle: RemovableHandle = self._lazy.parameters[place].register_hook(look)
        return handle

    def _notice_zeroed(self, parameter: Tensor | None) -> None:
        """Give averaged gradients up that were set to zero in place, as by
        `model.zero_grad(set_to_none=False)`.

        Args:
            parameter: the first one to which the new backward pass has added; None
                before it has added to any.
        """
        this_pass = torch._C._current_graph_task_id()
        if self._looked_in == this_pass or not self._averaged:
            return
        self._looked_in = this_pass
        local, parameters = self._attachment.engine.local, self._lazy.parameters
        others = [
            (parameters[k].grad, version)
            for k, (_, version) in self._averaged.items()
            if parameters[k] is not parameter
        ]
        if others and all(
            grad is not None and grad._version != version and not local(grad).any()
            for grad, version in others
        ):
            self.forget()

    # ---------------------------------------------------------------- a backward pass

    def _is_last_backward(self) -> bool:
        if self._only_accumulates or not self._attachment.engine.is_last_backward():
            return False
        return self.is_last is None or self.is_last()

    def _gradient_has_arrived(self, parameter: Tensor) -> None:
        self.double_averaging.gradient()
        self._notice_zeroed(parameter)
        if self.reduces_at == "step":
            self.verdict = None
        elif self.overlap and (reducer := self._lazy.made) is not None and reducer.state.last_pass:
            self._begin_early(reducer, parameter)

    def _begin_early(self, reducer: Reducer, parameter: Tensor) -> None:
        """Start the buckets that are complete with this parameter's gradient."""
        self._count_skipped()
        if self._divergence is not None and self._divergence.is_due:
            return
        if not self._is_last_backward() or not self._attachment.engine.begins_early:
            return
        scheduler = self._scheduler_of(reducer)
        if scheduler is None:
            # once a pass, as is the scale, for which the host waits
            blocked = self._waits_for_step()
            if not blocked:
                self.settle(stepping=False)
            reducer = self._lazy.prepare()
            reducer.abandon()
            scale = self._attachment.scaling.scale_of_gradients()
            scheduler = BucketScheduler(reducer, self._lazy.parameters, scale)
            scheduler.blocked = blocked
            self._scheduler = scheduler
        if scheduler.blocked:
            return
        if current_stream(reducer.device) != self._stream:
            # of what is made on one stream and freed on another, the allocator may give
            # the memory away too early
            return
        if not runs_last(parameter):
            # its bucket starts when the pass ends, and in the next one with the others
            self._attachment.watch_last(parameter)
            return
        for bucket in scheduler.complete_with(parameter):
            gradients = [p.grad for p in self._lazy.parameters]
            reducer.begin(bucket, gradients, scale=scheduler.scale)

    def _scheduler_of(self, reducer: Reducer) -> BucketScheduler | None:
        """Return the scheduler of this backward pass, if it has begun buckets of this
        reducer.
        """
        there = self._scheduler
        return there if there is not None and there.is_of_this_pass(reducer) else None

    def _pass_has_ended(self) -> None:
        """Average, if it was the last backward pass of its step. A veto leaves NaN in
        p.grad, so that a loop that looks at it skips the step.
        """
        engine = self._attachment.engine
        if self._waits_for_step():
            raise LowRankCommError(
                'reduce_at="backward": a second backward pass came before step(), on gradients'
                " that are averaged already. To accumulate gradients, write"
                f" `{engine.accumulates_by}` for all passes but the last (with Accelerate"
                " `with accelerator.accumulate(model):` around all of them). Or build"
                ' CompressedOptimizer(reduce_at="step"), and clip by its max_grad_norm, or after'
                " optimizer.reduce_gradients(). To drop the first pass instead, call"
                " optimizer.zero_grad()."
            )
        if not self._is_last_backward():
            self.verdict = None
            return
        if not self._reduce(self._attachment.scaling.scale_of_gradients()):
            engine.fill_nan(self._lazy.parameters)
            self.ended(False)


class BucketScheduler:
    """Says which buckets may start while a backward pass goes on: those whose gradients
    have all arrived, in their order.

    A bucket that is complete waits for those before it, since all workers must begin
    buckets in one order. A parameter that gets no gradient in this pass keeps its
    bucket, and those after it, from starting early; they start when the pass ends.

    Args:
        reducer: whose buckets are to start.
        parameters: in slot order.
        scale: the loss scale that the gradients of this pass carry.

    Attributes:
        blocked: nothing is to start in this pass.
    """

    def __init__(self, reducer: Reducer, parameters: Sequence[Tensor], scale: float) -> None:
        self.scale, self.blocked = scale, False
        self._pass, self._reducer = torch._C._current_graph_task_id(), reducer
        # ids of parameters, bucket by bucket
        self._missing = [
            {id(parameters[k]) for k in bucket.slots} for bucket in reducer.state.buckets
        ]
        self._bucket_of = {one: missing for missing in self._missing for one in missing}
        self._next = 0

    def is_of_this_pass(self, reducer: Reducer) -> bool:
        """Return whether this backward pass, and this reducer, are in use now."""
        return reducer is self._reducer and self._pass == torch._C._current_graph_task_id()

    def complete_with(self, parameter: Tensor) -> list[int]:
        """Return the buckets that may start now that this gradient is there."""
        self._bucket_of.get(id(parameter), set()).discard(id(parameter))
        ready = []
        while self._next < len(self._missing) and not self._missing[self._next]:
            ready.append(self._next)
            self._next += 1
        return ready
