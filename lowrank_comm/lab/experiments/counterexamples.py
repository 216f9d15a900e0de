"""Counterexamples: PowerSGD's trap and PowerSGD+'s escape, GaLore's trap and GoLore's
escape.

Three parts. `figure1`: Theorem 1's problem in arithmetic that is exact for PowerSGD, by
optimizer and method (`theorem1`). `window`: the same problem at the paper's own size, 2
x 2, where round-off may open the trap; after how many steps, by coordinates, number
type, method and N. `galore`: noise above and below the gradient (`galore_trap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure

from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments.comparison import table
from lowrank_comm.lab.experiments.methods import WithMethods
from lowrank_comm.lab.problems import galore_trap as galore_trap
from lowrank_comm.lab.problems import theorem1 as theorem1

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECORDS = 120
"""Points of a curve."""
OPTIMIZERS = ("MSGD", "Adam")
COORDINATES = {"paper": None, "rotated": 0}
"""Coordinates of the window's problem -> seed of the rotation."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Figure1(WithMethods):
    """Theorem 1's problem with every entry repeated 2 x 2. *_rate: learning rates of
    the two optimizers.
    """

    msgd_rate: float = 3e-4
    adam_rate: float = 2e-3
    steps: int = 600
    workers: int = 3
    sigma: float = 3.0
    seed: int = 0


class Window(WithMethods):
    """Theorem 1's problem, 2 x 2, by SGD. change: of D^T X D, from which it counts as
    having moved.
    """

    rate: float = 0.02
    steps: int = 60
    workers: tuple[int, ...] = (1, 3, 5)
    dtypes: tuple[Literal["float32", "float64"], ...] = ("float64", "float32")
    change: float = 1e-3
    sigma: float = 3.0
    seed: int = 0


class GaloreTrap(WithMethods):
    """GaLore's trap, by SGD. sigmas: of the noise, where the gradient's singular values
    are 0.5.
    """

    sigmas: tuple[float, ...] = (1.0, 0.4)
    rate: float = 1e-2
    steps: int = 2000
    size: int = 10
    block: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)


class CounterexampleSettings(LabSettings):
    """The three parts."""

    figure1: Figure1
    window: Window
    galore: GaloreTrap


class Counterexamples(Experiment):
    """See the module's text."""

    name: ClassVar[str] = "counterexamples"
    title: ClassVar[str] = "Counterexamples: two traps and two escapes"
    Settings: ClassVar[type[CounterexampleSettings]] = CounterexampleSettings

    def cases(self, settings: CounterexampleSettings) -> list[Case]:
        """One for each curve, and one for each row of the window's table."""
        cases = [
            Case(
                f"figure1/{optimizer}/{method.name}",
                {"part": "figure1", "optimizer": optimizer, "method": method.name},
            )
            for optimizer in OPTIMIZERS
            for method in settings.figure1.methods
        ]
        cases += [
            Case(
                f"window/{coordinates}/{dtype}/{method.name}",
                {
                    "part": "window",
                    "coordinates": coordinates,
                    "dtype": dtype,
                    "method": method.name,
                },
            )
            for coordinates in COORDINATES
            for dtype in settings.window.dtypes
            for method in settings.window.methods
        ]
        return cases + [
            Case(
                f"galore/{sigma:g}/{method.name}",
                {"part": "galore", "sigma": sigma, "method": method.name},
            )
            for sigma in settings.galore.sigmas
            for method in settings.galore.methods
        ]

    def depends_on(self, settings: CounterexampleSettings, case: Case) -> Any:
        """The case's part without its other methods."""
        part = getattr(settings, case.params["part"])
        return part.model_dump(mode="json", exclude={"methods"}) | {
            "section": part.section(case.params["method"])
        }

    def run(
        self, settings: CounterexampleSettings, case: Case, progress: Progress
    ) -> dict[str, Any]:
        """A curve, or the steps at which the trap opens."""
        match case.params["part"]:
            case "figure1":
                return _figure1(settings.figure1, case)
            case "window":
                return _window(settings.window, case)
        return _galore(settings.galore, case, progress)

    def figures(self, settings: CounterexampleSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Loss curves of Figure 1, gradient norms of GaLore's trap."""
        return {
            "figure1": _draw_figure1(settings.figure1, rows),
            "galore": _draw_galore(settings.galore, rows),
        }

    def page(self, settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
        """The three parts."""
        return "\n\n".join(
            (
                _figure1_text(settings, rows),
                _window_text(settings, rows),
                _galore_text(settings, rows),
            )
        )


def _figure1(part: Figure1, case: Case) -> dict[str, Any]:
    optimizers: dict[str, theorem1.OptimizerOf] = {
        "MSGD": lambda parameters: torch.optim.SGD(parameters, lr=part.msgd_rate, momentum=0.9),
        "Adam": lambda parameters: torch.optim.Adam(parameters, lr=part.adam_rate),
    }
    problem = theorem1.Problem(workers=part.workers, sigma=part.sigma)
    run = theorem1.train(
        problem,
        part.section(case.params["method"]),
        optimizers[case.params["optimizer"]],
        part.steps,
        part.seed,
    )
    every = max(1, part.steps // RECORDS)
    return {
        "every": every,
        "losses": run.losses[::every],
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
        "first_squared_gradient": run.squared_gradients[0],
        "last_squared_gradient": run.squared_gradients[-1],
        "trapped_exactly": run.trapped_exactly,
    }


def _window(part: Window, case: Case) -> dict[str, Any]:
    """workers -> first visible step, or None if the trap stayed shut."""
    opened = {}
    for workers in part.workers:
        rotation = COORDINATES[case.params["coordinates"]]
        problem = theorem1.Problem(1, workers, part.sigma, DTYPES[case.params["dtype"]], rotation)
        run = theorem1.train(
            problem,
            part.section(case.params["method"]),
            lambda parameters: torch.optim.SGD(parameters, lr=part.rate),
            part.steps,
            part.seed,
            first_basis=(0.3, 1.1),
        )
        opened[str(workers)] = run.first_visible(part.change)
    return {"first_visible": opened}


def _galore(part: GaloreTrap, case: Case, progress: Progress) -> dict[str, Any]:
    every = max(1, part.steps // RECORDS)
    records = galore_trap.train(
        part.section(case.params["method"]),
        size=part.size,
        block=part.block,
        sigma=case.params["sigma"],
        rate=part.rate,
        steps=part.steps,
        seeds=part.seeds,
        every=every,
        progress=progress,
    )
    return {
        "every": every,
        "curve": [mean(values) for values in zip(*records.values(), strict=True)],
        "first": mean(values[0] for values in records.values()),
        "last": {str(seed): values[-1] for seed, values in records.items()},
    }


def _of(rows: Sequence[Row], **params: Any) -> list[Row]:
    """Rows with these params."""
    return [
        row for row in rows if all(row["params"].get(key) == value for key, value in params.items())
    ]


def _curves(axes: Axes, rows: Sequence[Row], curve: str) -> None:
    """One line for each row; below the panel's lower end it leaves the panel."""
    for number, row in enumerate(rows):
        values = row["result"][curve]
        axes.semilogy(
            [row["result"]["every"] * k for k in range(len(values))],
            [max(value, 1e-30) for value in values],
            # some lie on one another
            ("-", "--", ":")[number % 3],
            label=row["params"]["method"],
            linewidth=1.3,
        )
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * count, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _draw_figure1(part: Figure1, rows: Sequence[Row]) -> Figure:
    figure, panels = _panels(len(OPTIMIZERS))
    for panel, optimizer in zip(panels, OPTIMIZERS, strict=True):
        _curves(panel, _of(rows, part="figure1", optimizer=optimizer), "losses")
        panel.set(title=optimizer, ylim=(1e-8, 30))
    panels[0].set_ylabel("loss f(X)")
    _legend(figure, panels)
    return figure


def _draw_galore(part: GaloreTrap, rows: Sequence[Row]) -> Figure:
    figure, panels = _panels(len(part.sigmas))
    for panel, sigma in zip(panels, part.sigmas, strict=True):
        _curves(panel, _of(rows, part="galore", sigma=sigma), "curve")
        panel.set(title=f"noise {sigma:g}, gradient 0.5", ylim=(1e-8, 5))
    panels[0].set_ylabel("||grad f(X)||², mean over seeds")
    _legend(figure, panels)
    return figure


def _figure1_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.figure1
    found = _of(rows, part="figure1")
    lines = [
        [
            row["params"]["optimizer"],
            row["params"]["method"],
            f"{row['result']['first_loss']:.3g}",
            f"{row['result']['last_loss']:.2e}",
            f"{row['result']['last_squared_gradient']:.2e}",
            (
                "no part of the gradient, exactly"
                if row["result"]["trapped_exactly"]
                else "reach the gradient"
            ),
        ]
        for row in found
    ]
    trapped = sorted({row["params"]["method"] for row in found if row["result"]["trapped_exactly"]})
    return (
        "## PowerSGD's trap (Theorem 1, Figure 1)\n\nf(X) = psi(D^T X D), psi(x) = x^2 for |x| <="
        " 1 and 2|x| - 1 beyond; a worker's gradient is G + xi (sigma B - G), G the true one, B"
        f" all ones, xi = +1 or -1 by a fair coin. Rank 1, N = {part.workers}, sigma ="
        f" {part.sigma:g}, {part.steps} steps of momentum SGD (MSGD) or Adam; all coins of the"
        " first step show +1, as the theorem supposes. Every entry of the paper's 2 x 2 example is"
        " repeated in a 2 x 2 block, so that float64 is exact arithmetic for PowerSGD: whether an"
        " update holds any of the gradient is then a question of bits, not of a tolerance. Trapped"
        f" in that sense: {', '.join(trapped) or 'none'}.\n\n![Loss against step, cut off at"
        " 1e-8](figure1.png)\n\n"
        + table(["optimizer", "method", "first loss", "last loss", "last ‖∇f‖²", "updates"], lines)
    )


def _window_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.window
    lines = [
        [row["params"]["coordinates"], row["params"]["dtype"], row["params"]["method"]]
        + [
            "never" if (t := row["result"]["first_visible"][str(n)]) is None else str(t)
            for n in part.workers
        ]
        for row in _of(rows, part="window")
    ]
    return (
        "## The same at the paper's size, and round-off\n\nX is 2 x 2, SGD with rate"
        f" {part.rate:g}. The first step at which D^T X D has moved by more than {part.change:g},"
        f" within {part.steps} steps. Theorem 1 holds in exact arithmetic. In floating point every"
        " power iteration multiplies what round-off has brought into the subspace; with error"
        " feedback the memory grows in the hidden direction besides, and its round-off with it. In"
        " the paper's coordinates both entries of the basis are rounded alike; in rotated ones,"
        " which change nothing in the theorem, they are not.\n\n"
        + table(
            ["coordinates", "number type", "method"] + [f"N = {n}" for n in part.workers], lines
        )
    )


def _galore_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.galore
    lines = []
    for method in part.methods:
        cells = [method.name]
        for sigma in part.sigmas:
            for row in _of(rows, part="galore", sigma=sigma, method=method.name):
                last = row["result"]["last"].values()
                cells.append(
                    f"{row['result']['first']:.3f} → {mean(last):.2e} ({min(last):.1e} to"
                    f" {max(last):.1e})"
                )
        lines.append(cells + [""] * (1 + len(part.sigmas) - len(cells)))
    return (
        f"## GaLore's trap\n\nf(X) = ½‖AX‖² on {part.size} x {part.size} matrices, all singular"
        f" values of the gradient 0.5 at the start; noise of singular value sigma in a {part.block}"
        f" x {part.block} block that f does not see. SGD with rate {part.rate:g}, {part.steps}"
        f" steps, one worker. ‖∇f‖² at the start and at the end, mean over {len(part.seeds)} seeds,"
        " least and largest in brackets. Where the noise is stronger than the gradient, the"
        " leading singular vectors are the noise's at every refresh.\n\n![Squared gradient norm"
        " against step, cut off at 1e-8](galore.png)\n\n"
        + table(["method"] + [f"sigma = {sigma:g}" for sigma in part.sigmas], lines)
    )
