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

from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments import counterexamples_page as pages
from lowrank_comm.lab.experiments.counterexamples_page import OPTIMIZERS
from lowrank_comm.lab.experiments.methods import WithMethods
from lowrank_comm.lab.problems import galore_trap, theorem1

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDS = 120
"""Points of a curve."""
COORDINATES = {"paper": None, "rotated": 0}
"""Coordinates of the window's problem -> seed of the rotation."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Figure1(WithMethods):
    """Theorem 1's problem with every entry repeated 2 x 2. The fields `*_rate` are the
    learning rates of the two optimizers.
    """

    msgd_rate: float = 3e-4
    adam_rate: float = 2e-3
    steps: int = 600
    workers: int = 3
    sigma: float = 3.0
    seed: int = 0


class Window(WithMethods):
    """Theorem 1's problem, 2 x 2, trained by SGD.

    Attributes:
        change: of D^T X D, from which it counts as having moved.
    """

    rate: float = 0.02
    steps: int = 60
    workers: tuple[int, ...] = (1, 3, 5)
    dtypes: tuple[Literal["float32", "float64"], ...] = ("float64", "float32")
    change: float = 1e-3
    sigma: float = 3.0
    seed: int = 0


class GaloreTrap(WithMethods):
    """GaLore's trap, trained by SGD.

    Attributes:
        sigmas: of the noise, where the gradient's singular values are 0.5.
    """

    sigmas: tuple[float, ...] = (1.0, 0.4)
    rate: float = 1e-2
    steps: int = 2000
    size: int = 10
    block: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)


class CounterexampleSettings(LabSettings):
    """The settings of the three parts."""

    figure1: Figure1
    window: Window
    galore: GaloreTrap


class Counterexamples(Experiment):
    name: ClassVar[str] = "counterexamples"
    title: ClassVar[str] = "Counterexamples: two traps and two escapes"
    Settings: ClassVar[type[CounterexampleSettings]] = CounterexampleSettings

    def cases(self, settings: CounterexampleSettings) -> list[Case]:
        """Return one case for each curve and one for each row of the window's table."""
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
        """Return the case's part without its other methods."""
        part = getattr(settings, case.params["part"])
        return part.model_dump(mode="json", exclude={"methods"}) | {
            "section": part.section(case.params["method"])
        }

    def run(
        self, settings: CounterexampleSettings, case: Case, progress: Progress
    ) -> dict[str, Any]:
        """Return a curve, or the steps at which the trap opens."""
        match case.params["part"]:
            case "figure1":
                return _figure1(settings.figure1, case)
            case "window":
                return _window(settings.window, case)
        return _galore(settings.galore, case, progress)

    def figures(self, settings: CounterexampleSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw the loss curves of Figure 1 and the gradient norms of GaLore's trap."""
        return pages.figures(settings, rows)

    def page(self, settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
        return pages.page(settings, rows)


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
    """Return number of workers -> first visible step, None if the trap stayed shut."""
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
