"""The methods that are timed side by side: one model, one optimizer, and what averages
the gradients between the hosts.

Every method gets a LLaMA of its own with the same weights, SGD without momentum (so
that fifteen models fit a machine), and a batch of one sequence. Peers are set up as
their documents say, at the same rank.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus, Quantization
from lowrank_comm.communication.ledger import Ledger

HOSTS = 4
# of HSDP
NODES = 2
RANK = 4
RESTART_EVERY = 200
SEQUENCE = 32
LEARNING_RATE = 1e-3
# hidden, layers, MLP, heads, vocabulary; the embedding is tied
MODELS = {
    "1M": (128, 4, 344, 4, 2048),
    "5M": (256, 6, 688, 4, 2048),
    "21M": (512, 6, 1376, 8, 4096),
}


@dataclass
class Setting:
    """What a method is built from.

    Attributes:
        model: a key of `MODELS`.
        epfml: the folder with epfml's package `powersgd`, for the methods that need it.
    """

    model: str
    epfml: str | None = None

    def new_model(self) -> nn.Module:
        """Return the model; the same weights each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, layers, mlp, heads, vocabulary = MODELS[self.model]
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                intermediate_size=mlp,
                num_attention_heads=heads,
                vocab_size=vocabulary,
                tie_word_embeddings=True,
                use_cache=False,
                max_position_embeddings=256,
            )
        )

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return MODELS[self.model][-1]


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Return the base optimizer of all methods."""
    return torch.optim.SGD(list(model.named_parameters()), lr=LEARNING_RATE)


@dataclass
class Loop:
    """A training loop that is built and waits for its next step.

    Attributes:
        step: one step on a batch of tokens.
        ledger: of the library's reducer; None for a peer.
        hosts: that average by that reducer (fewer than all where nodes are workers).
        close: gives back what the loop has registered elsewhere.
    """

    step: Callable[[Tensor], None]
    ledger: Callable[[], Ledger] | None = None
    hosts: int | None = None
    close: Callable[[], None] = lambda: None


def _train(model: nn.Module, optimizer: Any, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- peers


def ddp(setting: Setting, hook: Callable[..., Any] | None = None) -> Loop:
    """PyTorch's DDP, in its buckets of 25 MB, as it is or with a hook without state."""
    model = DistributedDataParallel(setting.new_model())
    if hook is not None:
        model.register_comm_hook(None, hook)
    return Loop(partial(_train, model, sgd(model)))


def ddp_fp16(setting: Setting) -> Loop:
    """DDP that sends float16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return ddp(setting, fp16_compress_hook)


def torch_hook(setting: Setting) -> Loop:
    """PyTorch's own PowerSGD, warm start and error feedback, compressing as early as it
    can. All gradients are one bucket: with more, its collectives run in another order
    on other ranks, and gloo aborts.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    model = DistributedDataParallel(setting.new_model(), bucket_cap_mb=100_000)
    state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=RANK,
        start_powerSGD_iter=2,
        use_error_feedback=True,
        warm_start=True,
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return Loop(partial(_train, model, sgd(model)))


def epfml(setting: Setting, products: int) -> Loop:
    """The package of PowerSGD's authors. One product of a step makes P or Q, in turn;
    two make both, as the paper's algorithm and the other methods do.
    """
    if setting.epfml is not None and setting.epfml not in sys.path:
        sys.path.insert(0, setting.epfml)
    import powersgd

    model = setting.new_model()
    optimizer = sgd(model)
    config = powersgd.Config(
        rank=RANK, num_iters_per_step=products, start_compressing_after_num_steps=0
    )
    aggregator = powersgd.PowerSGD(list(model.parameters()), config)

    def step(tokens: Tensor) -> None:
        # p.grad is the error memory: nobody clears it
        model(input_ids=tokens, labels=tokens).loss.backward()
        powersgd.optimizer_step(optimizer, aggregator)

    return Loop(step)


# ---------------------------------------------------------------- this library


def ours(setting: Setting, compressor: Any = None, **options: Any) -> Loop:
    """A plain loop with a `CompressedOptimizer`."""
    model = setting.new_model()
    compressor = PowerSGD(RANK) if compressor is None else compressor
    optimizer = CompressedOptimizer(sgd(model), compressor, **options)
    return Loop(partial(_train, model, optimizer), lambda: optimizer.ledger)


def overlapped(setting: Setting) -> Loop:
    """The same, with buckets of a quarter of the gradients that start in backward."""
    megabytes = sum(p.numel() for p in setting.new_model().parameters()) * 4 / 1e6
    return ours(setting, reduce_at="backward", overlap=True, bucket_cap_mb=megabytes / 4)


def zero1(setting: Setting, compressed: bool) -> Loop:
    """DeepSpeed, the optimizer's state and steps sharded over the hosts."""
    import deepspeed

    from lowrank_comm.integrations.deepspeed import get, skip_shm_extension

    skip_shm_extension()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if compressed:
        config["lowrank_comm"] = {"compressor": "powersgd", "rank": RANK}
    model = setting.new_model()
    base = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    with redirect_stdout(io.StringIO()):
        engine = deepspeed.initialize(
            model=model, optimizer=base, config=config, dist_init_required=False
        )[0]

    def step(tokens: Tensor) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    ledger = (lambda: get(engine).ledger) if compressed else None
    return Loop(step, ledger, close=engine.destroy)


def hsdp(setting: Setting, compressed: bool) -> Loop:
    """FSDP2 over two nodes of two hosts: sharded inside a node, averaged between."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (NODES, HOSTS // NODES), mesh_dim_names=("replicate", "shard"))
    model = setting.new_model()
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    if not compressed:
        return Loop(partial(_train, model, sgd(model)))
    optimizer = CompressedOptimizer(sgd(model), PowerSGD(RANK))
    with redirect_stdout(io.StringIO()):
        optimizer.attach(model)
    return Loop(partial(_train, model, optimizer), lambda: optimizer.ledger, NODES)


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        label: as the tables call it.
        build: makes the loop; a collective.
        warm_up: steps before the first that is like all others.
        cycle: after how many steps the same is sent again.
        peers: for a method of this library, what a user would run instead; empty for a
            peer.
    """

    label: str
    build: Callable[[Setting], Loop]
    warm_up: int = 1
    cycle: int = 1
    peers: tuple[str, ...] = ()


def _mine(label: str, build: Callable[[Setting], Loop], *peers: str) -> Method:
    return Method(label, build, peers=peers or (BASELINE, "ddp_fp16", "torch_hook", *EPFML))


BASELINE, DEFAULT = "ddp", "powersgd_plus"
EPFML = ("epfml", "epfml_one")
METHODS = {
    "ddp": Method("DDP, fp32", ddp),
    "ddp_fp16": Method("DDP, fp16_compress_hook", ddp_fp16),
    # two steps uncompressed, and one that makes its bases
    "torch_hook": Method("DDP, powerSGD_hook rank 4", torch_hook, warm_up=3),
    "epfml": Method("epfml powersgd rank 4, P and Q", partial(epfml, products=2)),
    "epfml_one": Method("epfml powersgd rank 4, P or Q", partial(epfml, products=1), cycle=2),
    "zero1_plain": Method("ZeRO-1, uncompressed", partial(zero1, compressed=False)),
    "hsdp_plain": Method("HSDP 2 x 2, uncompressed", partial(hsdp, compressed=False)),
    "powersgd": _mine("ours: PowerSGD rank 4", ours),
    "powersgd_plus": _mine(
        "ours: PowerSGD+ rank 4",
        lambda setting: ours(setting, PowerSGDPlus(RANK, restart_every=RESTART_EVERY)),
    ),
    "overlap": _mine("ours: PowerSGD rank 4, overlap", overlapped),
    "bf16": _mine(
        "ours: PowerSGD rank 4, bf16 wire", lambda setting: ours(setting, wire_dtype="bfloat16")
    ),
    "int8": _mine(
        "ours: PowerSGD rank 4, int8 factors",
        lambda setting: ours(setting, quantization=Quantization(factors="int8")),
    ),
    "zero1": _mine(
        "ours: PowerSGD rank 4, ZeRO-1", partial(zero1, compressed=True), BASELINE, "zero1_plain"
    ),
    "hsdp": _mine(
        "ours: PowerSGD rank 4, HSDP 2 x 2", partial(hsdp, compressed=True), BASELINE, "hsdp_plain"
    ),
}
