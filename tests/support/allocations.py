"""A meter of allocations: how many bytes of tensors are held at each moment of a block.

It reads what torch's profiler notes of the allocator of the CPU: every block that is
handed out, by whatever asks for it (an operation, what an operation needs in between, a
hook in a backward pass, a file that is read), and its return. What was there before the
meter began is not counted, nor is its return. Left out are files that are mapped, and
what a backend of torch.distributed asks for inside of a collective: gloo copies what it
gathers and scatters, NCCL does not.

    with metered() as meter:
        step()                      # what it replaces was made inside, too
        with meter.part("step"):
            step()
    meter.peak("step")

A part may go on in several pieces: what happens between them, of others, is left out.
Within a part that has gone on since something was made, `total` of another one is all
that is held then, and not only what came in it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import profile, record_function

_PART = "part: "
_AGAIN = "again: "
_OURS = re.compile(r"(?:lowrank_comm|integrations)/.*")


class Meter:
    """What was held in the parts of a `metered` block; to be asked after its end."""

    def __init__(self) -> None:
        # of every part of a name, in the order of their ends
        self._peaks: dict[str, list[int]] = defaultdict(list)
        self._left: dict[str, list[int]] = defaultdict(list)
        # of every part, in the same order: name of one around it -> bytes made in that
        self._around: dict[str, list[dict[str, int]]] = defaultdict(list)
        self._held: dict[str, list[Counter[str]]] = defaultdict(list)

    @contextlib.contextmanager
    def part(self, name: str, again: bool = False) -> Iterator[None]:
        """Count what happens inside as a part of this name; `again`: as a further piece
        of the last one of this name.
        """
        with record_function((_AGAIN if again else _PART) + name):
            yield

    def wrap(self, owner: Any, method: str, name: str, again: bool = False) -> None:
        """Let every call of a method be a part."""
        original: Callable[..., Any] = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, again):
                return original(*args, **kwargs)

        setattr(owner, method, call)

    def peak(self, name: str) -> int:
        """Bytes that were held at most in a part beyond those at its beginning: the
        least of all parts of this name, since a block that a thread of its own gives
        back is not seen to come back before another takes its place.
        """
        return min(self._peaks[name])

    def total(self, name: str, around: str) -> int:
        """Bytes that were held at most in a part, of all that was made in the part
        around it, before and in this one; see `peak`.
        """
        return min(most[around] for most in self._around[name])

    def left(self, name: str) -> int:
        """Bytes that were held at the end of the last part of this name beyond those
        at its beginning.
        """
        return self._left[name][-1]

    def at_peak(self, name: str) -> str:
        """What was held at the peak of the last part of this name and was made in it,
        the largest first: bytes, and where they were asked for.
        """
        lines = [f"{size:12d}  {place}" for place, size in self._held[name][-1].most_common(12)]
        return "\n".join(lines)

    def _read(self, roots: list[Any]) -> None:
        events: list[tuple[int, int, Any]] = []
        waiting = list(roots)
        while waiting:
            event = waiting.pop()
            waiting += event.children
            if event.tag == _EventType.Allocation:
                events.append((event.start_time_ns, 1, event))
            elif _name(event).startswith((_PART, _AGAIN)):
                events.append((event.start_time_ns, 0, event))
                events.append((event.end_time_ns, 2, event))
        events.sort(key=lambda one: one[:2])
        threads = {event.start_tid for _, kind, event in events if kind == 0}
        blocks: dict[int, tuple[int, Any]] = {}
        held = 0
        parts: dict[str, _Part] = {}
        for _, kind, event in events:
            if kind == 1:
                address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
                before = blocks.pop(address, (0, None))[0]
                held -= before
                for part in parts.values():
                    part.lost(address)
                if size > 0 and before:
                    # given back at some time by a thread that is not watched
                    for part in parts.values():
                        part.had_gone(address, before)
                if size > 0 and not (_is_mapped(event) or _is_a_backends(event, threads)):
                    blocks[address] = (size, event)
                    held += size
                    for part in parts.values():
                        part.got(address, size)
                for part in parts.values():
                    part.look(held, blocks, parts)
                continue
            name = event.name.removeprefix(_PART).removeprefix(_AGAIN)
            if kind == 0:
                if event.name.startswith(_PART):
                    self._end(name, parts.pop(name, None))
                    parts[name] = _Part(set(blocks))
                if name in parts:
                    parts[name].enter(held)
            elif name in parts:
                parts[name].leave(held)
        for name, part in parts.items():
            self._end(name, part)

    def _end(self, name: str, part: _Part | None) -> None:
        if part is not None:
            self._peaks[name].append(part.peak)
            self._left[name].append(part.inside)
            self._held[name].append(part.places())
            self._around[name].append(part.around)


class _Part:
    """A part while the events are read: what is held in it beyond its beginning, now
    and at most.
    """

    def __init__(self, before: set[int]) -> None:
        self.inside = self.peak = 0
        self._before, self._at_peak = before, dict[int, tuple[int, Any]]()
        # blocks that were made in it, and their bytes
        self._own, self.own = dict[int, int](), 0
        # name of a part -> most bytes made in that and held while this one went on
        self.around: dict[str, int] = {}
        # what is held in all when nothing of this part is; None outside of its pieces
        self._base: int | None = None

    def enter(self, held: int) -> None:
        self._base = held - self.inside

    def leave(self, held: int) -> None:
        if self._base is not None:
            self.inside = held - self._base
        self._base = None

    def got(self, address: int, size: int) -> None:
        if self._base is not None:
            self._own[address] = size
            self.own += size

    def lost(self, address: int) -> None:
        """Note that a block is given back, between two pieces too."""
        self.own -= self._own.pop(address, 0)

    def look(self, held: int, blocks: dict[int, tuple[int, Any]], parts: dict[str, _Part]) -> None:
        if self._base is None:
            return
        for name, part in parts.items():
            self.around[name] = max(self.around.get(name, 0), part.own)
        if held - self._base > self.peak:
            self.peak, self._at_peak = held - self._base, dict(blocks)

    def had_gone(self, address: int, size: int) -> None:
        """Take a block for gone before the part began, if it was there before."""
        if address in self._before and self._base is not None:
            self._base -= size

    def places(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for address, (size, event) in self._at_peak.items():
            if address not in self._before:
                found[_place(event)] += size
        return found


def _name(event: Any) -> str:
    try:
        return str(event.name)
    except UnicodeDecodeError:
        # of some function in C
        return ""


def _callers(event: Any) -> Iterator[str]:
    """The operations, and functions if the meter has looked at the stack, in which a
    block was asked for, the innermost first.
    """
    above = event.parent
    while above is not None:
        yield _name(above)
        above = above.parent


def _is_mapped(event: Any) -> bool:
    return bool(event.extra_fields.total_reserved)


def _is_a_backends(event: Any, threads: set[int]) -> bool:
    # gloo does some of it in threads of its own; a backward pass on a CPU has none
    return event.start_tid not in threads or any(
        name.startswith("c10d::") for name in _callers(event)
    )


def _place(event: Any) -> str:
    """Where a block was asked for: the operation, and the innermost functions of
    ours.
    """
    names = list(_callers(event))
    operation = next((name for name in names if name.startswith("aten::")), "no operation")
    ours = [found.group() for name in names if (found := _OURS.search(name))]
    return " < ".join([operation, *ours[:3]])


@contextlib.contextmanager
def metered(places: bool = False) -> Iterator[Meter]:
    """Note all allocations inside.

    Args:
        places: look at the stack as well, for `at_peak`; slow.
    """
    meter = Meter()
    with profile(use_cpu=True, profile_memory=True, with_stack=places) as profiler:
        yield meter
    meter._read(profiler.kineto_results.experimental_event_tree())
