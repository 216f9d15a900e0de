"""The same training loop under every engine: a plain model, DDP, FSDP2, HSDP, and
DeepSpeed without a Trainer.

    torchrun --nproc_per_node 4 examples/train_engines.py --engine hsdp
    torchrun --nproc_per_node 2 examples/train_engines.py --engine ddp --no-compression

trains a small LLaMA from nothing on Shakespeare, on GPUs or, where there are none, on
the CPU. Everything that an engine needs is in `wrap`; the loop is one for all but
DeepSpeed, whose engine steps by itself. Every rank draws batches of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.communication import leave
from lowrank_comm.lab.data.corpora import Corpus, load_corpus

ENGINES = ("plain", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
CLIP = 1.0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--rank", type=int, default=4, help="of the factors")
    parser.add_argument("--restart-every", type=int, default=20)
    parser.add_argument(
        "--nodes",
        type=int,
        default=2,
        help="for hsdp; and for the others two levels, if --two-levels",
    )
    parser.add_argument(
        "--two-levels", action="store_true", help="exact inside a node, for plain, ddp and zero1-3"
    )
    parser.add_argument("--shard-scope", choices=("shard", "matrix"), default="shard")
    parser.add_argument(
        "--overlap", action="store_true", help="start compressing during backward (plain, ddp)"
    )
    parser.add_argument(
        "--no-compression", action="store_true", help="the engine's own averaging (not for plain)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and micro-batch")
    given = parser.parse_args()
    if given.no_compression and given.engine == "plain":
        parser.error(
            "--engine plain has no averaging of its own; take another engine, or leave"
            " --no-compression out"
        )
    return given


def new_model(corpus: Corpus) -> LlamaForCausalLM:
    """A LLaMA of about half a million parameters, the same on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def wrap(
    given: argparse.Namespace, model: nn.Module, device: torch.device
) -> tuple[nn.Module, Any]:
    """The model as its engine wants it, and the process_group for the optimizer (None:
    the engine's own).
    """
    model.to(device)
    if given.engine in ("fsdp2", "hsdp"):
        mesh = grid(given, device) if given.engine == "hsdp" else None
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, None
    group = grid(given, device) if given.two_levels else None
    if given.engine == "ddp":
        return DistributedDataParallel(model), group
    return model, group


def grid(given: argparse.Namespace, device: torch.device) -> Any:
    """(nodes, ranks in a node)."""
    world = dist.get_world_size()
    if given.nodes < 1 or world % given.nodes:
        raise SystemExit(f"--nodes {given.nodes}: {world} ranks cannot be cut into that many nodes")
    return init_device_mesh(
        device.type, (given.nodes, world // given.nodes), mesh_dim_names=("replicate", "shard")
    )


@contextlib.contextmanager
def micro_batch(
    given: argparse.Namespace, model: nn.Module, optimizer: Any, last: bool
) -> Iterator[None]:
    """Says in each engine's words whether this backward pass is the last one of its
    step.
    """
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
    elif given.engine == "hsdp":
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        yield
    elif given.engine == "fsdp2":
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
    else:
        with contextlib.nullcontext() if last else optimizer.no_sync():
            yield


def batches(
    corpus: Corpus, given: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches; every rank draws from all blocks with a seed of its own."""
    blocks, _ = corpus.split(held_out=40_000, block=128)
    generator = torch.Generator().manual_seed(dist.get_rank())
    while True:
        rows = [
            blocks[k]["input_ids"]
            for k in torch.randint(len(blocks), (given.batch,), generator=generator).tolist()
        ]
        tokens = torch.stack(rows).to(device)
        yield {"input_ids": tokens, "labels": tokens}


def train(given: argparse.Namespace, corpus: Corpus, device: torch.device) -> tuple[float, Any]:
    """Train as a user would; return the last loss, and the byte ledger if any."""
    model, process_group = wrap(given, new_model(corpus), device)
    optimizer: Any = torch.optim.AdamW(model.named_parameters(), lr=given.learning_rate)
    if not given.no_compression:
        optimizer = CompressedOptimizer(
            optimizer,
            PowerSGDPlus(rank=given.rank, restart_every=given.restart_every, restart="randomized"),
            process_group,
            shard_scope=given.shard_scope,
            overlap=given.overlap,
            # also for the plain model, since the loop clips before step()
            reduce_at="backward",
        )
        optimizer.attach(model)
    data, loss = batches(corpus, given, device), torch.zeros(())
    for step in range(given.steps):
        for micro in range(given.accumulate):
            with micro_batch(given, model, optimizer, micro == given.accumulate - 1):
                loss = model(**next(data)).loss / given.accumulate
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tell(step, float(loss.detach()) * given.accumulate, given)
    return float(loss.detach()) * given.accumulate, (
        None if given.no_compression else optimizer.ledger
    )


def train_with_deepspeed(
    given: argparse.Namespace, corpus: Corpus, device: torch.device
) -> tuple[float, Any]:
    """The same with deepspeed.initialize and no Trainer."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    import lowrank_comm.integrations.deepspeed as compression

    if device.type == "cpu":
        compression.skip_shm_extension()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": given.batch,
        "gradient_accumulation_steps": given.accumulate,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": int(given.engine[-1])},
        "zero_allow_untested_optimizer": True,
    }
    if not given.no_compression:
        shards = dist.get_world_size() // given.nodes if given.two_levels else 1
        config["lowrank_comm"] = {
            "compressor": "powersgd_plus",
            "rank": given.rank,
            "restart_every": given.restart_every,
            "restart": "randomized",
            "topology": {"shard_size": shards, "shard_scope": given.shard_scope},
        }
    model = new_model(corpus).to(device)
    base = torch.optim.AdamW(model.parameters(), lr=given.learning_rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=config)
    data, loss = batches(corpus, given, device), torch.zeros(())
    for step in range(given.steps):
        for _ in range(given.accumulate):
            loss = engine(**next(data)).loss
            engine.backward(loss)
            engine.step()
        tell(step, float(loss.detach()), given)
    adapter = compression.get(engine)
    return float(loss.detach()), None if adapter is None else adapter.ledger


def tell(step: int, loss: float, given: argparse.Namespace) -> None:
    """A line now and then, from rank 0."""
    if dist.get_rank() == 0 and (step % 10 == 0 or step == given.steps - 1):
        print(f"step {step:4d}   loss of rank 0 {loss:.3f}", flush=True)


def main() -> None:
    """Set up the process group, train, tell what was sent."""
    given = parse()
    if "RANK" not in os.environ:
        raise SystemExit(
            "start this script by torchrun, for example: torchrun --nproc_per_node 2"
            " examples/train_engines.py"
        )
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(
            max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    corpus = load_corpus(Path(__file__).resolve().parent.parent / ".cache" / "examples", None, 1024)
    loss, ledger = (train_with_deepspeed if given.engine.startswith("zero") else train)(
        given, corpus, device
    )
    if dist.get_rank() == 0:
        print(f"{given.engine}: loss of rank 0 after {given.steps} steps {loss:.3f}")
        if ledger is not None:
            inside = (
                f", and {sum(ledger.inside.values()) / 1e6:.2f} MB inside the node"
                if ledger.inside
                else ""
            )
            print(
                f"sent by rank 0: {ledger.total_bytes / 1e6:.2f} MB instead of"
                f" {ledger.uncompressed_bytes / 1e6:.2f} MB ({ledger.ratio:.1f} times"
                f" fewer){inside}"
            )
    leave()


if __name__ == "__main__":
    main()
