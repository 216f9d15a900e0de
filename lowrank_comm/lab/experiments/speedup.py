"""Linear speed-up (Theorem 2): how the mean squared gradient norm falls with the number
N of workers.

The problem is a noisy quadratic: f(X) = 0.5 <X, H X> with H diagonal, its eigenvalues
spread evenly on a logarithmic scale from the condition number's inverse to 1, X m x n
with independent rows; worker i sees grad f(X) + noise of its own, Gaussian with
standard deviation sigma in every entry. The learning rate is eta = rate sqrt(N), as in
the theorem's eta ~ sqrt(N / T). With it mean_t E||grad f(X_t)||^2 ~ 1 / sqrt(N T), a
line of slope -1/2 in a log-log plot against N. Half of that is the larger step alone:
the way from the start takes 1 / (eta T). The other half is the noise, eta sigma^2 / N,
which falls only since the workers' noise is averaged; in the control (`shared_noise`)
all workers have the same, and it rises as sqrt(N).

All seeds of a case are trained in one batch of matrices, with the same result as one
after the other; noise is keyed by (seed, step, worker). The reported slope is that of a
least-squares line through the means over the seeds; its spread is that of the slopes of
single seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from pydantic import Field

from lowrank_comm.lab.experiment import Case, Experiment, Progress, Row
from lowrank_comm.lab.experiments.comparison import Spread, table
from lowrank_comm.lab.experiments.methods import SectionOf, WithMethods
from lowrank_comm.lab.training.averaging import Backend, Crew, silent, together
from lowrank_comm.numerics.randomness import stream

WORKERS = {"simulation": "simulated workers", "gloo": "gloo processes"}


class SpeedupMethod(SectionOf):
    """A method of the speed-up.

    Attributes:
        shared_noise: all workers see the same noise, as a control.
    """

    shared_noise: bool = False


class SpeedupSettings(WithMethods):
    """The problem and the methods; see the top of this file.

    Attributes:
        tolerance: of the slope around -1/2.
    """

    methods: list[SpeedupMethod] = Field(min_length=1)  # type: ignore[assignment]
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    m: int = 16
    n: int = 8
    condition: float = 10.0
    start: float = 0.5
    rate: float = 0.02
    sigma: float = 1.0
    tolerance: float = 0.08
    backend: Backend = "simulation"


class Speedup(Experiment):
    name: ClassVar[str] = "speedup"
    title: ClassVar[str] = "Linear speed-up (Theorem 2)"
    Settings: ClassVar[type[SpeedupSettings]] = SpeedupSettings

    def cases(self, settings: SpeedupSettings) -> list[Case]:
        """Return one case for each method and N."""
        return [
            Case(f"{method.name}/N={workers}", {"method": method.name, "workers": workers})
            for method in settings.methods
            for workers in settings.workers
        ]

    def depends_on(self, settings: SpeedupSettings, case: Case) -> Any:
        """Return the problem and the method, without the other methods and sizes."""
        problem = settings.model_dump(mode="json", exclude={"methods", "workers", "tolerance"})
        return problem | {"method": settings.method(case.params["method"]).model_dump(mode="json")}

    def run(self, settings: SpeedupSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Return the mean squared gradient norm over all steps, by seed."""
        # the progress bar cannot be passed to another process
        shown = progress if settings.backend == "simulation" else silent
        workers, method = case.params["workers"], settings.method(case.params["method"])
        loop = mean_squared_gradients
        values = together(settings.backend, workers, loop, settings, method, shown)
        return {"mean_squared_gradient": {str(seed): value for seed, value in values.items()}}

    def figures(self, settings: SpeedupSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw the mean squared gradient norm against N, with a line of slope -1/2."""
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, method in enumerate(settings.methods):
            means = _means(rows, method.name)
            if means:
                values = [means[workers].mean for workers in means]
                deviations = [means[workers].deviation or 0.0 for workers in means]
                axes.errorbar(
                    list(means),
                    values,
                    deviations,
                    marker="o",
                    markersize=4,
                    color=f"C{number}",
                    label=method.name,
                )
        first = next(
            (means for method in settings.methods if (means := _means(rows, method.name))), {}
        )
        if first:
            start = next(iter(first))
            line = [first[start].mean * math.sqrt(start / workers) for workers in first]
            axes.plot(list(first), line, "k--", linewidth=1, label="slope -1/2")
        axes.set(
            xscale="log", yscale="log", xlabel="workers N", ylabel="mean over steps of ||grad f||²"
        )
        axes.set_xticks(settings.workers, [str(workers) for workers in settings.workers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 4, 6)))
        for choose in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            choose(ScalarFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
        return {"speedup": figure}

    def page(self, settings: SpeedupSettings, rows: Sequence[Row]) -> str:
        """Write the table of means and slopes."""
        lines, outside = [], []
        for method in settings.methods:
            means, slopes = _means(rows, method.name), _slopes(rows, method.name)
            cells = [means[n].text(4) if n in means else "" for n in settings.workers]
            slope = _slope({n: spread.mean for n, spread in means.items()})
            if slope is None or slopes is None:
                lines.append([method.name, *cells, "", ""])
                continue
            inside = abs(slope + 0.5) <= settings.tolerance
            outside += [] if inside or method.shared_noise else [method.name]
            lines.append(
                [
                    method.name,
                    *cells,
                    f"{slope:.3f} ± {slopes.deviation or 0.0:.3f}",
                    "yes" if inside else "**no**",
                ]
            )
        heads = [
            "method",
            *(f"N = {n}" for n in settings.workers),
            "slope",
            f"-0.5 ± {settings.tolerance:g}",
        ]
        return (
            f"f(X) = ½⟨X, HX⟩ on {settings.m} x {settings.n} matrices, condition number"
            f" {settings.condition:g}, noise {settings.sigma:g} an entry, {settings.steps} steps"
            f" from entries of size {settings.start:g}, learning rate {settings.rate:g} √N,"
            f" {WORKERS[settings.backend]}. Mean over all steps of ‖∇f(X_t)‖², ± standard deviation"
            f" over {len(settings.seeds)} seeds; slope of a line through the logs of the means, ±"
            " standard deviation of the slopes of single seeds. Theorem 2 says -½ for large T. In"
            " the control all workers have the same noise.\n\n![Mean squared gradient norm against"
            " the number of workers](speedup.png)\n\n"
            + table(heads, lines)
            + f"\n\nOutside of -0.5 ± {settings.tolerance:g}, controls aside:"
            f" {', '.join(outside) or 'none'}."
        )


def mean_squared_gradients(
    crew: Crew, settings: SpeedupSettings, method: SpeedupMethod, progress: Progress
) -> dict[int, float]:
    """Return seed -> mean over the steps of ||grad f(X_t)||^2."""
    names = {seed: f"X of seed {seed}" for seed in settings.seeds}
    shape = (settings.m, settings.n)
    powers = torch.linspace(-1, 0, settings.m, dtype=torch.float64)
    eigenvalues = settings.condition ** powers[:, None]
    x = torch.stack(
        [
            settings.start
            * torch.randn(shape, generator=stream(seed, "X", -1, "start"), dtype=torch.float64)
            for seed in settings.seeds
        ]
    )
    averager = crew.averager(method.section, dict.fromkeys(names.values(), shape))
    rate = settings.rate * math.sqrt(crew.size)
    total = torch.zeros(len(settings.seeds), dtype=torch.float64)
    for t in range(settings.steps):
        gradient = eigenvalues * x
        total += gradient.square().sum(dim=(1, 2))
        noisy = []
        for worker in crew.local_workers:
            purpose = "noise of all workers" if method.shared_noise else f"noise of worker {worker}"
            noise = [
                torch.randn(shape, generator=stream(seed, "X", t, purpose), dtype=torch.float64)
                for seed in settings.seeds
            ]
            seen = gradient + settings.sigma * torch.stack(noise)
            noisy.append(dict(zip(names.values(), seen, strict=True)))
        applied = averager.average(noisy)
        x = x - rate * torch.stack([applied[name] for name in names.values()])
        if t % 50 == 0:
            progress(t / settings.steps, f"step {t} of {settings.steps}")
    return dict(zip(settings.seeds, (total / settings.steps).tolist(), strict=True))


def _values(rows: Sequence[Row], method: str) -> dict[int, dict[str, float]]:
    """Return N -> seed -> value."""
    return {
        row["params"]["workers"]: row["result"]["mean_squared_gradient"]
        for row in rows
        if row["params"]["method"] == method
    }


def _means(rows: Sequence[Row], method: str) -> dict[int, Spread]:
    """Return N -> mean and spread over the seeds."""
    spreads = {n: Spread.of(list(by_seed.values())) for n, by_seed in _values(rows, method).items()}
    return {n: spread for n, spread in spreads.items() if spread is not None}


def _slope(values: dict[int, float]) -> float | None:
    """Return the slope of the least-squares line through (log N, log value); None with
    fewer than two points.
    """
    if len(values) < 2:
        return None
    xs, ys = [math.log(n) for n in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(xs, ys).slope


def _slopes(rows: Sequence[Row], method: str) -> Spread | None:
    """Return the spread of the slopes of single seeds."""
    values = _values(rows, method)
    seeds = next(iter(values.values()), {})
    slopes = [_slope({n: by_seed[seed] for n, by_seed in values.items()}) for seed in seeds]
    return Spread.of([slope for slope in slopes if slope is not None])
