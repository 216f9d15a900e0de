"""What a step costs beside its time: launches, waits of the host, memory; on a CPU as
well, where operations are counted on the path that an accelerator takes.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.device import Device
from benchmarks.gpu.outcome import Check, Found, Skipped, demand
from benchmarks.gpu.sizes import MEDIUM, SEED, parameters_of, shapes_of
from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.plan import human_bytes
from tests.support.allocations import Meter, metered
from tests.support.launches import count

RANK_4 = PowerSGD(rank=4)
WARM_UP = 3
# the step after those restarts
RESTARTS = {
    restart: PowerSGDPlus(rank=4, restart_every=WARM_UP, restart=restart)
    for restart in ("randomized", "svd")
}
LAUNCHES_A_SHAPE, LAUNCHES_A_MATRIX = 60, 1
"""How launches may grow; ours and the base optimizer's, in an ordinary step."""
WAITS = 2
"""Of the host in an ordinary step; see docs/gpu.md."""
CLOSE, ROUNDING = 1.05, 4e6
"""Of memory over the plan, and what allocators round up."""


class Stepping:
    """A plain model of a LLaMA's shapes and its optimizer, after some steps.

    Args:
        device: of the parameters.
        compressor: of the optimizer.
    """

    def __init__(self, device: Device, compressor: Compressor) -> None:
        self._device = device
        self.parameters = parameters_of(shapes_of(MEDIUM, device), device)
        named = [(f"p{k}", p) for k, p in enumerate(self.parameters)]
        base = torch.optim.SGD(named, lr=1e-3, foreach=True)
        self.optimizer = CompressedOptimizer(base, compressor, seed=SEED)

    def warm_up(self, steps: int = WARM_UP) -> None:
        """Make steps, whose buffers the libraries keep."""
        for _ in range(steps):
            self.draw()
            self.step()

    @property
    def restarts(self) -> int:
        """Matrices that restarted in the last step."""
        report = self.optimizer.last_report
        return 0 if report is None else report.restarts

    def draw(self) -> None:
        """Give each parameter a gradient."""
        for p in self.parameters:
            p.grad = torch.randn_like(p)
        self._device.wait()

    def step(self) -> None:
        """Step, and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def launches(compressor: Compressor, limited: bool) -> Callable[[Device], Found]:
    """Return a check of the operations that a step starts, SGD's own included."""

    def make(device: Device) -> Found:
        with device.path():
            stepping = Stepping(device, compressor)
            stepping.warm_up()
            stepping.draw()
            counted = count(stepping.step)
        shapes = [tuple(p.shape) for p in stepping.parameters if p.dim() == 2]
        numel = sum(p.numel() for p in stepping.parameters)
        most = LAUNCHES_A_SHAPE * len(set(shapes)) + LAUNCHES_A_MATRIX * len(shapes)
        arrays = counted.bytes / 4 / numel
        return demand(
            counted.launches <= most or not limited,
            f"{counted.launches} operations, {arrays:.1f} x the gradients' bytes,"
            f" {counted.host_reads} reads by the host; {len(shapes)} matrices in"
            f" {len(set(shapes))} shapes" + (f", at most {most}" if limited else ""),
            launches=counted.launches,
            most=most if limited else None,
            bytes_over_gradients=arrays,
            host_reads=counted.host_reads,
            restarts=stepping.restarts,
            matrices=len(shapes),
            shapes=len(set(shapes)),
            operations=dict(counted.operations.most_common(12)),
        )

    return make


def profiled(device: Device) -> Found:
    """Profile a step: no call waits for all streams of the device. What the driver was
    asked for is counted, and how long the device was busy with it.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.is_gpu
    with device.path():
        stepping = Stepping(device, RANK_4)
        stepping.warm_up()
        stepping.draw()
        with profile(activities=activities) as profiler:
            with record_function("our step"):
                stepping.step()
            device.wait()
    events = profiler.events() or []
    on_host = [one for one in events if one.device_type.name == "CPU"]
    span = next(one.time_range for one in on_host if one.name == "our step")
    calls = [one.name for one in on_host if span.start <= one.time_range.start <= span.end]
    busy = [
        one.time_range.elapsed_us() / 1e3
        for one in events
        if one.device_type.name != "CPU" and one.name != "our step"
    ]
    if device.is_gpu and not busy:
        raise Skipped("torch's profiler sees no kernel: it may not use CUPTI on this machine")
    whole = calls.count("cudaDeviceSynchronize")
    stream = calls.count("cudaStreamSynchronize")
    kernels = sum("LaunchKernel" in name for name in calls)
    copies = sum(name.startswith(("cudaMemcpy", "cudaMemset")) for name in calls)
    return demand(
        whole == 0,
        f"waits for the device {whole}, for a stream {stream}; kernels launched {kernels}, copies"
        f" {copies}; on the device {sum(busy):.2f} ms in {len(busy)} pieces, on the host"
        f" {span.elapsed_us() / 1e3:.2f} ms",
        device_waits=whole,
        stream_waits=stream,
        kernels=kernels,
        copies=copies,
        device_ms=sum(busy),
        device_pieces=len(busy),
        host_ms=span.elapsed_us() / 1e3,
        torch_operations=sum(name.startswith("aten::") for name in calls),
    )


def waits(compressor: Compressor, limited: bool) -> Callable[[Device], Found]:
    """Return a check of how often the host waits for the device in a step, and where.

    On a GPU torch warns of each wait; on a CPU the numbers are counted that the host
    reads.
    """

    def make(device: Device) -> Found:
        with device.path():
            stepping = Stepping(device, compressor)
            stepping.warm_up()
            stepping.draw()
            if device.is_gpu:
                places = _synchronizing(stepping.step)
                number, where = len(places), ", ".join(places)
            else:
                number, where = count(stepping.step).host_reads, "counted on the CPU"
        return demand(
            number <= WAITS or not limited,
            f"{number} ({where})" + (f", at most {WAITS}" if limited else ""),
            waits=number,
            restarts=stepping.restarts,
            most=WAITS if limited else None,
            where=where,
        )

    return make


def _synchronizing(step: Callable[[], None]) -> list[str]:
    """Return file and line of each wait."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "called a synchronizing" in str(one.message)
    ]


class Held:
    """Bytes that are held in parts of a `watched` block; to be asked after its end."""

    def __init__(self, device: Device, meter: Meter | None) -> None:
        self._device, self._meter = device, meter
        self._found: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as a part of this name."""
        if self._meter is not None:
            with self._meter.part(name):
                yield
            return
        self._device.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        self._device.wait()
        left, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self._found[name] = (left - before, peak - before)

    def left(self, name: str) -> int:
        """Return the bytes at a part's end beyond those at its beginning."""
        return self._found[name][0] if self._meter is None else self._meter.left(name)

    def peak(self, name: str) -> int:
        """Return the same at most."""
        return self._found[name][1] if self._meter is None else self._meter.peak(name)


@contextlib.contextmanager
def watched(device: Device) -> Iterator[Held]:
    """Watch the device's allocator: CUDA's own numbers, on a CPU torch's profiler."""
    if device.is_gpu:
        _let_libraries_keep(device)
        yield Held(device, None)
        return
    with metered() as meter:
        yield Held(device, meter)


def _let_libraries_keep(device: Device) -> None:
    """Let cuBLAS and cuSOLVER allocate now what they keep for the next call."""
    a = torch.eye(64, device=device.device).expand(2, 64, 64).contiguous()
    for x in (a, a.double()):
        lower, _ = torch.linalg.cholesky_ex(x @ x)
        torch.linalg.solve_triangular(lower.mT, x, upper=True)
        torch.linalg.qr(x)
        torch.linalg.svd(x)


def memory(compressor: Compressor, limited: bool) -> Callable[[Device], Found]:
    """Return a check that the error memory, and what a step needs beside it, are what
    the plan says, in the first step after the warm-up; without `limited` the latter is
    told only, since nobody knows what a GPU's decompositions take for themselves.
    """

    def make(device: Device) -> Found:
        with device.path(), watched(device) as held:
            with held.part("kept"):
                stepping = Stepping(device, compressor)
                plan = stepping.optimizer.plan
            stepping.warm_up()
            stepping.draw()
            with held.part("open"):
                stepping.optimizer.reduce_gradients()
            stepping.optimizer.zero_grad()
        own = sum(p.numel() * p.element_size() for p in stepping.parameters)
        kept, opened = held.left("kept") - own, held.peak("open")
        known, needs = plan.error_bytes, plan.needs
        most = max(needs.step, needs.restart) - needs.between
        bases = sum(
            tensor.numel() * tensor.element_size()
            for batch in stepping.optimizer.reducer.state.batches
            for tensor in batch.state.values()
        )
        return demand(
            kept < CLOSE * (known + bases) + ROUNDING
            and (opened < CLOSE * most + ROUNDING or not limited),
            f"kept {human_bytes(kept)} (plan {human_bytes(known)}, and bases"
            f" {human_bytes(bases)}), open {human_bytes(opened)} (plan {human_bytes(most)})",
            kept=kept,
            kept_plan=known,
            bases=bases,
            open=opened,
            open_plan=most,
        )

    return make


ORDINARY = (
    Check("launches of a step", launches(RANK_4, limited=True)),
    Check("profile of a step", profiled),
    Check("waits of the host in a step", waits(RANK_4, limited=True)),
    Check("memory of a step at most the plan's", memory(RANK_4, limited=True)),
)


def _with(name: str, compressor: Compressor) -> tuple[Check, ...]:
    step = f"of a step with {name} restarts"
    return (
        Check(f"launches {step}", launches(compressor, limited=False)),
        Check(f"waits of the host {step.replace('of', 'in', 1)}", waits(compressor, limited=False)),
        Check(
            f"memory {step}" + (", told only" if name == "svd" else " at most the plan's"),
            memory(compressor, limited=name != "svd"),
        ),
    )


# decompositions are slow: last
RESTARTING = (_with(name, compressor) for name, compressor in RESTARTS.items())
CHECKS = (*ORDINARY, *itertools.chain.from_iterable(RESTARTING))
