"""Small runs of the language-model experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_comm.lab.experiments.language_model import LanguageModel, LanguageModelSettings

EXPERIMENT = LanguageModel()


def contents(text_file: Path, **changes: Any) -> dict[str, Any]:
    """A preset's content, small enough for a test."""
    settings: dict[str, Any] = {
        "text": {
            "file": str(text_file),
            "vocabulary": 300,
            "sequence_length": 16,
            "held_out_tokens": 320,
            "cache": str(text_file.parent / "cache"),
        },
        "workers": 2,
        "training": {"model": "S", "batch": 2, "recipe": {"steps": 4, "warmup_steps": 1}},
        "reference": "adam",
        "methods": {
            "adam": {
                "label": "full precision",
                "section": {"compressor": "identity"},
                "has_rank": False,
            },
            "powersgd": {"label": "PowerSGD", "section": {"compressor": "powersgd"}},
        },
        "ranks": [2],
        "learning_rates": [0.001, 0.004],
        "tuning_rank": 2,
        "tuning_seed": 0,
        "seeds": [1],
    }
    return {"experiment": "language_model", "settings": settings | changes}


def settings_of(text_file: Path, **changes: Any) -> LanguageModelSettings:
    return LanguageModelSettings.model_validate(contents(text_file, **changes)["settings"])


def tuned(method: str, perplexities: dict[float, float | None]) -> list[dict]:
    return [
        {
            "key": "",
            "params": {"part": "tune", "method": method, "learning_rate": rate},
            "result": {"perplexity": perplexity},
        }
        for rate, perplexity in perplexities.items()
    ]
