"""Counter-based random draws: the same numbers on every worker, on any device, at any
world size, in any order of calls.

Every draw is a pure function of (seed, parameter name, step t, purpose). The global
random state of torch is never touched. Draws are made on the CPU in float32 and cast
afterwards, because generators of different device types give different numbers for one
seed; to an accelerator they go from pinned memory, for which the host does not wait.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_comm.numerics.device import on_device


def stream(seed: int, name: str, t: int, purpose: str) -> torch.Generator:
    """Return a generator keyed by (seed, name, t, purpose).

    Args:
        seed: the run's seed, equal on all workers.
        name: parameter name.
        t: step counter, from 0; -1 for draws that do not belong to a step.
        purpose: what the numbers are for, so that two draws of one step are
            independent.

    Returns:
        A fresh CPU generator.
    """
    key = f"{seed}\x00{name}\x00{t}\x00{purpose}".encode()
    value = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & (2**63 - 1)
    return torch.Generator("cpu").manual_seed(value)


def _draw(
    sample: Callable[..., Tensor],
    seed: int,
    names: Sequence[str],
    t: int,
    purpose: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw tensors, one for each name.

    Args:
        sample: of torch, `randn` or `rand`.
        seed, t, purpose: see `stream`.
        names: one parameter name for each matrix of the batch; a batch draws what its
            members would draw alone.
        shape: shape of one draw.
        dtype, device: of the result.

    Returns:
        Tensor of shape (len(names), *shape).
    """
    # torch's default dtype and default device must not matter
    draws = [
        sample(shape, generator=stream(seed, name, t, purpose), dtype=torch.float32, device="cpu")
        for name in names
    ]
    return on_device(torch.stack(draws), device).to(dtype)


gaussian = functools.partial(_draw, torch.randn)
"""Draw standard normal tensors; see `_draw`."""
uniform = functools.partial(_draw, torch.rand)
"""Draw tensors uniform in [0, 1); see `_draw`."""
