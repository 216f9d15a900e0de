"""Starts the processes of each part, collects what they found, and keeps to the time:
what does not fit is skipped, and said so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence import ROOT
from benchmarks.gpu.parts import Part

COLLECTIVE_SECONDS = 60
"""That a collective may wait for a rank."""
LEAST = 5.0
"""Seconds for which it is worth starting processes."""
GRACE = 10.0
"""Seconds that a check which has begun in time may take beyond it, and that the other
ranks have to end after one has failed."""
NOT_ENDED = "had not ended when the time was up"


@dataclass(frozen=True)
class Row:
    """What a check gave. `seconds` are rank 0's."""

    part: str
    check: str
    status: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Attempt:
    """One set of processes that makes some checks of a part.

    Args:
        part: which ranks over which backend.
        kind: of device.
        checks: names, to be made in this order.
        deadline: after which no check begins, in seconds since the epoch.
        job: path of the job's file, new for each attempt.
        module: has `checks_of`.
    """

    def __init__(
        self, part: Part, kind: str, checks: list[str], deadline: float, job: Path, module: str
    ) -> None:
        self._part, self._checks, self._deadline, self._job = part, checks, deadline, job
        content = {
            "module": module,
            "part": part.name,
            "backend": part.backend,
            "ranks": part.ranks,
            "device": kind,
            "checks": list(checks),
            "deadline": deadline,
            "collective_seconds": COLLECTIVE_SECONDS,
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        self._environment = {"OMP_NUM_THREADS": "1"} if kind == "cpu" else {}
        if sys.platform == "linux":
            # the name of a bare machine may lead to no address
            self._environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        # of each rank, how it ended too early
        self._ended: dict[int, str] = {}

    def run(self) -> Iterator[Row]:
        """Yield each check's row when all ranks have made it; the processes have ended
        afterwards. Checks that were not reached have no row.
        """
        processes = [self._start(rank) for rank in range(self._part.ranks)]
        try:
            yield from self._rows(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        here = {"RANK": str(rank), "WORLD_SIZE": str(self._part.ranks), "LOCAL_RANK": str(rank)}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", str(self._job), str(rank)],
                cwd=ROOT,
                env=os.environ | self._environment | here | {"PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, rank: int) -> Path:
        return self._job.with_name(f"{self._job.name}.{rank}.log")

    def _rows(self, processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[Row]:
        given, ends_by = 0, self._deadline + GRACE
        while True:
            codes = [process.poll() for process in processes]
            if any(codes):
                # whoever waits for the one that failed
                ends_by = min(ends_by, time.time() + GRACE)
            late = time.time() > ends_by
            # after the codes: what ended processes have written is complete
            rows = self._together()
            yield from rows[given:]
            given = len(rows)
            if late or None not in codes:
                break
            time.sleep(0.05)
        for rank, code in enumerate(codes):
            if code is None:
                self._ended[rank] = NOT_ENDED
            elif code:
                self._ended[rank] = f"ended with exit code {code}: {self._last_words(rank)}"
        if self._ended:
            broken = self._broken(late and not any(codes))
            if broken.check not in [row.check for row in rows]:
                yield broken

    def lines(self) -> list[dict[str, Any]]:
        """Return what all ranks have written."""
        return [line for rank in range(self._part.ranks) for line in self._lines(rank)]

    def _lines(self, rank: int) -> list[dict[str, Any]]:
        path = self._job.with_name(f"{self._job.name}.{rank}")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # without a line that is being written
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [json.loads(line) | {"rank": rank} for line in whole]

    def _together(self) -> list[Row]:
        """Return the rows of the checks that all ranks have made, in order."""
        of_ranks = [
            {line["check"]: line for line in self._lines(rank) if "status" in line}
            for rank in range(self._part.ranks)
        ]
        return [
            self._merged([lines[name] for lines in of_ranks])
            for name in self._checks
            if all(name in lines for lines in of_ranks)
        ]

    def _merged(self, lines: Sequence[dict[str, Any]]) -> Row:
        """Return rank 0's row, or that of the rank whose check failed first: the others
        may only have lost it.
        """
        failed = [rank for rank, line in enumerate(lines) if line["status"] == "failed"]
        rank = min(failed, key=lambda rank: lines[rank]["at"], default=0)
        line, where = lines[rank], f"rank {rank}: " if failed and self._part.ranks > 1 else ""
        text, figures, seconds = where + line["text"], line["figures"], lines[0]["seconds"]
        return Row(self._part.name, line["check"], line["status"], text, figures, seconds)

    def _broken(self, late: bool) -> Row:
        """Return the row of the check in which processes ended too early: how those
        ended that could not say why, or the words of the rank that was the first to
        fail.

        Args:
            late: they were ended, as the time was up.
        """
        reached = self.lines()
        check = max(
            (line["check"] for line in reached), key=self._checks.index, default=self._checks[0]
        )
        here = [line for line in reached if line["check"] == check]
        began = min((line["at"] for line in here), default=0)
        failed = [line for line in here if line.get("status") == "failed"]
        if late and time.time() - began < COLLECTIVE_SECONDS:
            return Row(self._part.name, check, "skipped", "its part's time was up before its end")
        said = {line["rank"] for line in failed}
        silent = [
            f"rank {rank} {how}" for rank, how in sorted(self._ended.items()) if rank not in said
        ]
        killed = [words for words in silent if NOT_ENDED not in words]
        first = min(failed, key=lambda line: line["at"], default={"text": "; ".join(silent)})
        return Row(self._part.name, check, "failed", "; ".join(killed) or first["text"])

    def _last_words(self, rank: int) -> str:
        lines = self._log(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def made(
    part: Part,
    kind: str,
    checks: Sequence[str],
    seconds: float,
    folder: Path,
    module: str = "benchmarks.gpu.parts",
) -> Iterator[Row]:
    """Yield the row of each check of a part; new processes go on after one that broke.

    Args:
        checks: names.
        seconds: that the part may take.
        folder: for files of the processes.
        module: has `checks_of`.
    """
    begin, left, number, reached = time.time(), list(checks), 0, True
    while left and reached and time.time() - begin < seconds - LEAST * (number > 0):
        job = folder / f"{part.name.replace(' ', '_')}.{number}"
        attempt = Attempt(part, kind, list(left), begin + seconds, job, module)
        for row in attempt.run():
            left.remove(row.check)
            yield row
        # processes that do not even begin do not the next time either
        number, reached = number + 1, bool(attempt.lines())
    why = f"no time: this part has {seconds:.0f} s" if reached else "its processes do not start"
    for name in left:
        yield Row(part.name, name, "skipped", why)
