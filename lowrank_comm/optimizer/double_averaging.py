"""First-step guard: detects gradients that an engine such as DDP has averaged already.

Such gradients have the same bits on all ranks, and the engine has made collectives
during the backward pass. So the collectives of each backward pass before the first step
are counted (of several micro-batches, the last may be the only one with any), from its
first gradient to its end, when engines have finished, and the gradients' bits are
compared once.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_comm.communication.agreement import fingerprint
from lowrank_comm.communication.group import LENGTH_BYTES, collectives_so_far
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import LowRankCommError
from lowrank_comm.optimizer.backward_hooks import after_engines

_log = logging.getLogger("lowrank_comm")

ATTACH = (
    "Connect it by optimizer.attach(model), with the model as it is wrapped, before the first step"
    " (Hugging Face Trainer: callbacks=[CompressionCallback(optimizer)]; Accelerate:"
    " lowrank_comm.integrations.accelerate.prepare)."
)


class DoubleAveragingGuard:
    """Watches the backward passes before an optimizer's first step, and checks the
    gradients of that step once.

    Args:
        consequence: ends the message after "an engine has averaged them already"; what
            to do about it.
        error: what is raised.
    """

    def __init__(
        self,
        consequence: str = f", and compression would save nothing. {ATTACH}",
        error: type[LowRankCommError] = LowRankCommError,
    ) -> None:
        self._consequence, self._error = consequence, error
        self._pass: int | None = None
        self._collectives_happened = self._checked = False

    def gradient(self) -> None:
        """Notice that a gradient has arrived, in a backward pass."""
        if self._checked or self._pass == torch._C._current_graph_task_id():
            return
        self._pass = torch._C._current_graph_task_id()
        before = collectives_so_far()
        me = weakref.ref(self)

        def at_end() -> None:
            guard = me()
            if guard is not None:
                guard._collectives_happened |= collectives_so_far() > before

        after_engines(at_end)

    def check(self, grads: Sequence[Tensor | None], workers: Workers) -> int:
        """Refuse gradients that were averaged already; a collective.

        Equal gradients without collectives come from equal data, or were averaged by
        hand, which is warned about.

        Args:
            grads: this worker's.
            workers: of the run.

        Returns:
            Bytes that this rank sent for it.

        Raises:
            LowRankCommError: on all ranks; or the error that was asked for.
        """
        self._checked = True
        if workers.world_size == 1 or not workers.group.initialised:
            return 0
        # without those that no worker can average, of which the reduction tells
        there = [
            grad
            for grad in grads
            if grad is not None
            and grad.layout is torch.strided
            and grad.is_floating_point()
            and not grad.is_meta
        ]
        mine = ""
        if any(bool(grad.any()) for grad in there):
            mine = f"{fingerprint(there)} {self._collectives_happened:d}"
        # all ranks of all nodes, so that all come to the same verdict
        told = workers.all_gather_text(mine)
        sent = len(mine) + LENGTH_BYTES
        if not mine or len({words.split()[0] if words else "" for words in told}) > 1:
            return sent
        if all(words.endswith(" 1") for words in told):
            raise self._error(
                f"all {len(told)} ranks came to the first step with the same gradients, bit for"
                " bit, after collectives during the backward pass: an engine has averaged them"
                f" already{self._consequence}"
            )
        if workers.is_writer:
            _log.warning(
                "all %d workers have the same gradients at the first step: do they train on the"
                " same data, or were the gradients averaged already?",
                len(told),
            )
        return sent
