"""Steps that some worker has vetoed: they are counted and told, and after too many in a
row the run ends on all workers.

A veto changes nothing, so a number that is not finite, or huge, in what is kept between
steps (error memory, bases) vetoes every step that follows, and a checkpoint carries it
on. A bad gradient passes with its batch. Each worker therefore says which of its
numbers it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.numerics.linalg import unsound

_log = logging.getLogger("lowrank_comm")

MAX_VETOES = 20


def unsound_gradients(
    named: Iterable[tuple[str, Tensor]], state: Mapping[str, Tensor] | None = None
) -> str:
    """Return which parameters' gradients, or parts of the state, are not finite or
    huge; "" for none.
    """
    there = [(f"the state {symbol}", tensor) for symbol, tensor in (state or {}).items()]
    there += [(f"the gradient of {n}", p.grad) for n, p in named if p.grad is not None]
    return unsound(there, torch.finfo(torch.float32).max ** 0.5)


class SkippedSteps:
    """Counts the steps that were skipped on all workers, and warns of what is wrong.

    Args:
        veto: why a step is skipped where no worker can tell, for the message.
        max_vetoes: after how many in a row to raise; None for never.
        reset: how the user starts the state anew, a clause; "" where there is no way.
        empty: what the message says further when no worker has any gradient.

    Attributes:
        in_a_row: steps, up to the last one.
    """

    def __init__(
        self,
        veto: str,
        max_vetoes: int | None = MAX_VETOES,
        reset: str = "",
        empty: str = "",
    ) -> None:
        self._veto, self._max, self._reset, self._empty = veto, max_vetoes, reset, empty
        self._warned_empty = False
        self.in_a_row = self._counted = 0
        self._allowed = 0.0

    def start_anew(self) -> None:
        """Count from 0 again, since another state was loaded."""
        self.in_a_row = self._counted = 0

    def enter(
        self,
        step: int,
        applied: bool,
        means: Iterable[object | None],
        workers: Workers,
        unsound: str = "",
        scale: float = 1.0,
    ) -> None:
        """Enter step t; warn if it is skipped, and once if no worker had any gradient.

        Args:
            step: t.
            applied: False if it is skipped.
            means: averages of the gradients; None where no worker had one.
            workers: who has agreed on the veto.
            unsound: which of this worker's numbers were not finite; "" for none.
            scale: the loss scale s in use. From its value at the first skipped step on
                it may be lowered log2(s) times, each perhaps at the second veto only,
                so 2 log2(s) more steps are allowed.

        Raises:
            LowRankCommError: on all workers, after too many skipped steps in a row; a
                collective before it tells what each worker has found.
        """
        if applied:
            self.start_anew()
            if not self._warned_empty and all(mean is None for mean in means):
                self._warned_empty = True
                _log.warning(
                    "no worker has a gradient for any parameter of the optimizer, so nothing is"
                    " trained%s",
                    self._empty,
                )
            return
        if self._max is not None and self._counted == 0:
            self._allowed = self._max + 2 * math.ceil(math.log2(max(scale, 1.0)))
        self.in_a_row += 1
        self._counted += 1
        _log.warning(
            "step %d is skipped on all workers (%d in a row): %s",
            step,
            self.in_a_row,
            f"on rank {workers.global_rank} {unsound}" if unsound else self._veto,
        )
        if self._max is not None and self._counted >= self._allowed:
            count, self._counted = self._counted, 0
            raise LowRankCommError(self._stuck(step, count, workers.all_gather_text(unsound)))

    def _stuck(self, step: int, count: int, found: list[str]) -> str:
        """Return the message for a run that does not get on.

        Args:
            step: t.
            count: how often it was skipped.
            found: what each rank has found, "" for nothing.
        """
        told = [f"on rank {rank} {text}" for rank, text in enumerate(found) if text][:4]
        way_out = (
            "Look at the data and the loss, lower the learning rate, clip, or go on from an older"
            " checkpoint"
        )
        if any("memory" in text or "state" in text for text in told):
            reset = f"; or {self._reset}" if self._reset else ""
            way_out = (
                "The state is kept from step to step, so every later step would be skipped, too."
                f" Go on from an older checkpoint{reset}"
            )
        return (
            f"lowrank_comm: step {step} was skipped {count} times in a row"
            f" (max_vetoes={self._max}): {'; '.join(told) or self._veto}. {way_out}."
        )
