"""Every registered compressor as the conformance suite runs it: settings, and a
worker's view of one compressed step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.compressors import REGISTRY, Compressor, Context, Result
from lowrank_comm.config import Section
from lowrank_comm.error_feedback.rounds import dense
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.simulation import Simulation
from tests.support.driver import at, drive
from tests.support.reference import gradient

SETTINGS: dict[str, list[dict[str, Any]]] = {name: [{}] for name in REGISTRY} | {
    "powersgd": [{}, {"power_iterations": 2}],
    "powersgd_plus": [
        {"restart_every": 3},
        {"restart_every": 3, "restart": "randomized"},
        {"restart_every": 3, "restart": "greedy"},
        {"restart_every": 3, "restart": "random_projection"},
        {"restart_every": 3, "exact_restart": True},
        {"restart_every": 3, "consensus_restart": True},
        {"restart_every": 3, "stagger": True},
    ],
    "acp": [{}, {"restart_every": 5}],
    "greedylore": [
        {"restart_every": 3},
        {"restart_every": 3, "basis": 4, "explore": 1, "probes": 2},
    ],
    "galore": [
        {"restart_every": 3},
        {"restart_every": 3, "side": "long", "apply_full": True},
        {"restart_every": 3, "error_feedback": {"form": "ef14"}},
    ],
    "golore": [
        {"restart_every": 3, "error_feedback": {"form": "ef14"}},
        {"restart_every": 3, "galore_until": 4},
        {"restart_every": 3, "scaled": True},
    ],
    "atomo": [
        {},
        {"sampling": "bernoulli"},
        {"contractive": True, "error_feedback": {"form": "ef14"}},
    ],
    "random_projection": [{}, {"form": "unbiased"}],
}
"""By name in JSON. A registered compressor that is not here runs by its defaults."""

AROUND: list[dict[str, Any]] = [
    {"error_feedback": {"form": "ef21"}},
    {"error_feedback": {"form": "ef21_sgdm", "momentum": 0.3}},
    {"error_feedback": {"rounds": 3}},
    {"quantization": {"factors": "int8", "dense": "sign"}},
    {"quantization": {"factors": "sign", "restart": "int4", "dense": "int4"}},
]
"""What may be around a compressor."""

SHAPES = {"tall": (12, 7), "wide": (7, 12), "filter": (6, 3, 2, 2), "bias": (5,), "scale": ()}
MATRICES = ("tall", "wide", "filter")


def sections(around: bool = False) -> list[dict[str, Any]]:
    """One section a variant; `around`: also the first variants with each of what may be
    around them.
    """
    plain = [
        {"compressor": name, "rank": 2, **one} for name, many in SETTINGS.items() for one in many
    ]
    if not around:
        return plain
    first = {name: {"compressor": name, "rank": 2, **many[0]} for name, many in SETTINGS.items()}
    return plain + [
        {**section, **suited(section, one)}
        for one in AROUND
        for section in first.values()
        if goes_with(section, one)
    ]


def combinations() -> list[tuple[str, dict[str, Any]]]:
    """Path and section: all on the CPU's path. On the accelerator's all variants, and
    every third of those with something around: by turns, since there are more
    compressors than three.
    """
    plain, all_of_them = sections(), sections(around=True)
    there = plain + all_of_them[len(plain) :: 3]
    return [("cpu", one) for one in all_of_them] + [("accelerator", one) for one in there]


def goes_with(section: Mapping[str, Any], around: Mapping[str, Any]) -> bool:
    """Error feedback needs a contractive compressor; codes, something that is averaged,
    and error feedback.
    """
    compressor = compressor_of(section)
    if not compressor.low_rank:
        return False
    if "error_feedback" in around:
        return compressor.contractive
    return (
        not compressor.gathers
        and section.get("error_feedback", {}).get("form", compressor.feedback) == "ef14"
    )


def suited(section: Mapping[str, Any], around: dict[str, Any]) -> dict[str, Any]:
    """Without codes for restarts, where these send nothing of their own."""
    codes = around.get("quantization", {})
    if "restart" not in codes or compressor_of(section).averages_restarts:
        return around
    return {"quantization": {key: value for key, value in codes.items() if key != "restart"}}


def label(section: Mapping[str, Any]) -> str:
    """For the tests' names."""
    words = [
        f"{key}={value}" for key, value in section.items() if key not in ("compressor", "rank")
    ]
    return " ".join([section["compressor"], *words])


def compressor_of(section: Mapping[str, Any]) -> Compressor:
    return Section.parse(section).make_compressor()


def simulated(
    section: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    workers: int,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> Simulation:
    """The simulation of a section, with every matrix compressed."""
    parsed = Section.parse({"min_compression_rate": 0, **section})
    return Simulation(
        shapes,
        parsed.make_compressor(),
        workers,
        dtype=dtype,
        **{**parsed.reducer_options(), **more},
    )


def drawn(
    step: int,
    worker: int,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """One worker's gradients."""
    return {
        name: torch.as_tensor(gradient(tuple(shape), step, worker, k), dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }


def state_of(reducer: Reducer) -> dict[str, Tensor]:
    """Everything that a reducer has learnt, copied, by name and symbol."""
    errors = {
        f"{name}/error": error.clone() for name, error in reducer.state.error_memory().items()
    }
    return errors | {
        f"{name}/{k}": v.clone()
        for name, state in reducer.state.bases().items()
        for k, v in state.items()
    }


def one_step(
    compressor: Compressor,
    deltas: Sequence[Tensor],
    t: int = 1,
    restart: bool = False,
    seed: int = 0,
    state: Any = None,
) -> list[Result]:
    """One step from the initial state on given matrices (m, n), one a worker, with the
    plain driver.
    """
    m, n = deltas[0].shape
    context = at(compressor, Context(("w",), t, seed, min(compressor.rank, m, n), m=m), t, restart)
    like = torch.empty(0, dtype=deltas[0].dtype)
    state = compressor.initial_state(context, m, n, like) if state is None else state
    return drive(compressor, [delta[None] for delta in deltas], [state] * len(deltas), context)


def applied_of(result: Result) -> Tensor:
    return dense(result.applied)[0]


def sent_of(result: Result) -> Tensor:
    return dense(result.sent)[0]
