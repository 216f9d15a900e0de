"""What the benchmarks time side by side: a compressed reduction by this library, and by
PyTorch's own PowerSGD hook on equal gradients.

Both run in this process over a group of one, so that a step is what a worker computes
beside the communication: compress, decompress, error feedback. PyTorch's hook gets its
gradients in buckets of 25 MB, as from DDP.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook

from lowrank_comm import PowerSGD
from lowrank_comm.communication import Group
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.launches import Launches

BUCKET_BYTES = 25 * 2**20
ITEM = torch.float32.itemsize
SEED = 0
Shapes = Sequence[tuple[int, ...]]
Side = tuple[list[Tensor], Callable[[], None]]
"""Gradients, to be overwritten before each step, and the step."""


@dataclass(frozen=True)
class Model:
    """A LLaMA's shapes."""

    name: str
    hidden: int
    layers: int
    mlp: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all parameters in the model's order (tied embedding)."""
        h, f = self.hidden, self.mlp
        layer: list[tuple[int, ...]] = [(h, h)] * 4 + [(f, h), (f, h), (h, f), (h,), (h,)]
        return [(self.vocabulary, h), *(shape for _ in range(self.layers) for shape in layer), (h,)]

    @property
    def parameters(self) -> int:
        """How many numbers they have."""
        return elements_of(self.shapes())


MODELS = [
    Model("5M", 256, 6, 688, 2048),
    Model("20M", 512, 6, 1376, 4096),
    Model("60M", 768, 8, 2048, 8192),
]
TINY = Model("1M", 256, 1, 688, 512)


def elements_of(shapes: Shapes) -> int:
    """Return how many numbers tensors of these shapes have together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


class Bucket:
    """What DDP passes to a hook: a flat buffer and its pieces (duck typing of torch's
    GradBucket).
    """

    def __init__(
        self, index: int, last: bool, shapes: Shapes, device: torch.device | None = None
    ) -> None:
        self._index, self._last = index, last
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._buffer = torch.zeros(sum(sizes), device=device)
        self._pieces = [p.view(s) for p, s in zip(self._buffer.split(sizes), shapes, strict=True)]

    def buffer(self) -> Tensor:
        """Return the flat gradients."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Return views of the buffer in the parameters' shapes."""
        return self._pieces

    def index(self) -> int:
        """Return the bucket's number in the step."""
        return self._index

    def is_last(self) -> bool:
        """Return whether it is the step's last bucket."""
        return self._last


def buckets_of(shapes: Shapes, limit: int, device: torch.device | None = None) -> list[Bucket]:
    """Return the parameters in reverse order in buckets, as DDP makes them."""
    groups: list[list[tuple[int, ...]]] = [[]]
    filled = 0
    for shape in reversed(shapes):
        size = torch.Size(shape).numel() * ITEM
        if filled + size > limit and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(shape)
        filled += size
    return [Bucket(k, k == len(groups) - 1, group, device) for k, group in enumerate(groups)]


class Step:
    """A step of this library.

    Args:
        shapes: of the parameters.
        rank: of PowerSGD.
        group: the workers; this process alone if left out.

    Attributes:
        grads: to be overwritten before each step.
    """

    def __init__(self, shapes: Shapes, rank: int, group: Group | None = None) -> None:
        cpu = torch.device("cpu")
        slots = [ParamInfo(f"p{k}", shape, torch.float32, cpu) for k, shape in enumerate(shapes)]
        self._reducer = Reducer(slots, PowerSGD(rank), group or Group())
        self.grads = [torch.zeros(shape) for shape in shapes]

    def __call__(self) -> None:
        """Reduce the gradients and commit."""
        self._reducer.reduce(list(self.grads))
        self._reducer.commit()

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last step, by phase: "compress", "communicate", "decompress",
        "commit".
        """
        last = self._reducer.state.last_pass
        assert last is not None
        return dict(last.stats.seconds)


def ours(shapes: Shapes, rank: int) -> Side:
    """Return gradients and the step of this library; compare_commits.py times it."""
    step = Step(shapes, rank)
    return step.grads, step


def theirs(
    shapes: Shapes,
    rank: int,
    batch: bool,
    bucket_bytes: int = BUCKET_BYTES,
    device: torch.device | None = None,
) -> Side:
    """Return gradients and the step of PyTorch's hook, with error feedback and warm
    start, compressing from the first step.

    Args:
        batch: the hook's `batch_tensors_with_same_shape`.
        bucket_bytes: of the buckets at most.
        device: of the gradients; the CPU if left out.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        state = torch_hook.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            batch_tensors_with_same_shape=batch,
        )
    state.iter = 2
    buckets = buckets_of(shapes, bucket_bytes, device)
    grads = [piece for bucket in buckets for piece in bucket.gradients()]

    def step() -> None:
        for bucket in buckets:
            torch_hook.powerSGD_hook(state, bucket).wait()

    return list(reversed(grads)), step


def drawn(shapes: Shapes, generator: torch.Generator) -> list[Tensor]:
    """Return gradients as they are before a step."""
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_alike(mine: Sequence[Tensor], hook: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Check that both did the work: dense parameters are exact, matrices are
    approximated by about as much.
    """
    for a, b, g in zip(mine, hook, given, strict=True):
        if g.dim() == 1:
            assert torch.allclose(a, g)
            assert torch.allclose(b, g)
        else:
            norms = [float(x.norm()) for x in (a, b)]
            assert not torch.allclose(a, g)
            assert 0.5 < norms[0] / norms[1] < 2.0, norms


def told(counted: Launches, shapes: Shapes) -> dict[str, float]:
    """Return the counts of a step as a benchmark writes them."""
    return {
        "launches": counted.launches,
        "bytes_over_gradients": counted.bytes / (ITEM * elements_of(shapes)),
        "host_reads": counted.host_reads,
    }


class _Done:
    """An all-reduce of one worker."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> None:
        """Return at once."""

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a future that is done."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result([self._tensor])
        return future


@contextlib.contextmanager
def done_at_once() -> Iterator[None]:
    """Let all-reduces of a group of one be done when they are asked for, so that what
    the hook does afterwards runs in this thread, where it is counted.
    """
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *_, **__: _Done(tensor)
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """Set up torch.distributed for this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
