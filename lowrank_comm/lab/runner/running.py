"""Runs the unfinished cases of a preset, one after the other or in processes side by
side, with a progress bar.

A case that raises does not stop the others. It leaves no row, so the next call runs it
again. Under torchrun, where all processes run every case together, it ends the call: a
process that went on would meet the others in the wrong collective.
"""

from __future__ import annotations

import fnmatch
import inspect
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowrank_comm import __version__
from lowrank_comm.errors import ConfigError, LowRankCommError
from lowrank_comm.lab.experiment import Case, Row
from lowrank_comm.lab.experiments import experiment
from lowrank_comm.lab.runner.note import write_note
from lowrank_comm.lab.runner.preset import Preset
from lowrank_comm.lab.runner.progress import Bars, progress_bars
from lowrank_comm.lab.runner.rows import Rows, made_for, plain
from lowrank_comm.lab.runner.sources import sources_hash


@dataclass
class Ended:
    """Outcome of a call.

    Attributes:
        finished: cases with a row now.
        failed: key -> traceback.
        total: cases of the preset.
    """

    finished: int = 0
    total: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def selected(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Return the cases whose key fits the pattern.

    Raises:
        ConfigError: no key fits.
    """
    chosen = [case for case in cases if only is None or fnmatch.fnmatchcase(case.key, only)]
    if not chosen:
        raise ConfigError(
            f"--only {only!r} fits no case; the keys are {', '.join(case.key for case in cases)}."
        )
    return chosen


def run_preset(
    preset: Preset,
    folder: Path,
    *,
    only: str | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> Ended:
    """Run the unfinished cases and append to the folder's rows.

    Args:
        preset: what to run.
        folder: of the rows.
        only: a pattern of case keys, as of file names.
        jobs: processes side by side; with 1, all runs in this process.
        console: where progress is shown; None shows none.

    Raises:
        ConfigError: the folder holds rows of other settings, no case fits `only`, jobs
            < 1, or jobs > 1 under torchrun.
        LowRankCommError: a case failed under torchrun.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs} must be at least 1.")
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if jobs > 1 and together:
        raise ConfigError(
            f"--jobs {jobs} under torchrun: its processes run every case together; leave --jobs"
            " out."
        )
    kind, settings = preset.experiment, preset.settings
    every = kind.cases(settings)
    keys = [case.key for case in every]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(
            f"preset {preset.name}: two cases have the key {twice!r}; change the settings so that"
            " they differ."
        )
    # the sources as they are before the first case; they may be edited while it runs
    rows, now = Rows(folder), sources_hash(Path(inspect.getfile(type(kind))))
    done = rows.of(kind, settings, every)
    todo = [case for case in selected(every, only) if case.key not in done]
    first = first_process()
    if first:
        write_note(preset, folder)
        older = [key for key, row in done.items() if row.get("code") != now]
        if older and console is not None:
            console.print(
                f"{len(older)} of {len(done)} finished cases were run by another version of the"
                f" sources (the first: {older[0]}); delete {rows.path} to run them again.",
                markup=False,
                highlight=False,
            )
    ended = Ended(finished=len(done), total=len(every))
    with progress_bars(console if first else None, preset.name, len(every), len(done)) as bars:
        for stage in sorted({kind.stage(settings, case) for case in todo}):
            given = {case.key: case for case in todo if kind.stage(settings, case) == stage}
            ready = _prepared(preset, list(given.values()), list(done.values()), ended)
            for case, outcome in _outcomes(preset, ready, jobs, bars):
                if isinstance(outcome, str):
                    ended.failed[case.key] = outcome
                    if together:
                        raise LowRankCommError(
                            f"{case.key} failed; the finished cases stay. {outcome}"
                        )
                else:
                    if first:
                        made = {
                            "made_for": made_for(kind, settings, given[case.key]),
                            "code": now,
                            "versions": {"lowrank_comm": __version__, "torch": torch.__version__},
                        }
                        rows.append(outcome | made)
                    done[case.key] = outcome
                    ended.finished += 1
                bars.case_ended(case.key, isinstance(outcome, str))
    return ended


def first_process() -> bool:
    """Return whether this process writes: under torchrun all processes run every case
    together, and the first one writes.
    """
    return int(os.environ.get("RANK", "0")) == 0


def _prepared(
    preset: Preset, cases: Sequence[Case], rows: Sequence[Row], ended: Ended
) -> list[Case]:
    """Return the cases of a stage as they are to be run; enter those that cannot run as
    failed.
    """
    ready = []
    for case in cases:
        try:
            ready.append(preset.experiment.prepared(preset.settings, case, rows))
        except ConfigError:
            ended.failed[case.key] = traceback.format_exc()
    return ready


def ordered_rows(preset: Preset, folder: Path) -> list[Row]:
    """Return the finished rows in the order of the cases."""
    cases = preset.experiment.cases(preset.settings)
    found = Rows(folder).of(preset.experiment, preset.settings, cases)
    return [found[case.key] for case in cases if case.key in found]


def one_case(name: str, settings: dict[str, Any], case: Case, progress: Any) -> Row | str:
    """Run a case; return its row, or the traceback of the error. The arguments are
    plain, so that they can be passed to another process.
    """
    kind = experiment(name)
    start = time.perf_counter()
    try:
        result = kind.run(kind.Settings.model_validate(settings), case, progress)
        seconds = round(time.perf_counter() - start, 3)
        return {
            "key": case.key,
            "params": plain(case.params),
            "result": plain(result),
            "seconds": seconds,
        }
    except Exception:
        return traceback.format_exc()


def _outcomes(
    preset: Preset, todo: Sequence[Case], jobs: int, bars: Bars
) -> Iterator[tuple[Case, Row | str]]:
    """Yield each case with its outcome as it ends."""
    name, settings = preset.experiment.name, preset.settings.model_dump(mode="json")
    if jobs == 1:
        for case in todo:
            yield (
                case,
                one_case(
                    name,
                    settings,
                    case,
                    lambda share, text, key=case.key: bars.at(key, share, text),
                ),
            )
        return
    with multiprocessing.Manager() as manager, _pool(jobs) as pool:
        queue = manager.Queue()
        pending: dict[Future[Row | str], Case] = {
            pool.submit(_one_case_elsewhere, name, settings, case, queue): case for case in todo
        }
        while pending:
            finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                bars.at(*queue.get())
            for future in finished:
                case = pending.pop(future)
                error = future.exception()
                yield case, future.result() if error is None else f"the process ended: {error!r}"


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _one_case_elsewhere(name: str, settings: dict[str, Any], case: Case, queue: Any) -> Row | str:
    """Run a case in a process of its own, with one thread: processes side by side that
    each take all cores hinder one another.
    """
    torch.set_num_threads(1)
    last = 0.0

    def progress(share: float, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            queue.put((case.key, share, text))

    return one_case(name, settings, case, progress)
