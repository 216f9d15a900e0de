"""The faults, and the points of a run at which they strike.

A worker calls `at(point, step)` where something may happen to it: before a step
("step"), between backward pass and optimizer step ("between"), before a save ("save")
and after one ("saved"). A fault strikes once, on one rank. The instant is written down
first: `<folder>/fault.json`, which also keeps a later start from failing again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    "SIGKILL",
    "SIGSTOP",
    "exception",
    "exit 0",
    "link down",
    "full disk",
    "read-only disk",
    "damaged file",
)


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    kind: one of KINDS. rank: whom it strikes; for disks, who does it to the folder that
        all have in common.
    point, step: where, see above.
    delay: "SIGKILL" in a save: seconds after its beginning.
    event: "SIGKILL" in a save: before its so-many-th change of a file (0: by `delay`).
    seconds: "SIGSTOP", "link down": how long.
    left: "full disk": bytes that stay free.
    link: "link down": namespace and interface of the switch's end.
    """

    kind: str
    rank: int
    point: str
    step: int
    delay: float = 0.0
    event: int = 0
    seconds: float = 0.0
    left: int = 0
    link: tuple[str, str] | None = None


class InjectedError(RuntimeError):
    """What the fault "exception" raises."""


_fault: Fault | None = None
_rank = -1
_note = Path()
_disk = Path()
_tell: Callable[..., None] = print
_counted = 0
_kill_at = 0
_saving = False
# Names of the audit events that change a file system.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def arm(fault: Fault | None, rank: int, folder: str, disk: Path, tell: Callable[..., None]) -> None:
    """Prepare this process; a fault that has struck before does not strike again."""
    global _fault, _rank, _note, _disk, _tell
    _rank, _note, _disk, _tell = rank, Path(folder) / "fault.json", disk, tell
    _fault = None if fault is None or fault.rank != rank or _note.exists() else fault
    sys.addaudithook(_on_audit)


def _on_audit(name: str, given: tuple[Any, ...]) -> None:
    """Count what changes the checkpoints' file system, and strike before it happens."""
    global _counted
    if not _saving or (name != "open" and name not in _CHANGES):
        return
    path = given[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    if name == "open":
        mode, flags = given[1], given[2]
        writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        if not writes:
            return
    if not os.fsdecode(path).startswith(str(_disk)):
        return
    _counted += 1
    if _kill_at and _counted >= _kill_at:
        _strike_kill()


def file_events() -> int:
    """Changes of the checkpoints' files that this rank has made while saving."""
    return _counted


def saved() -> None:
    """Say that a save is over."""
    global _saving
    _saving = False


def at(point: str, step: int) -> None:
    """Do what is planned for this point, if anything is."""
    global _saving
    if point == "save":
        _saving = True
    fault = _fault
    if fault is not None and (fault.point, fault.step) == (point, step):
        _strike(fault)


def _write_down() -> None:
    """Say on disk that, and when, the fault has struck."""
    global _fault
    fault, _fault = _fault, None
    if fault is not None:
        with _note.open("w", encoding="utf-8") as file:
            json.dump({"kind": fault.kind, "rank": _rank, "time": time.time()}, file)
        _tell(event="fault")


def _strike_kill() -> None:
    global _kill_at
    _kill_at = 0
    _write_down()
    os.kill(os.getpid(), signal.SIGKILL)


def _strike(fault: Fault) -> None:
    global _kill_at, _counted
    if fault.kind == "SIGKILL" and fault.event:
        _counted, _kill_at = 0, fault.event
    elif fault.kind == "SIGKILL" and fault.delay:
        threading.Timer(fault.delay, _strike_kill).start()
    elif fault.kind == "SIGKILL":
        _strike_kill()
    elif fault.kind == "SIGSTOP":
        # this process cannot wake itself
        waking = f"sleep {fault.seconds}; kill -CONT {os.getpid()}"
        _write_down()
        subprocess.Popen(["sh", "-c", waking], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exception":
        _write_down()
        raise InjectedError(f"injected on rank {_rank}")
    elif fault.kind == "exit 0":
        _write_down()
        sys.exit(0)
    elif fault.kind == "link down":
        assert fault.link is not None
        namespace, port = fault.link
        command = f"ip -n {namespace} link set {port}"
        _write_down()
        subprocess.run(f"{command} down".split(), check=True)
        subprocess.Popen(
            ["sh", "-c", f"sleep {fault.seconds}; {command} up"], start_new_session=True
        )
    elif fault.kind == "full disk":
        _write_down()
        fill(_disk, fault.left)
    elif fault.kind == "read-only disk":
        _write_down()
        subprocess.run(["mount", "-o", "remount,ro", str(_disk)], check=True)
    elif fault.kind == "damaged file":
        # all ranks end; the file is damaged before the next start
        _write_down()
        raise InjectedError(f"injected on rank {_rank}")
    else:
        raise ValueError(fault.kind)


FILLER = "filler"


def fill(folder: Path, left: int) -> None:
    """Fill the folder's file system, but for so many bytes."""
    free = os.statvfs(folder)
    size = max(free.f_bavail * free.f_frsize - left, 0)
    with (folder / FILLER).open("wb") as file:
        file.write(b"\0" * size)


DAMAGES = ("cut short", "bit flipped", "zeros inside", "zeros at the end", "bytes added", "removed")


def damage(file: Path, how: str, where: float) -> None:
    """Damage a file in place: at, or from, this fraction of its length."""
    content = bytearray(file.read_bytes())
    place = min(int(where * len(content)), len(content) - 1)
    if how == "removed":
        file.unlink()
        return
    if how == "cut short":
        del content[place:]
    elif how == "bit flipped":
        content[place] ^= 1 << (place % 8)
    elif how == "zeros inside":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif how == "zeros at the end":
        content[place:] = bytes(len(content) - place)
    elif how == "bytes added":
        content += b"\xff" * 32
    else:
        raise ValueError(how)
    file.write_bytes(content)
