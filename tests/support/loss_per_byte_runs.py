"""Small runs of the language-model experiment, and rows as it makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_comm.lab.experiments.loss_per_byte import LossPerByte, LossPerByteSettings

EXPERIMENT = LossPerByte()
RATES = (0.001, 0.004)
TUNING = (10, 11)


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
        "bases": {"adamw": {"learning_rates": list(RATES), "beta2": [0.99]}},
        "methods": {
            "powersgd": {
                "label": "PowerSGD",
                "group": "rival",
                "section": {"compressor": "powersgd", "rank": 2},
            }
        },
        "factors": [0.5, 1.0],
        "tuning_seeds": list(TUNING),
        "seeds": [1],
    }
    return {"experiment": "loss_per_byte", "settings": settings | changes}


def settings_of(text_file: Path, **changes: Any) -> LossPerByteSettings:
    return LossPerByteSettings.model_validate(contents(text_file, **changes)["settings"])


def row(part: str, method: str, seed: int, loss: float | None, **extra: Any) -> dict[str, Any]:
    """A finished case of base adamw; `extra` goes to its params, but for `sent`."""
    sent = extra.pop("sent", 1000.0)
    params = {"part": part, "base": extra.pop("base", "adamw"), "method": method, "seed": seed}
    return {
        "key": f"{params}",
        "params": params | {"learning_rate": 0.004} | extra,
        "result": {
            "loss": loss,
            "diverged": loss is None,
            "parameters": 1_000_000,
            "steps": 4,
            "curve": [[1, 5.0]],
            "sent": {"bytes": {}, "bytes_per_step": sent, "ratio": 40_000 / sent},
        },
        "seconds": 1.0,
    }


def dense_tuning(losses: dict[float, list[float | None]]) -> list[dict[str, Any]]:
    """Tuning rows of dense training: learning rate -> losses by tuning seed."""
    return [
        row("tune", "dense", seed, loss, learning_rate=rate, beta2=0.99)
        for rate, found in losses.items()
        for seed, loss in zip(TUNING, found, strict=False)
    ]


def tuning(method: str, losses: dict[float, list[float | None]]) -> list[dict[str, Any]]:
    """Tuning rows of a method: factor -> losses by tuning seed."""
    return [
        row("tune", method, seed, loss, factor=factor)
        for factor, found in losses.items()
        for seed, loss in zip(TUNING, found, strict=False)
    ]
