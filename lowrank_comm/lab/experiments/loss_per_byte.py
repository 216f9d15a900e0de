"""A language model trained from random weights: what a byte of communication buys, for
every compressor, for others' methods, and under two base optimizers.

The ruler. One model, one text, N workers, AdamW or Muon as the base. Uncompressed
training ("dense") is tuned first: on the tuning seeds, every learning rate with every
beta2 of the base's grid, judged by the mean loss on part 0 of the held-out text. Then
each method takes the base's beta2 and has its learning rate tuned, by factors of the
dense one, on the same seeds and part. Results are of other seeds and of part 1. Runs
with one seed share initial weights and batches, and every ratio is to dense training
under the same base and seed.

Cases come by importance: dense tuning, then tuning and results of the main methods,
seed by seed, then those of the methods marked `few`, which have fewer seeds.

Under torchrun with as many processes as the preset has workers, each process is a
worker of its own; otherwise all of them are simulated in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lowrank_comm.config import Section
from lowrank_comm.errors import ConfigError
from lowrank_comm.lab import peers
from lowrank_comm.lab.data.models import LlamaSize, new_llama, random_state
from lowrank_comm.lab.data.texts import TextSettings, load_text
from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments.loss_per_byte_figures import figures
from lowrank_comm.lab.experiments.loss_per_byte_page import page
from lowrank_comm.lab.experiments.loss_per_byte_results import (
    DENSE,
    chosen_dense,
    chosen_factor,
    factors_of,
)
from lowrank_comm.lab.training.bases import Base, BaseName, base_optimizer
from lowrank_comm.lab.training.fast_llama import FastLlama
from lowrank_comm.lab.training.training_loop import Recipe, train
from lowrank_comm.lab.training.workers import (
    Device,
    PeerWorkers,
    join_processes,
    make_workers,
    trained_parameters,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Training(LabSettings):
    """What is trained, and for how long.

    Attributes:
        model: a name in `models.LLAMAS`.
        batch: blocks of a worker and step.
        micro_batch: blocks of one backward pass; null for all.
        recipe: steps, schedule, clipping.
    """

    model: LlamaSize = "S"
    batch: int = Field(default=2, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    recipe: Recipe


class Grid(LabSettings):
    """The grid on which dense training of a base is tuned; beta2 is AdamW's, under Muon
    that of what Muon does not step.
    """

    learning_rates: list[float] = Field(min_length=1)
    beta2: list[float] = Field(min_length=1)


class LanguageMethod(LabSettings):
    """A line of the tables.

    Attributes:
        label: in tables and figures.
        section: a `lowrank_comm` section, see `config`; the experiment sets the seed.
        peer: a method of others, see `peers`, in the place of a section.
        group: "preset" of the library, "rival" (PowerSGD in float32, which presets are
            held against), or "other".
        bases: under which it is run.
        few: whether it has `few_seeds` seeds only.
        factors: of the dense learning rate, in the place of the experiment's.
    """

    label: str
    section: dict[str, Any] | None = None
    peer: peers.PeerSettings | None = None
    group: Literal["preset", "rival", "other"] = "other"
    bases: tuple[BaseName, ...] = ("adamw", "muon")
    few: bool = False
    factors: list[float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> LanguageMethod:
        if (self.section is None) == (self.peer is None):
            raise ValueError("give either a section or a peer")
        return self


class LossPerByteSettings(LabSettings):
    """What is trained, and how; see the top of this file.

    Attributes:
        bases: base optimizer -> the grid of its dense training.
        methods: name -> method; "dense" is there without being named.
        claims: pairs of methods; the first is expected to end at a lower loss.
        factors: of the dense learning rate, among which a method's is chosen.
        few_seeds: how many of `seeds` the methods marked `few` have.
        curves: methods whose training losses are drawn beside dense's; none draws no
            such figure.
    """

    text: TextSettings = TextSettings()
    workers: int = Field(default=4, ge=1)
    training: Training
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    bases: dict[BaseName, Grid]
    methods: dict[str, LanguageMethod]
    claims: tuple[tuple[str, str], ...] = ()
    factors: tuple[float, ...] = (0.6, 1.0, 1.6)
    tuning_seeds: list[int]
    seeds: list[int]
    few_seeds: int = Field(default=3, ge=1)
    curves: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> LossPerByteSettings:
        if DENSE in self.methods:
            raise ValueError(f"{DENSE!r} is there without being named among the methods")
        named = [*self.curves, *(name for pair in self.claims for name in pair)]
        unknown = [name for name in named if name not in self.methods]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is none of the methods")
        both = set(self.tuning_seeds) & set(self.seeds)
        if both:
            raise ValueError(
                f"seed {min(both)} is in tuning_seeds and in seeds; results would be told of what"
                " was tuned on"
            )
        return self

    def is_tuned(self, base: BaseName, method: str) -> bool:
        """Return whether there is a choice to be made."""
        grid = self.bases[base]
        if method == DENSE:
            return len(grid.learning_rates) * len(grid.beta2) > 1
        return len(factors_of(self, method)) > 1

    def arms(self, few: bool) -> list[tuple[BaseName, str]]:
        """Return (base, method) of the methods with few seeds, or with all; dense has
        all.
        """
        found: list[tuple[BaseName, str]] = []
        for base in self.bases:
            found += [] if few else [(base, DENSE)]
            found += [
                (base, name)
                for name, method in self.methods.items()
                if method.few == few and base in method.bases
            ]
        return found


class LossPerByte(Experiment):
    """Loss per byte of pre-training, under every compressor."""

    name: ClassVar[str] = "loss_per_byte"
    title: ClassVar[str] = "A language model from nothing: loss per byte"
    Settings = LossPerByteSettings

    def cases(self, settings: LossPerByteSettings) -> list[Case]:
        """Return all cases by importance; see the top of this file."""
        cases = []
        for base in settings.bases:
            if settings.is_tuned(base, DENSE):
                cases += list(_dense_tuning(settings, base))
        for few in (False, True):
            for base, name in settings.arms(few):
                if name != DENSE and settings.is_tuned(base, name):
                    cases += list(_tuning(settings, base, name))
            for seed in settings.seeds[: settings.few_seeds if few else None]:
                cases += [_final(base, name, seed) for base, name in settings.arms(few)]
        return cases

    def stage(self, settings: LossPerByteSettings, case: Case) -> int:
        """Return the case's place in the order: dense tuning, tuning and results of the
        main methods, tuning and results of the others.
        """
        name = case.params["method"]
        late = 2 if name != DENSE and settings.methods[name].few else 0
        if case.params["part"] == "tune":
            return 0 if name == DENSE else 1 + late
        return 2 + late

    def prepared(self, settings: LossPerByteSettings, case: Case, rows: Sequence[Row]) -> Case:
        """Give a case the learning rate and beta2 that tuning found.

        Raises:
            ConfigError: tuning cases have not been finished, or all of them diverged.
        """
        params = case.params
        if "learning_rate" in params:
            return case
        base, name = params["base"], params["method"]
        rate, beta2 = chosen_dense(settings, rows, base)
        factor = 1.0 if name == DENSE else params.get("factor")
        if factor is None:
            factor = chosen_factor(settings, rows, base, name)
        found = {"factor": factor, "learning_rate": rate * factor, "beta2": beta2}
        return Case(case.key, params | found)

    def depends_on(self, settings: LossPerByteSettings, case: Case) -> Any:
        """Return all settings but the lists that say which other cases there are."""
        params = case.params
        name, final = params["method"], params["part"] == "final"
        method = None if name == DENSE else settings.methods[name]
        tuned = final or method is not None
        return {
            "text": settings.text.what_it_says(),
            "workers": settings.workers,
            "dtype": settings.dtype,
            "training": settings.training.model_dump(mode="json"),
            "method": method and method.model_dump(mode="json", include={"section", "peer"}),
            "grid": settings.bases[params["base"]].model_dump(mode="json") if tuned else None,
            "factors": factors_of(settings, name) if final and method else None,
            "tuning_seeds": settings.tuning_seeds if tuned else None,
        }

    def run(self, settings: LossPerByteSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Train one model and evaluate it."""
        params, training, recipe = case.params, settings.training, settings.training.recipe
        seed = params["seed"]
        device = join_processes(settings.device)
        text = load_text(settings.text)
        with random_state(seed):
            model = new_llama(
                training.model, text.vocabulary, settings.text.sequence_length, text.token
            )
        torch.nn.Module.to(model, device, getattr(torch, settings.dtype))
        parameters = trained_parameters(model)
        base = Base(params["base"], params["learning_rate"], params["beta2"], recipe.weight_decay)
        method = settings.methods.get(params["method"])
        if method is not None and method.peer is not None:
            if torch.distributed.is_initialized():
                raise ConfigError(
                    f"{case.key}: peers are simulated in one process; run it without torchrun."
                )
            peer = peers.start(
                method.peer,
                parameters,
                settings.workers,
                base,
                base.rate / params["factor"],
                seed,
            )
            optimizer = peer.optimizer
            team: Any = PeerWorkers(parameters, peer, settings.workers, recipe.clip)
        else:
            section = {"compressor": "identity"} if method is None else dict(method.section or {})
            optimizer = base_optimizer(parameters, base)
            team = make_workers(
                model,
                optimizer,
                Section.parse(section | {"seed": seed}),
                settings.workers,
                recipe.clip,
            )
        local = list(team.local_workers)
        streams = [text.batches(k, settings.workers, training.batch, seed) for k in local]
        fast = FastLlama(model)
        at_once = training.micro_batch or training.batch
        backward = _backward(fast, streams, at_once, local, device)
        trained = train(model, optimizer, team, recipe, backward, progress)
        loss = math.nan
        if not trained.diverged:
            own = team.share(text.held_out(0 if params["part"] == "tune" else 1))
            # as many as the memory holds in training
            total = fast.held_out(own, at_once * len(local))
            sums = torch.tensor([total, len(own)], dtype=torch.float64, device=device)
            total, count = team.total(sums).tolist()
            loss = total / count
        return {
            "loss": loss,
            "diverged": not math.isfinite(loss),
            "parameters": sum(parameter.numel() for parameter in parameters.values()),
            "steps": trained.steps,
            "curve": trained.curve,
            "sent": trained.sent,
        }

    def figures(self, settings: LossPerByteSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw bytes against gap, and training losses."""
        return figures(settings, rows)

    def page(self, settings: LossPerByteSettings, rows: Sequence[Row]) -> str:
        """Write tables and sentences from the rows."""
        return page(settings, rows)


class LongLossPerByte(LossPerByte):
    """The same for a larger model and more steps, with results of its own."""

    name: ClassVar[str] = "loss_per_byte_long"
    title: ClassVar[str] = "A language model from nothing: a longer run"


def _dense_tuning(settings: LossPerByteSettings, base: BaseName) -> Iterator[Case]:
    grid = settings.bases[base]
    for seed in settings.tuning_seeds:
        for rate in grid.learning_rates:
            for beta2 in grid.beta2:
                found = {"learning_rate": rate, "beta2": beta2}
                key = f"tune/{base}/{DENSE}/lr{rate:g}/b{beta2:g}/seed{seed}"
                yield Case(key, _params("tune", base, DENSE, seed) | found)


def _tuning(settings: LossPerByteSettings, base: BaseName, name: str) -> Iterator[Case]:
    for seed in settings.tuning_seeds:
        for factor in factors_of(settings, name):
            key = f"tune/{base}/{name}/x{factor:g}/seed{seed}"
            yield Case(key, _params("tune", base, name, seed) | {"factor": factor})


def _final(base: BaseName, name: str, seed: int) -> Case:
    return Case(f"final/{base}/{name}/seed{seed}", _params("final", base, name, seed))


def _params(part: str, base: BaseName, method: str, seed: int) -> dict[str, Any]:
    return {"part": part, "base": base, "method": method, "seed": seed}


def _backward(
    fast: FastLlama,
    streams: Sequence[Iterator[Tensor]],
    at_once: int,
    local: Sequence[int],
    device: torch.device,
) -> Callable[[int], float]:
    """Return what `train` calls for each worker of this process: the first call
    computes the gradients of all of them, each call hands out one worker's.
    """
    losses: list[float] = []
    found: list[dict[str, Tensor]] = []

    def backward(worker: int) -> float:
        if worker == local[0]:
            batch = torch.stack([next(stream) for stream in streams]).to(device)
            losses[:], found[:] = [], []
            for micro in batch.split(at_once, dim=1):
                share = micro.shape[1] / batch.shape[1]
                loss, grads = fast.gradients(micro)
                if not found:
                    found[:] = [{n: grad * share for n, grad in one.items()} for one in grads]
                    losses[:] = [value * share for value in loss.tolist()]
                    continue
                for total, one in zip(found, grads, strict=True):
                    for name, grad in one.items():
                        total[name] += grad * share
                losses[:] = [a + b * share for a, b in zip(losses, loss.tolist(), strict=True)]
        place = worker - local[0]
        for name, parameter in fast.parameters.items():
            parameter.grad = found[place][name]
        return losses[place]

    return backward
