"""What the campaign calls wrong, on runs that were made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.campaign import Reference, judge
from tests.faults.plan import EVERY, STEPS, Measured, plan
from tests.faults.processes import Ended
from tests.faults.worker import Job

LOSSES = [{step: 1.0 / step + rank for step in range(1, STEPS + 1)} for rank in range(2)]
PARAMETERS = {"weight": torch.ones(3, 2, dtype=torch.float64)}
EXPECTED = Reference(LOSSES, PARAMETERS, Measured(0.01, [3, 1], 1000))
KILLED, WELL = Ended([1, -9], [0.5, 0.1], [], ["", ""]), Ended([0, 0], [9.0, 9.0], [], ["", ""])


def made_up(folder: Path, reached: int = 8, first: int = 7, **other: Any) -> Job:
    """A run of two ranks that reached a step, and was started again from another."""
    (folder / "log").mkdir(parents=True)
    (folder / "fault.json").write_text(json.dumps({"time": 1.0}))
    for rank in range(2):
        lines: list[dict[str, Any]] = [{"event": "start", "first": 1}]
        steps = [*range(1, reached + 1), 0, *range(first, STEPS + 1)]
        for step in steps:
            if step == 0:
                lines.append({"event": "start", "first": first})
                continue
            loss = other.get("losses", LOSSES)[rank][step]
            lines.append({"event": "step", "step": step, "loss": loss})
        digest = "same" if not other.get("ranks_differ") else str(rank)
        lines.append({"event": "end", "digest": digest})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "log" / f"rank{rank}.jsonl").write_text(text)
    torch.save(other.get("parameters", PARAMETERS), folder / "final.pt")
    return Job("ddp", str(folder), STEPS, EVERY)


def wrong(folder: Path, ends: list[Ended] | None = None, refusals: Any = (), **run: Any) -> Any:
    """The row of such a run, after a SIGKILL."""
    planned = plan("ddp", "SIGKILL", 0, EXPECTED.measured)
    ends = ends or [KILLED, WELL]
    return judge(made_up(folder, **run), planned, EXPECTED, ends, list(refusals))


def test_a_run_that_goes_on_as_it_must_is_right(tmp_path: Path) -> None:
    row = wrong(tmp_path)
    assert row["wrong"] == []
    assert (row["outcome"], row["lost"], row["executed"]) == ("resumed", 2, STEPS + 2)


def slightly(losses: list[dict[int, float]]) -> list[dict[int, float]]:
    return [losses[0], losses[1] | {9: losses[1][9] * (1 + 1e-7)}]


@pytest.mark.parametrize(
    ("run", "what"),
    [
        ({"parameters": {"weight": PARAMETERS["weight"] + 1e-7}}, "diverged"),
        # one loss of one rank
        ({"losses": slightly(LOSSES)}, "diverged"),
        ({"ranks_differ": True}, "ranks differ"),
        ({"reached": 8, "first": 4}, "more than one save interval lost"),
        ({"ends": [KILLED, replace(WELL, hung=[0])]}, "hang"),
        ({"ends": [KILLED, KILLED]}, "not finished"),
        ({"refusals": [["", ""]]}, "a checkpoint had to be removed by hand"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_must_not_be_is_seen(tmp_path: Path, run: dict[str, Any], what: str) -> None:
    assert wrong(tmp_path, **run)["wrong"] == [what]
