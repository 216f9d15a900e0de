"""A compressor's step on matrices that are equal on all workers, such as means that
were just averaged whole: every average that it asks for is known without a collective.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

from torch import Tensor

from lowrank_comm.compressors.requests import Mean, Request, SumOverRows

Ended = TypeVar("Ended")


def step_on_mean(steps: Generator[Request, Any, Ended]) -> Generator[Request, Any, Ended]:
    """Carry out a step whose averages are of equal numbers: of what it asks for, only
    sums inside a node and the like remain to be answered.

    Args:
        steps: of a compressor, see `compressors.base`.
    """
    answer: object = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            ended: Ended = end.value
            return ended
        if isinstance(request, Mean):
            tensor: Tensor = request.tensor
            if request.over_rows:
                tensor = yield SumOverRows(tensor)
            answer = (tensor, tensor)
        else:
            answer = yield request
