"""Time of a step: this library, PyTorch's own PowerSGD hook on equal gradients, and a
copy of as many bytes as the gradients have, which no step can undercut.

All three run in turns in one process over a group of one, so that a step is what a
worker computes beside the communication. The clock is the host's, from the moment when
the device has nothing to do to the moment when it has nothing to do again: launches and
waits count as they do in a training. The hook synchronises the device itself.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import paired, summary
from benchmarks.gpu.device import Device
from benchmarks.gpu.outcome import Check, Found, Skipped
from benchmarks.gpu.sizes import MEDIUM, MODELS, SEED, shapes_of
from benchmarks.sides import Model, Shapes, Side, check_alike, elements_of, theirs
from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.reducer import ParamInfo, Reducer

RANKS = (4, 32)
ROUNDS, WARM_UP, LEAST = 15, 3, 3
SECONDS = 12.0
"""That the rounds of one size and rank may take; `LEAST` are made in any case."""
ARRAYS = 7
"""As large as the model, that must be there at once: gradients and error memory of
both, our workspace, and the two of a copy, of which one is what gradients come from."""


def ours(shapes: Shapes, compressor: Compressor, device: Device) -> Side:
    """Return gradients and the step of this library."""
    slots = [
        ParamInfo(f"p{k}", shape, torch.float32, device.device) for k, shape in enumerate(shapes)
    ]
    reducer = Reducer(slots, compressor, Group(), seed=SEED)
    gradients = [torch.zeros(shape, device=device.device) for shape in shapes]

    def step() -> None:
        reducer.reduce(list(gradients))
        reducer.commit()

    return gradients, step


def timed(model: Model, rank: int) -> Callable[[Device], Found]:
    """Return a "check" that times a step; nothing fails by a time."""

    def make(device: Device) -> Found:
        shapes = shapes_of(model, device)
        _need_room(shapes, device)
        with device.path():
            times = _rounds(shapes, rank, device)
        medians = {side: summary(values) for side, values in times.items()}
        ratios = {
            "over_hook": paired(times["ours"], times["hook"]),
            "over_copy": paired(times["ours"], times["copy"]),
        }
        text = ", ".join(f"{side} {found['median']:.2f} ms" for side, found in medians.items())
        hook, copy = (
            f"{found['median']:.2f} ({found['low']:.2f} .. {found['high']:.2f})"
            for found in ratios.values()
        )
        parameters = elements_of(shapes)
        return Found(
            f"{parameters / 1e6:.0f}M parameters: {text}; ours / hook {hook}, ours / copy {copy}",
            {"milliseconds": medians, "ratios": ratios, "parameters": parameters},
        )

    return make


def _need_room(shapes: Shapes, device: Device) -> None:
    """Skip a model that does not fit the GPU."""
    if device.is_gpu:
        needed, free = ARRAYS * 4 * elements_of(shapes), torch.cuda.mem_get_info()[0]
        if needed > free:
            raise Skipped(
                f"needs {needed / 2**30:.0f} GiB of the GPU's memory, and {free / 2**30:.0f} are"
                " free"
            )


def _rounds(shapes: Shapes, rank: int, device: Device) -> dict[str, list[float]]:
    """Return each side's milliseconds, by round."""
    logging.disable(logging.WARNING)
    generator = torch.Generator(device.device).manual_seed(SEED)
    whole = torch.zeros(elements_of(shapes), device=device.device)
    pieces = whole.split([torch.Size(shape).numel() for shape in shapes])
    fresh = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    mine, our_step = ours(shapes, PowerSGD(rank), device)
    hooks, their_step = theirs(shapes, rank, batch=True, device=device.device)
    target = torch.zeros_like(whole)
    sides: dict[str, tuple[list[Tensor], Callable[[], Any]]] = {
        "ours": (mine, our_step),
        "hook": (hooks, their_step),
        "copy": ([], functools.partial(target.copy_, whole)),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    begin = time.monotonic()
    for number in range(WARM_UP + (ROUNDS if device.is_gpu else LEAST)):
        if number >= WARM_UP + LEAST and time.monotonic() - begin > SECONDS:
            break
        for gradient in fresh:
            gradient.normal_(generator=generator)
        for side in sorted(sides, reverse=number % 2 == 1):
            gradients, step = sides[side]
            for gradient, given in zip(gradients, fresh, strict=False):
                gradient.copy_(given)
            spent = _milliseconds(step, device)
            if number >= WARM_UP:
                times[side].append(spent)
    check_alike(mine, hooks, fresh)
    return times


def _milliseconds(step: Callable[[], Any], device: Device) -> float:
    device.wait()
    start = time.perf_counter()
    step()
    device.wait()
    return 1e3 * (time.perf_counter() - start)


def restarted(model: Model, restart: str) -> Callable[[Device], Found]:
    """Return a "check" that times a step in which all matrices restart."""

    def make(device: Device) -> Found:
        shapes = shapes_of(model, device)
        _need_room(shapes, device)
        times: list[float] = []
        with device.path():
            compressor = PowerSGDPlus(rank=4, restart_every=1, restart=restart)  # type: ignore[arg-type]
            gradients, step = ours(shapes, compressor, device)
            begin = time.monotonic()
            while len(times) < 4 and (not times or time.monotonic() - begin < SECONDS):
                for gradient in gradients:
                    gradient.normal_()
                times.append(_milliseconds(step, device))
        # the first one makes what libraries keep
        found = summary(times[1:] or times)
        return Found(
            f"{elements_of(shapes) / 1e6:.0f}M parameters: {found['median']:.0f} ms"
            f" (n = {found['n']})",
            {"milliseconds": found, "parameters": elements_of(shapes)},
        )

    return make


# the small models first: what the time does not suffice for are the large ones
CHECKS = (
    *(
        Check(f"time of a step, {model.name}, rank {rank}", timed(model, rank))
        for model in MODELS
        for rank in RANKS
    ),
    *(
        Check(f"time of a step with {restart} restarts, {MEDIUM.name}", restarted(MEDIUM, restart))
        for restart in ("randomized", "svd")
    ),
)
