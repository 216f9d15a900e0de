"""Figures to watch while training: as a flat dict for a logger (TensorBoard, W&B,
Trainer), or as lines of JSON.

One definition for all: what the ledger has counted since the last look, as means over
the steps between, and the norms of the last step. The keys begin with "compression/".
Norms are computed when they are read, on this worker alone: no figure takes a
collective.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from lowrank_comm.communication import Ledger
from lowrank_comm.errors import ConfigError
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.report import StepReport

PREFIX = "compression/"


class Compressing(Protocol):
    """What has figures: a `CompressedOptimizer`, or what
    `lowrank_comm.integrations.deepspeed.get(engine)` returns.
    """

    @property
    def ledger(self) -> Ledger: ...

    @property
    def last_report(self) -> StepReport | None: ...

    @property
    def reducer(self) -> Reducer: ...


class Figures:
    """What compression did since the last look.

    Args:
        source: a `CompressedOptimizer`, or the adapter of a DeepSpeed engine.

    Raises:
        ConfigError: something else, such as a plain optimizer.

    Example:
        >>> import torch
        >>> from lowrank_comm import CompressedOptimizer, PowerSGD
        >>> layer = torch.nn.Linear(64, 64)
        >>> base = torch.optim.SGD(layer.named_parameters(), lr=0.1)
        >>> optimizer = CompressedOptimizer(base, PowerSGD(rank=1))
        >>> figures = Figures(optimizer)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> figures.since_last()["compression/steps"]
        1.0
    """

    def __init__(self, source: Compressing) -> None:
        lacks = [
            name
            for name in ("ledger", "last_report", "reducer")
            if not hasattr(type(source), name) and name not in getattr(source, "__dict__", ())
        ]
        if lacks:
            raise ConfigError(
                f"Figures: {type(source).__name__} has no {' and no '.join(lacks)}; give a"
                " CompressedOptimizer (of what Accelerate has prepared,"
                " lowrank_comm.integrations.accelerate.get(optimizer); of a DeepSpeed engine,"
                " lowrank_comm.integrations.deepspeed.get(engine))."
            )
        self._source = source
        self._before = self._totals()

    def _totals(self) -> dict[str, float]:
        ledger = self._source.ledger
        return {
            "steps": ledger.steps,
            "skipped_steps": ledger.vetoed,
            "bytes": ledger.total_bytes,
            "inside_bytes": sum(ledger.inside.values()),
            "uncompressed_bytes": ledger.uncompressed_bytes,
            "collectives": ledger.collectives,
            "restarts": ledger.restarts,
            **{f"ms/{phase}": 1e3 * seconds for phase, seconds in ledger.seconds.items()},
        }

    def since_last(self) -> dict[str, float]:
        """Return the figures since this was last called, or since the start; empty if
        there was no step.

        Returns:
            steps, and how many of them were skipped on all workers (a gradient was not
            finite); restarts, in matrices; ratio (uncompressed bytes over bytes sent),
            bytes and collectives a step, `inside_bytes` between the ranks of a node
            where there are two levels; host milliseconds a step by phase; and of the
            last step this worker's captured_energy and error_norm (see
            `reduction.report.StepReport`).
        """
        totals = self._totals()
        history = {key: value - self._before.get(key, 0) for key, value in totals.items()}
        steps = history["steps"]
        if not steps:
            return {}
        self._before = totals
        report = self._source.last_report
        found: dict[str, float | None] = {
            "steps": steps,
            "skipped_steps": history["skipped_steps"],
            "restarts": history["restarts"],
            "ratio": history["uncompressed_bytes"] / history["bytes"] if history["bytes"] else None,
            "bytes": history["bytes"] / steps,
            "inside_bytes": history["inside_bytes"] / steps or None,
            "collectives": history["collectives"] / steps,
            "captured_energy": report.captured_energy if report else None,
            "error_norm": report.error_norm if report else None,
            **{key: history[key] / steps for key in history if key.startswith("ms/")},
        }
        return {PREFIX + key: float(value) for key, value in found.items() if value is not None}


class StepLog:
    """Writes a file of JSON lines for plain loops: `step`, the figures, and what else
    the loop gives. One process writes.

    Args:
        source: a `CompressedOptimizer`, or the adapter of a DeepSpeed engine.
        path: the file; lines are added to one that is there, so that a resumed run goes
            on with it.
        every: a line every so many calls of `write`.

    Raises:
        ConfigError: `every` is not an integer of at least 1.

    Example:
        with StepLog(optimizer, "log.jsonl", every=10) as log:
            for x, y in batches:
                ...
                optimizer.step()
                log.write(loss=loss)
    """

    def __init__(self, source: Compressing, path: str | Path, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(
                f"StepLog: every must be an integer of at least 1, got {every!r}; write for example"
                " every=10."
            )
        self._source, self._figures, self._every, self._calls = source, Figures(source), every, 0
        self._file = None
        if source.reducer.workers.is_writer:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  (closed by close)

    def write(self, **more: Any) -> None:
        """Add a line if one is due; to be called once a step, on all workers.

        Args:
            more: further entries of the line, such as loss=loss; tensors of one element
                become numbers.
        """
        self._calls += 1
        if self._file is None or self._calls % self._every:
            return
        plain = {
            key: value.item() if isinstance(value, Tensor) else value for key, value in more.items()
        }
        line = {"step": self._source.reducer.step, **plain, **self._figures.since_last()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
