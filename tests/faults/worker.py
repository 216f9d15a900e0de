"""One rank of a small training under any engine, which can be made to fail on purpose.

    # two ranks of DDP, 12 steps, a checkpoint every 3, under torchrun
    torchrun --nproc_per_node 2 -m tests.faults.worker \
        '{"engine": "ddp", "folder": "/tmp/run", "steps": 12, "every": 3}'

Model, data and optimizer are the same in every engine. A step's data are those of the
whole batch, cut into as many parts as there are ranks, so that runs of different world
sizes have the same mean gradient. Arithmetic is float64 where the engine has it
(DeepSpeed's own part is float32). Checkpoints follow the recipe that the documentation
gives for the engine; every start goes on from the newest one.

Each rank writes `<folder>/log/rank<r>.jsonl`, outside the checkpoints' folder: a line
for each start, step, save and end. At the end rank 0 writes the parameters to
`<folder>/final.pt`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.communication import leave
from tests.faults import injectors, recipes
from tests.faults.injectors import Fault
from tests.support import ROOT

ENGINES = ("plain", "ddp", "fsdp2", "hsdp", "zero1", "zero3", "trainer")
WORLD = {engine: 4 if engine == "hsdp" else 2 for engine in ENGINES}
"""Ranks of a run."""
BATCH = 12
"""Examples of a step, over all ranks: divides by 1, 2, 3 and 4."""
IN, HIDDEN, OUT = 24, 40, 8
SECTION = {
    "compressor": "powersgd_plus",
    "rank": 2,
    "restart_every": 5,
    "min_compression_rate": 0,
    "seed": 3,
}


@dataclass(frozen=True)
class Job:
    """What a worker does.

    timeout: seconds of the process group, and of every group made after it.
    compressed: else the engine's own averaging, by which one sees whose a fault is.
    soak: do the long run of soak.py instead.
    """

    engine: str
    folder: str
    steps: int = 12
    every: int = 3
    timeout: float = 60.0
    compressed: bool = True
    soak: bool = False
    fault: Fault | None = None

    @classmethod
    def parse(cls, words: str) -> Job:
        """Read what `json.dumps(asdict(job))` wrote."""
        given = json.loads(words)
        fault = given.pop("fault", None)
        return cls(**given, fault=None if fault is None else Fault(**fault))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are; a file system of its own in the faults of disks."""
        return Path(self.folder) / "checkpoints"


class Net(nn.Module):
    """Two matrices and biases; called with labels, it answers as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Return the output, or loss and output."""
        output = self.last(torch.tanh(self.first(x)))
        return output if labels is None else {"loss": mean_square(output, labels), "logits": output}


def mean_square(output: Tensor, y: Tensor) -> Tensor:
    """The loss."""
    return (output - y).pow(2).mean()


def examples(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a step's batch, in float64."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, IN, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, k].sin() * x[:, k + 1] for k in range(OUT)], 1)
    size = BATCH // parts
    mine = slice(part * size, (part + 1) * size)
    return x[mine], y[mine]


@dataclass
class Log:
    """A rank's own account of the run, a line a fact; each is written at once, so that
    a kill loses none.
    """

    job: Job
    rank: int
    file: io.TextIOWrapper = field(init=False)

    def __post_init__(self) -> None:
        folder = Path(self.job.folder) / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"rank{self.rank}.jsonl").open("a", encoding="utf-8")

    def write(self, **facts: Any) -> None:
        """Add a line."""
        self.file.write(json.dumps({**facts, "time": time.time()}) + "\n")
        self.file.flush()


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to(torch.float64).clone()


def digest(parameters: dict[str, Tensor]) -> str:
    """A hash of all bits, by name."""
    found = hashlib.sha256()
    for name in sorted(parameters):
        found.update(name.encode() + parameters[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class Run:
    """A training under one engine: `load`, then for each step `step` and, where one is
    due, `save`. Of DDP, FSDP2, HSDP and a plain model; DeepSpeed overrides.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.net = Net().double()
        self.model: nn.Module = self.net
        if job.engine == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif job.engine in ("fsdp2", "hsdp"):
            nodes = 2 if job.engine == "hsdp" else 1
            mesh = init_device_mesh(
                "cpu", (nodes, self.world // nodes), mesh_dim_names=("replicate", "shard")
            )
            fully_shard(self.net, mesh=mesh if nodes > 1 else mesh["shard"])
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        base = torch.optim.AdamW(self.net.named_parameters(), lr=0.02)
        if not self.job.compressed:
            return base
        optimizer = CompressedOptimizer(
            base,
            PowerSGDPlus(rank=2, restart_every=5),
            min_compression_rate=0,
            seed=3,
            shard_scope="matrix" if self.job.engine == "hsdp" else "shard",
        )
        optimizer.attach(self.model)
        return optimizer

    def step(self, step: int, between: Callable[[], None]) -> float:
        """One optimizer step on this rank's data; its loss."""
        x, y = examples(step, self.rank, self.world)
        loss = mean_square(self.model(x), y)
        loss.backward()
        between()
        if self.job.engine == "plain" and not self.job.compressed:
            for p in self.net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= self.world  # type: ignore[operator]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, step: int) -> None:
        """Save everything by the documented recipe; a collective."""
        recipes.save(self.job.checkpoints, step, self.net, self.optimizer)

    def load(self) -> int:
        """Go on from the newest checkpoint; how many steps it had done, 0 for none."""
        return recipes.load(self.job.checkpoints, self.net, self.optimizer)

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, whole, on every rank; a collective."""
        return {name: full(p) for name, p in self.net.named_parameters()}


class DeepSpeedRun(Run):
    """ZeRO-1 and ZeRO-3, without Trainer, a tag for each save."""

    def _optimizer(self) -> Any:
        import deepspeed

        import lowrank_comm.integrations.deepspeed as compression

        compression.skip_shm_extension()
        self.net = Net()
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH // self.world,
            "zero_optimization": {"stage": int(self.job.engine[-1])},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if self.job.compressed:
            settings["lowrank_comm"] = SECTION
        base = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        self.engine: Any = deepspeed.initialize(
            model=self.net, optimizer=base, config=settings, dist_init_required=False
        )[0]
        return base

    def step(self, step: int, between: Callable[[], None]) -> float:
        """One optimizer step on this rank's data; its loss."""
        x, y = (each.float() for each in examples(step, self.rank, self.world))
        loss = mean_square(self.engine(x), y)
        self.engine.backward(loss)
        between()
        self.engine.step()
        return loss.item()

    def save(self, step: int) -> None:
        """Save under a tag of its own."""
        self.engine.save_checkpoint(str(self.job.checkpoints), tag=f"step-{step}")

    def load(self) -> int:
        """Load what `latest` names."""
        if not (self.job.checkpoints / "latest").is_file():
            return 0
        self.engine.load_checkpoint(str(self.job.checkpoints))
        return int(self.engine.global_steps)

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, whole, on every rank; a collective."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.net.parameters())):
            return {name: full(p) for name, p in self.net.named_parameters()}


def goes_on(job: Job, run: Run, log: Log) -> None:
    """Train from the newest checkpoint to the end."""
    first = run.load() + 1
    log.write(event="start", first=first, world=run.world)
    if run.rank == 0:
        print(f"going on from step {first - 1}", flush=True)
    for step in range(first, job.steps + 1):
        injectors.at("step", step)
        loss = run.step(step, lambda step=step: injectors.at("between", step))  # type: ignore[misc]
        log.write(event="step", step=step, loss=loss)
        if step % job.every == 0:
            saving(job, log, step, run.save)
    finish(job, log, run.parameters())


def saving(job: Job, log: Log, step: int, save: Callable[[int], None]) -> None:
    """Save, with the faults that belong before, into and after it."""
    began = time.perf_counter()
    before = injectors.file_events()
    log.write(event="saving", step=step)
    injectors.at("save", step)
    save(step)
    seconds = time.perf_counter() - began
    injectors.saved()
    log.write(event="saved", step=step, seconds=seconds, events=injectors.file_events() - before)
    injectors.at("saved", step)


def finish(job: Job, log: Log, parameters: dict[str, Tensor]) -> None:
    """Write what the run ended with."""
    if log.rank == 0:
        torch.save(parameters, Path(job.folder) / "final.pt")
    log.write(event="end", digest=digest(parameters), cpu=time.process_time())


def trainer_run(job: Job, log: Log) -> None:
    """Hugging Face's Trainer, the model under DDP, the callback compressing."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lowrank_comm.integrations.transformers import CompressionCallback

    sys.path.insert(0, str(ROOT / "examples"))
    from checkpoints import newest_complete
    from recording import FinishedBefore, StopWhereFinished

    world = dist.get_world_size()

    class Batches(torch.utils.data.Dataset):
        """Example k of a step is line k of its batch; the sampler deals them out in
        turn, so rank r has other lines than in the other engines, and the mean is the
        same.
        """

        def __len__(self) -> int:
            return BATCH * job.steps

        def __getitem__(self, k: int) -> dict[str, Tensor]:
            x, y = examples(k // BATCH + 1, 0, 1)
            return {"x": x[k % BATCH], "labels": y[k % BATCH]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def _save_checkpoint(self, *given: Any, **more: Any) -> Any:
            step = int(self.state.global_step)
            return saving(
                job, log, step, lambda _: super(InOrder, self)._save_checkpoint(*given, **more)
            )

        def training_step(self, *given: Any, **more: Any) -> Tensor:
            loss = super().training_step(*given, **more)
            self.last_loss = loss.item()
            injectors.at("between", int(self.state.global_step) + 1)
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            log.write(event="start", first=state.global_step + 1, world=world)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            injectors.at("step", state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            log.write(event="step", step=state.global_step, loss=trainer.last_loss)

    args = TrainingArguments(
        str(job.checkpoints), max_steps=job.steps, save_strategy="steps", save_steps=job.every,
        logging_steps=1000, report_to=[], use_cpu=True, ddp_backend="gloo", learning_rate=0.02,
        per_device_train_batch_size=BATCH // world, max_grad_norm=0.0, disable_tqdm=True,
        lr_scheduler_type="constant", adam_epsilon=1e-8, weight_decay=0.01,
        remove_unused_columns=False,
        ddp_timeout=int(job.timeout), dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(
        Net().double(), args, train_dataset=Batches(),
        callbacks=[
            *([CompressionCallback(SECTION)] if job.compressed else []),
            Steps(), StopWhereFinished(),
        ],
    )  # fmt: skip
    # what examples/train.py does for `--resume_from_checkpoint auto`
    newest = newest_complete(job.checkpoints)
    with contextlib.suppress(FinishedBefore):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    net = trainer.accelerator.unwrap_model(trainer.model)
    finish(job, log, {name: full(p) for name, p in net.named_parameters()})


@contextlib.contextmanager
def group(job: Job) -> Iterator[None]:
    """The process group, whose timeout the groups made after it have, too: torch gives
    those its default of half an hour.
    """
    timeout = datetime.timedelta(seconds=job.timeout)
    distributed_c10d.default_pg_timeout = timeout  # type: ignore[misc]
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives its restarts: without a name of their own, the ranks of
    # the next start find the addresses of dead ones there, some of the time
    start = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("gloo", store=start, rank=rank, world_size=world, timeout=timeout)
    yield
    leave()


def main(job: Job) -> None:
    """Do a job as the rank that the environment says."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    log = Log(job, rank)
    log.write(event="process", pid=os.getpid())
    injectors.arm(job.fault, rank, job.folder, job.checkpoints, log.write)
    with group(job):
        if job.engine == "trainer":
            trainer_run(job, log)
        elif job.soak:
            from tests.faults import soak

            soak.main(job)
        else:
            kind = DeepSpeedRun if job.engine.startswith("zero") else Run
            goes_on(job, kind(job), log)


if __name__ == "__main__":
    main(Job.parse(sys.argv[1]))
