"""A toy model, DeepSpeed engines around it, and what the cases of test_deepspeed.py
compare and count.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WORLD = 2
FULL_RANK = {"compressor": "powersgd", "rank": 64, "min_compression_rate": 0}
RANK_2 = {"compressor": "powersgd", "rank": 2, "min_compression_rate": 0}
RESTARTS = {"compressor": "powersgd_plus", "rank": 2, "restart_every": 3, "min_compression_rate": 0}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCH = 4
CLIP = 0.5


class Toy(nn.Module):
    """Matrices with m > n and m < n, biases, and a matrix that `forward` uses only
    where asked.
    """

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Linear(12, 24)
        self.second = nn.Linear(24, 20, bias=False)
        self.sometimes = nn.Linear(20, 20, bias=False)
        self.last = nn.Linear(20, 5)

    def forward(self, x: Tensor, detour: bool = False) -> Tensor:
        hidden = torch.tanh(self.first(x))
        # backward within backward
        if self.recompute:
            hidden = torch.tanh(checkpoint(self.second, hidden, use_reentrant=True))
        else:
            hidden = torch.tanh(self.second(hidden))
        return self.last(torch.tanh(self.sometimes(hidden)) if detour else hidden)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """The micro-batch of a rank: different on every rank and step, the same in every
    run.
    """
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(MICRO_BATCH, 12, generator=generator)
    return x, torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2], x[:, 3].sin(), x[:, 4]], 1)


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return (output.float() - y).pow(2).mean()


def config(
    stage: int, dtype: str = "fp32", gas: int = 1, section: Any = None, **top: Any
) -> dict[str, Any]:
    """A DeepSpeed configuration; `zero` goes into its zero_optimization section,
    everything else in `top` to the top.
    """
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, **top.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if dtype != "fp32":
        result[dtype] = {"enabled": True}
    if dtype == "fp16":
        result["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    if section is not None:
        result["lowrank_comm"] = copy.deepcopy(section)
    return result | top


def seeded_toy(recompute: bool = False) -> Toy:
    torch.manual_seed(0)
    return Toy(recompute)


def engine_of(
    settings: dict[str, Any], optimizer: str = "adamw", model: nn.Module | None = None, **more: Any
) -> Any:
    import deepspeed

    model = model or seeded_toy()
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        base: Any = torch.optim.AdamW(trained, lr=0.02)
    else:
        base = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    return deepspeed.initialize(
        model=model, optimizer=base, config=settings, dist_init_required=False, **more
    )[0]


Detour = Callable[[int, int], bool]
"""(rank, step) -> whether the toy's third matrix is used."""


def nobody(rank: int, step: int) -> bool:
    return False


def train(
    engine: Any,
    steps: range,
    rank: int,
    *,
    direct: bool = False,
    nan_at: int = -1,
    nan_on: int = 0,
    detour: Detour = nobody,
) -> list[float]:
    """Optimizer steps with the engine's accumulation; the losses of this rank's
    micro-batches.
    """
    dtype = next(engine.module.parameters()).dtype
    gas = engine.gradient_accumulation_steps()
    losses = []
    for step in steps:
        for micro in range(gas):
            x, y = batch(rank, gas * step + micro)
            if step == nan_at and rank == nan_on and micro == 0:
                x = x * torch.nan
            loss = loss_of(engine(x.to(dtype), detour(rank, step)), y)
            loss.backward() if direct else engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def parameters(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, copies."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


def state(adapter: Any) -> dict[str, Any]:
    """The reducer's state, copies."""
    errors = {name: e.clone() for name, e in adapter.error_memory().items()}
    bases = {
        f"{name}/{key}": q.clone()
        for name, state in adapter.reducer.state.bases().items()
        for key, q in state.items()
    }
    return {"errors": errors, "bases": bases, "step": adapter.reducer.step}


def gap(a: Any, b: Any) -> float:
    """Largest difference between two equal structures of numbers and tensors; 0.0 is
    bit-equal (NaN equals nothing).
    """
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((gap(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((gap(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    difference = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return largest if largest == largest else float("inf")


@contextmanager
def engines(*made: Any) -> Iterator[Any]:
    """Engines that are destroyed afterwards, so that their hooks do not pile up."""
    try:
        yield made if len(made) > 1 else made[0]
    finally:
        for engine in made:
            engine.destroy()


def adapter_of(engine: Any) -> Any:
    from lowrank_comm.integrations.deepspeed import get

    adapter = get(engine)
    assert adapter is not None
    return adapter


# --- counting what is sent ---

REDUCTIONS = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
}
"""Collectives that could average gradients, and the argument that is sent."""
OTHERS = {"all_gather": "tensor", "all_gather_into_tensor": "input_tensor", "broadcast": "tensor"}
sent: list[tuple[str, int, int]] = []
"""(collective, elements, bytes) that this process handed to torch.distributed."""


def count_collectives() -> None:
    """Wrap torch.distributed before DeepSpeed keeps references to its functions."""
    for name, payload in (REDUCTIONS | OTHERS).items():
        setattr(dist, name, _counted(getattr(dist, name), payload))


def _counted(collective: Callable[..., Any], payload: str) -> Callable[..., Any]:
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments[payload]
        tensors = given if isinstance(given, list | tuple) else [given]
        sizes = [(t.numel(), t.numel() * t.itemsize) for t in tensors]
        sent.append((collective.__name__, sum(n for n, _ in sizes), sum(size for _, size in sizes)))
        return collective(*args, **kwargs)

    return counted
