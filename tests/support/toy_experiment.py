"""An experiment that squares numbers, and its preset."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lowrank_comm.lab.experiment import Case, Experiment, LabSettings
from lowrank_comm.lab.runner.preset import Preset, checked


class ToySettings(LabSettings):
    n: int = 3
    scale: float = 1.0
    broken: int | None = None
    seeds: tuple[int, ...] = (0, 1)


class Toy(Experiment):
    """Squares."""

    name, title, Settings = "toy", "A toy", ToySettings
    ran: list[str] = []  # noqa: RUF012

    def cases(self, settings: ToySettings) -> list[Case]:
        return [Case(f"case{k}", {"k": k}) for k in range(settings.n)]

    def run(self, settings: ToySettings, case: Case, progress: Any) -> dict[str, Any]:
        progress(0.5, "half")
        self.ran.append(case.key)
        if case.params["k"] == settings.broken:
            raise ValueError("broken on purpose")
        return {
            "square": settings.scale * case.params["k"] ** 2,
            "third": 1 / 3,
            "lost": float("nan"),
        }

    def figures(self, settings: ToySettings, rows: Any) -> dict[str, Figure]:
        figure = Figure()
        figure.subplots().plot([row["result"]["square"] for row in rows])
        return {"squares": figure}

    def page(self, settings: ToySettings, rows: Any) -> str:
        values = ", ".join(str(row["result"]["square"]) for row in rows)
        return (
            f"Squares: {values}; a third: {rows[0]['result']['third']}.\n\n![the"
            " squares](squares.png)"
        )


def toy_preset(**settings: Any) -> Preset:
    return checked(
        {"experiment": "toy", "description": "Squares.", "settings": settings}, "toy_small", "toy"
    )
