"""Which buckets may start while a backward pass goes on: those whose gradients have all
arrived, in their order.

A bucket that is complete waits for those before it, since all workers must begin
buckets in one order. A parameter that gets no gradient in this pass keeps its bucket,
and those after it, from starting early; they start when the pass ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_comm.reduction.reducer import Reducer


class BucketScheduler:
    """Gradients of one backward pass.

    Args:
        reducer: whose buckets are to start.
        parameters: in slot order.
        scale: the loss scale that the gradients carry.

    Attributes:
        blocked: nothing is to start in this pass.
    """

    def __init__(self, reducer: Reducer, parameters: Sequence[Tensor], scale: float) -> None:
        self.scale, self.blocked = scale, False
        self._pass, self._reducer = torch._C._current_graph_task_id(), reducer
        self._bucket_of = {
            id(parameters[k]): number
            for number, bucket in enumerate(reducer.state.buckets)
            for k in bucket.slots
        }
        self._missing = [len(bucket.slots) for bucket in reducer.state.buckets]
        self._next = 0
        self._seen: set[int] = set()

    def is_of_another_pass(self, reducer: Reducer) -> bool:
        """Whether another backward pass is under way now."""
        return reducer is not self._reducer or self._pass != torch._C._current_graph_task_id()

    def complete_with(self, parameter: Tensor) -> list[int]:
        """Buckets that may start now that the gradient of `parameter` is there."""
        if id(parameter) not in self._bucket_of or id(parameter) in self._seen:
            return []
        self._seen.add(id(parameter))
        self._missing[self._bucket_of[id(parameter)]] -= 1
        ready = []
        while self._next < len(self._missing) and self._missing[self._next] == 0:
            ready.append(self._next)
            self._next += 1
        return ready
