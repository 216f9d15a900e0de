"""The order of a step, the same for all optimizers of this library:

closure              computes the loss and the gradients, if there is one
initialise           instead of all that follows, in the step by which
                     torch.distributed.checkpoint makes an optimizer create its state
unscale              take a GradScaler's scale out of the gradients
average              over the workers; one worker whose numbers are not finite vetoes
                     the step for all of them
update               the parameters, or tell the scaler of the veto
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.optimizer.grad_scaler import LossScaling

Averaged = TypeVar("Averaged")


def run_step(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    scaling: LossScaling,
    *,
    initialise: Callable[[], None],
    average: Callable[[], Averaged | None],
    update: Callable[[Averaged], None],
    averaged_before: Callable[[], bool] = lambda: False,
) -> Any:
    """Run one step in the order above.

    Args:
        optimizer: on which a `GradScaler` that calls its step leaves `found_inf` and
            `grad_scale`.
        closure: of `step()`.
        scaling: what is known of a scaler.
        initialise: makes the optimizer's state without a step; no communication.
        average: averages over the workers; None if the step is vetoed.
        update: makes the step with what `average` returned.
        averaged_before: whether the gradients were averaged before the step.

    Returns:
        The closure's loss, or None.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if _only_initialises_state(optimizer):
        initialise()
        return loss
    # only a GradScaler that is switched on leaves it here
    if "found_inf" in vars(optimizer):
        scaling.unscale(optimizer, reduced=averaged_before())
    averaged = average()
    if averaged is None:
        scaling.overflowed()
    else:
        update(averaged)
    return loss


def _only_initialises_state(optimizer: Optimizer) -> bool:
    """Return whether torch.distributed.checkpoint is making an optimizer create its
    state.

    It does so by a step with lr 0 and zero gradients, perhaps on one rank alone. That
    is no step of the compressor: it would take the error memory and apply it with lr 0.
    The caller is looked up in the stack, since a worker's gradients may be zero in a
    real step too, and then it must take part; only where no lr tells by itself, which
    is none that is a tensor, since the host would wait for it on a GPU.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    if any(not isinstance(lr, Tensor) and lr != 0.0 for lr in rates):
        return False
    callers = itertools.islice(traceback.walk_stack(sys._getframe(1)), 9)
    if all(frame.f_code.co_name != "_init_optim_state" for frame, _ in callers):
        return False
    return all(float(lr) == 0.0 for lr in rates)
