"""A language model trained from random weights under every compressor: Table 3 of the
PowerSGD+ paper, at the size of the preset.

Protocol. One model, one text, N workers, AdamW. Stage 0, `tune/...`: every method at
`tuning_rank` with every learning rate of one grid, on one seed; judged on part 0 of the
held-out text. Stage 1, `final/...`: every method at every rank on the final seeds,
which the tuning has not seen, with the learning rate that its tuning found; judged on
part 1. `larger/...`: a larger model with the same learning rates, as a check of the
order. Runs with one seed share initial weights and batches, so methods are compared
seed by seed (`comparison`).

Under torchrun with as many processes as the preset has workers, each process is a
worker of its own; otherwise all of them are simulated in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.data.models import LlamaSize, new_llama, random_state
from lowrank_comm.lab.data.texts import TextSettings, load_text
from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments.language_model_figures import figures
from lowrank_comm.lab.experiments.language_model_page import page
from lowrank_comm.lab.experiments.language_model_results import chosen_rate, tuning
from lowrank_comm.lab.training.training_loop import Method, Recipe, train
from lowrank_comm.lab.training.workers import (
    Device,
    Workers,
    join_processes,
    make_workers,
    trained_parameters,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AdamWRecipe(Recipe):
    """A recipe for AdamW.

    Attributes:
        betas: of AdamW.
    """

    betas: tuple[float, float] = (0.9, 0.999)


class Training(LabSettings):
    """How one size of model is trained.

    Attributes:
        model: a name in `models.LLAMAS`.
        batch: blocks of a worker and step.
        micro_batch: blocks of one backward pass; null for all.
        recipe: the optimizer and its schedule.
    """

    model: LlamaSize = "S"
    batch: int = Field(default=2, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    recipe: AdamWRecipe


class Larger(LabSettings):
    """The check with a larger model: which methods, at which ranks, on which seeds."""

    training: Training
    methods: list[str]
    ranks: list[int]
    seeds: list[int]


class LanguageModelSettings(LabSettings):
    """What is trained, and how; see the top of this file.

    Attributes:
        paper: names the column of the paper's table that is shown beside the results.
    """

    text: TextSettings = TextSettings()
    workers: int = Field(default=4, ge=1)
    training: Training
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    methods: dict[str, Method]
    reference: str
    ranks: list[int]
    learning_rates: list[float]
    tuning_rank: int
    tuning_seed: int = 0
    seeds: list[int]
    larger: Larger | None = None
    paper: Literal["60M", "130M"] = "60M"

    @model_validator(mode="after")
    def _consistent(self) -> LanguageModelSettings:
        if self.reference not in self.methods or self.methods[self.reference].has_rank:
            raise ValueError(
                f"reference={self.reference!r} must be one of the methods, with has_rank: false"
            )
        unknown = [
            name
            for name in (self.larger.methods if self.larger else [])
            if name not in self.methods
        ]
        if unknown:
            raise ValueError(f"larger.methods: {', '.join(unknown)} is none of the methods")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed={self.tuning_seed} is among the seeds; results would be told of what"
                " was tuned on"
            )
        return self


class LanguageModel(Experiment):
    """Pre-training under every compressor, after Table 3 of the PowerSGD+ paper."""

    name: ClassVar[str] = "language_model"
    title: ClassVar[str] = "A language model from nothing, under every compressor"
    Settings = LanguageModelSettings

    def cases(self, settings: LanguageModelSettings) -> list[Case]:
        """Return tuning, then the final runs seed by seed, so that a part of them has
        all methods, then the larger model.
        """
        cases = []
        for name, method in settings.methods.items():
            rank = settings.tuning_rank if method.has_rank else None
            for rate in settings.learning_rates:
                params = _params("tune", name, rank, settings.tuning_seed) | {"learning_rate": rate}
                cases.append(Case(f"tune/{name}/lr{rate:g}", params))
        cases += _grid("final", settings, list(settings.methods), settings.ranks, settings.seeds)
        if settings.larger is not None:
            larger = settings.larger
            cases += _grid("larger", settings, larger.methods, larger.ranks, larger.seeds)
        return cases

    def stage(self, settings: LanguageModelSettings, case: Case) -> int:
        """Return 0 for tuning, which comes first, and 1 for the other cases."""
        return int(case.params["part"] != "tune")

    def prepared(self, settings: LanguageModelSettings, case: Case, rows: Sequence[Row]) -> Case:
        """Give a final case the learning rate that its method's tuning found.

        Raises:
            ConfigError: a tuning case of the method has not been finished, or all of
                them diverged.
        """
        if case.params["part"] == "tune":
            return case
        method = case.params["method"]
        tuned = tuning(rows).get(method, {})
        missing = [rate for rate in settings.learning_rates if rate not in tuned]
        if missing:
            raise ConfigError(
                f"{case.key} needs the tuning of {method!r}, which lacks the learning rates"
                f" {missing}: run --only 'tune/{method}/*' first, or see why it failed."
            )
        rate = chosen_rate(tuned)
        if rate is None:
            raise ConfigError(
                f"{case.key}: {method!r} diverged at every learning rate of {list(tuned)}; add"
                " smaller ones."
            )
        return Case(case.key, case.params | {"learning_rate": rate})

    def depends_on(self, settings: LanguageModelSettings, case: Case) -> Any:
        """Return all settings but the lists that say which other cases there are."""
        part, method = case.params["part"], settings.methods[case.params["method"]]
        common = {
            "text": settings.text.what_it_says(),
            "workers": settings.workers,
            "dtype": settings.dtype,
        }
        tuning = {
            "rates": settings.learning_rates,
            "rank": settings.tuning_rank,
            "seed": settings.tuning_seed,
        }
        return common | {
            "training": _training(settings, part).model_dump(mode="json"),
            "section": method.section,
            "tuning": (
                None
                if part == "tune"
                else tuning | {"training": settings.training.model_dump(mode="json")}
            ),
        }

    def run(
        self, settings: LanguageModelSettings, case: Case, progress: Progress
    ) -> dict[str, Any]:
        """Train one model and evaluate it."""
        params, training = case.params, _training(settings, case.params["part"])
        section = settings.methods[params["method"]].checked(params["rank"], params["seed"])
        device = join_processes(settings.device)
        text = load_text(settings.text)
        with random_state(params["seed"]):
            model = new_llama(
                training.model, text.vocabulary, settings.text.sequence_length, text.token
            )
        torch.nn.Module.to(model, device, getattr(torch, settings.dtype))
        streams = [
            text.batches(worker, settings.workers, training.batch, params["seed"])
            for worker in range(settings.workers)
        ]

        def backward(worker: int) -> float:
            batch, loss = next(streams[worker]).to(device), 0.0
            for micro in batch.split(training.micro_batch or training.batch):
                part = model(input_ids=micro, labels=micro).loss * (len(micro) / len(batch))
                part.backward()
                loss += part.item()
            return loss

        recipe = training.recipe
        optimizer = torch.optim.AdamW(
            trained_parameters(model).values(),
            lr=params["learning_rate"],
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )
        workers = make_workers(model, optimizer, section, settings.workers, recipe.clip)
        trained = train(model, optimizer, workers, recipe, backward, progress)
        held_out = text.held_out(0 if params["part"] == "tune" else 1)
        # a batch that fits into the memory in training
        at_once = training.micro_batch or training.batch
        loss = math.nan
        if not trained.diverged:
            loss = held_out_loss(model, held_out, workers, at_once, device)
        perplexity = math.exp(loss) if loss < 50 else math.inf
        return {
            "loss": loss,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "diverged": trained.diverged or not math.isfinite(perplexity),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": trained.steps,
            "curve": trained.curve,
            "sent": trained.sent,
        }

    def figures(self, settings: LanguageModelSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw the gap to full precision, and the training losses."""
        return figures(settings, rows)

    def page(self, settings: LanguageModelSettings, rows: Sequence[Row]) -> str:
        """Write tables and sentences from the rows."""
        return page(settings, rows)


def _params(part: str, method: str, rank: int | None, seed: int) -> dict[str, Any]:
    return {"part": part, "method": method, "rank": rank, "seed": seed}


def _grid(
    part: str,
    settings: LanguageModelSettings,
    methods: list[str],
    ranks: list[int],
    seeds: list[int],
) -> list[Case]:
    """Return the cases of a grid, seed by seed; a method without a rank comes once."""
    cases = []
    for seed in seeds:
        for name in methods:
            for rank in ranks if settings.methods[name].has_rank else [None]:
                at = "" if rank is None else f"/r{rank}"
                cases.append(Case(f"{part}/{name}{at}/seed{seed}", _params(part, name, rank, seed)))
    return cases


def _training(settings: LanguageModelSettings, part: str) -> Training:
    if part == "larger" and settings.larger is not None:
        return settings.larger.training
    return settings.training


@torch.no_grad()
def held_out_loss(
    model: nn.Module, blocks: Sequence[Tensor], workers: Workers, batch: int, device: torch.device
) -> float:
    """Return the mean loss of a token over held-out blocks of one length; the processes
    of a run share the blocks.
    """
    model.eval()
    own = workers.share(blocks)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(own), batch):
        ids = torch.stack(list(own[start : start + batch])).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        sums += torch.stack(
            [loss.double() * len(ids), torch.full_like(loss, len(ids), dtype=torch.float64)]
        )
    total, count = workers.total(sums).tolist()
    return float(total / count)
