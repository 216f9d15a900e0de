"""Callbacks of the examples: a progress bar with the loss, and one line of figures a
step in `log.jsonl`.

A Trainer's own progress callback prints a line for every log; with one log a step that
hides the bar. Every line has the totals since the run began; so has a line for each
checkpoint, which a resumed run starts from, and one for the end.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from report import LOG, WINDOW, Summary, read_log
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

# The first steps allocate memory and warm caches; the mean time of a step leaves them
# out.
WARM_UP_STEPS = 2


class CompressionHandle(Protocol):
    """What this file uses of `lowrank_comm.integrations.deepspeed.get(engine)`."""

    @property
    def last_report(self) -> Any: ...

    @property
    def ledger(self) -> Any: ...


def gradient_bytes(model: torch.nn.Module, number: int | None = None) -> int:
    """Bytes that an all-reduce of all gradients carries: tied parameters once, ZeRO-3's
    shards at full size. `number`: bytes of a number, None for those of the parameter's.
    """
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) * (number or p.element_size()) for p in trained)


class Bar(ProgressCallback):
    """Trainer's progress bar with the loss behind it, not a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Put the loss behind the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


class FinishedBefore(Exception):
    """The checkpoint that a run was resumed from is that of its last step."""


class StopWhereFinished(TrainerCallback):
    """Leaves `trainer.train()` by `FinishedBefore`, checkpoint loaded, where no step is
    left: Trainer itself looks for the end after a step, and would do one too many.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Leave, on all ranks alike."""
        if state.global_step >= state.max_steps:
            raise FinishedBefore


class Recorder(TrainerCallback):
    """Writes `log.jsonl`: after every logged step its loss and time, and what the run
    has sent so far.

    `find_handle` is asked when training begins (the engine exists only then) for what
    knows the compressor's figures; None means an uncompressed run, whose bytes follow
    from the parameters. `checkpoint` is what the run is resumed from: if it lies in
    another run's folder, that run's log is gone on with. `number` is how many bytes a
    number takes that an uncompressed run sends, None where the engine sends the
    parameters' own. Only rank 0 writes; the figures are its own, and every worker sends
    the same.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        find_handle: Callable[[], CompressionHandle | None],
        checkpoint: Path | None = None,
        number: int | None = None,
    ):
        self.trainer = trainer
        self.file = folder / LOG
        self.folder = folder
        self.find_handle = find_handle
        self.checkpoint = checkpoint
        self.number = number
        # that the totals count
        self.first_step = 1
        self.handle: CompressionHandle | None = None
        self.counted = self.dense_bytes = self.sent_bytes = 0
        self.started = 0.0
        self.since_log: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}

    def totals(self) -> dict[str, Any]:
        """What this process has counted since it began, as `log.jsonl` names it."""
        if self.handle is None:
            return {
                "bytes": {"all-reduce": self.counted * self.sent_bytes},
                "uncompressed_bytes": self.counted * self.dense_bytes,
            }
        ledger = self.handle.ledger
        return {
            "bytes": {str(kind): count for kind, count in ledger.bytes.items()},
            "uncompressed_bytes": ledger.uncompressed_bytes,
            "collectives": ledger.collectives,
            "restarts": ledger.restarts,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Start the log, or go on with that of the run which is resumed."""
        self.handle = self.find_handle()
        self.counted = 0
        self.dense_bytes = gradient_bytes(self.trainer.model)
        self.sent_bytes = gradient_bytes(self.trainer.model, self.number)
        self.before = {}
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0:
            folders = [self.folder] + ([self.checkpoint.parent] if self.checkpoint else [])
            for folder in [one for one in folders if (one / LOG).exists()][:1]:
                kept = [line for line in read_log(folder) if line["step"] <= state.global_step]
        self.first_step = 1 if kept else state.global_step + 1
        totals = [line for line in kept if "bytes_total" in line]
        # What the resumed run had sent, less what this process has counted so far.
        self.before = add(totals[-1] if totals else {}, self.totals(), sign=-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock of an optimizer step (all of its micro-steps)."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock and keep the step's report until its loss is logged."""
        self.counted += 1
        step: dict[str, Any] = {
            "seconds": time.perf_counter() - self.started,
            "warm_up": self.counted <= WARM_UP_STEPS,
        }
        report = self.handle.last_report if self.handle is not None else None
        if report is not None:
            step |= {"phases": dict(report.seconds), "captured_energy": report.captured_energy}
        self.since_log.append(step)
        if state.global_step >= state.max_steps:
            # the last step counts, whatever --logging_steps says
            control.should_log = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write the totals, with what the checkpoint itself has sent: a resumed run
        goes on from here.
        """
        self.write(state, {"step": state.global_step, **self.totals_so_far()})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Write the totals of the whole run."""
        self.write(state, {"step": state.global_step, **self.totals_so_far()})

    def totals_so_far(self) -> dict[str, Any]:
        """Totals since the run began, over all the times that it was resumed."""
        totals = add(self.before, self.totals())
        return {"bytes_total": sum(totals["bytes"].values()), **totals}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Write a line: means over the steps since the last one, totals since the run
        began.
        """
        if not logs or "loss" not in logs or not self.since_log:
            return
        steps, self.since_log = self.since_log, []
        timed = [step for step in steps if not step["warm_up"]] or steps
        phases: Counter[str] = Counter()
        for step in timed:
            phases.update(step.get("phases", {}))
        energies = [
            step["captured_energy"] for step in steps if step.get("captured_energy") is not None
        ]
        self.write(
            state,
            {
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs.get("learning_rate"),
                "seconds": statistics.fmean(step["seconds"] for step in timed),
                "warm_up": timed[0]["warm_up"],
                "phases": {phase: seconds / len(timed) for phase, seconds in phases.items()},
                "captured_energy": statistics.fmean(energies) if energies else None,
                "steps": len(steps),
                **self.totals_so_far(),
            },
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        """Write the held-out perplexity."""
        if metrics and "eval_loss" in metrics:
            self.write(
                state,
                {
                    "step": state.global_step,
                    "perplexity": math.exp(min(metrics["eval_loss"], 700.0)),
                },
            )

    def write(self, state: TrainerState, line: dict[str, Any]) -> None:
        """Append one line on rank 0."""
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def summary(self, name: str, setup: dict[str, Any], section: dict[str, Any] | None) -> Summary:
        """The whole run's figures, from its log."""
        lines = read_log(self.folder)
        steps = [line for line in lines if "loss" in line]
        perplexities = [line for line in lines if "perplexity" in line]
        timed = [line for line in steps if not line["warm_up"]] or steps
        with_energy = [line for line in steps if line["captured_energy"] is not None]
        totals = [line for line in lines if "bytes_total" in line][-1]
        end = last_lines(steps)
        return Summary(
            name=name,
            setup=setup,
            steps=totals["step"],
            first_loss=steps[0]["loss"],
            first_loss_steps=steps[0]["steps"],
            last_loss=weighted_mean(end, "loss"),
            last_loss_steps=sum(line["steps"] for line in end),
            first_perplexity=perplexities[0]["perplexity"]
            if perplexities and perplexities[0]["step"] == 0
            else None,
            last_perplexity=perplexities[-1]["perplexity"]
            if perplexities and perplexities[-1]["step"] == totals["step"]
            else None,
            bytes={kind: count for kind, count in totals["bytes"].items() if count},
            uncompressed_bytes=totals["uncompressed_bytes"],
            step_seconds=weighted_mean(timed, "seconds"),
            compressor=section,
            collectives=totals.get("collectives"),
            restarts=totals.get("restarts"),
            captured_energy=weighted_mean(with_energy, "captured_energy") if with_energy else None,
            phases={
                phase: weighted_mean(
                    [line | {"phase": line["phases"].get(phase, 0.0)} for line in timed], "phase"
                )
                for phase in steps[-1]["phases"]
            },
        )


def last_lines(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last logged lines that together stand for at least WINDOW steps."""
    chosen: list[dict[str, Any]] = []
    for line in reversed(steps):
        chosen.append(line)
        if sum(one["steps"] for one in chosen) >= WINDOW:
            break
    return chosen


def weighted_mean(lines: list[dict[str, Any]], key: str) -> float:
    """Over steps, where a line stands for several."""
    return sum(line[key] * line["steps"] for line in lines) / sum(line["steps"] for line in lines)


def add(base: dict[str, Any], totals: dict[str, Any], sign: int = 1) -> dict[str, Any]:
    """`base + sign * totals` for the figures of `totals`; in dictionaries, for the keys
    of both; absent counts as 0.
    """
    return {
        key: {
            k: base.get(key, {}).get(k, 0) + sign * value.get(k, 0)
            for k in {**value, **base.get(key, {})}
        }
        if isinstance(value, dict)
        else base.get(key, 0) + sign * value
        for key, value in totals.items()
    }
