"""At the first step: were the gradients averaged already, by an engine that nobody has
connected?

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
from lowrank_comm.communication.ledger import Ledger
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import LowRankCommError

_log = logging.getLogger("lowrank_comm")

ATTACH = (
    "Connect it by optimizer.attach(model), with the model as it is wrapped, before the first step"
    " (Hugging Face Trainer: callbacks=[CompressionCallback(optimizer)]; Accelerate:"
    " lowrank_comm.integrations.accelerate.prepare)."
)


class DoubleAveragingGuard:
    """What happened during the backward passes before an optimizer's first step.

    Args:
        advice: what to do about an engine that has averaged the gradients.
    """

    def __init__(self, advice: str = ATTACH) -> None:
        self._advice = advice
        self._pass: int | None = None
        self._happened = self._checked = False

    @property
    def collectives_happened(self) -> bool:
        """Whether there were collectives, of anybody, during those passes."""
        return self._happened

    def gradient(self) -> None:
        """A gradient has arrived, in a backward pass."""
        if self._checked or self._pass == torch._C._current_graph_task_id():
            return
        self._pass = torch._C._current_graph_task_id()
        before = collectives_so_far()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        me = weakref.ref(self)

        def at_end() -> None:
            there = me()
            if there is not None:
                there._happened |= collectives_so_far() > before

        # behind the callbacks of engines such as DDP
        queue(lambda: queue(at_end))

    def check(self, grads: Sequence[Tensor | None], workers: Workers, ledger: Ledger) -> None:
        """Refuse gradients that were averaged already; a collective.

        Args:
            grads: this worker's.
            workers: of the run.
            ledger: filled in.

        Raises:
            LowRankCommError: on all ranks.
        """
        self._checked = True
        _refuse_averaged(grads, workers, ledger, self._happened, self._advice)


def _refuse_averaged(
    grads: Sequence[Tensor | None],
    workers: Workers,
    ledger: Ledger,
    collectives_happened: bool,
    advice: str,
) -> None:
    """At the first step: an engine has averaged gradients already. A collective.

    They then have the same bits on all ranks, and there were collectives during the
    backward pass. Equal gradients without collectives come from equal data, or were
    averaged by hand, which is warned about.

    Args:
        grads: this worker's.
        workers: of the run.
        collectives_happened: between the first gradient of the backward pass and its
            end, by anybody.
        advice: what to do about it.

    Raises:
        LowRankCommError: on all workers.
    """
    if workers.world_size == 1 or not workers.group.initialised:
        return
    there = [grad for grad in grads if grad is not None]
    mine = (
        f"{fingerprint(there)} {collectives_happened:d}"
        if any(bool(grad.any()) for grad in there)
        else ""
    )
    # all ranks of all nodes, so that all come to the same verdict
    told = workers.all_gather_text(mine)
    ledger.bytes["fingerprint"] += len(mine) + LENGTH_BYTES
    if not mine or len({words.split()[0] if words else "" for words in told}) > 1:
        return
    if all(words.endswith(" 1") for words in told):
        raise LowRankCommError(
            f"all {len(told)} ranks came to the first step with the same gradients, bit for bit,"
            " after collectives during the backward pass: an engine has averaged them already, and"
            " compression would save nothing. " + advice
        )
    if workers.is_writer:
        _log.warning(
            "all %d workers have the same gradients at the first step: do they train on the same"
            " data, or has somebody averaged the gradients already?",
            len(told),
        )
