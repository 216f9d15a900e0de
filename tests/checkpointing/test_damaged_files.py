"""A corpus of damaged files: each is refused by an error of the library with nothing
touched, or gives the right state; never a crash, a hang, or memory without bound.

A few hundred by default, seeded; DAMAGED_FILES=10000 for the campaign.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_comm import ErrorFeedback, GreedyLore, LowRankCommError, PowerSGDPlus, checkpoint
from tests.checkpointing.test_old_checkpoints import FOLDER as OLD
from tests.checkpointing.test_old_checkpoints import writer
from tests.support.checkpointed import Trainer

CASES = int(os.environ.get("DAMAGED_FILES", "300"))
UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)
MEGABYTES = 16
"""By which one load may raise the peak of the process; the files are of some kB."""

RUNS: dict[str, Callable[[], Trainer]] = {
    "powersgd_plus": lambda: Trainer(PowerSGDPlus(2, restart_every=4)),
    "greedylore": lambda: Trainer(GreedyLore(2, restart_every=4)),
    "ef21": lambda: Trainer(PowerSGDPlus(2, 4), error_feedback=ErrorFeedback(form="ef21_sgdm")),
}


@functools.cache
def good(run: str) -> tuple[str, bytes]:
    """Name and content of an undamaged file, of step 5; a restart has been deferred."""
    trainer = RUNS[run]()
    trainer.train(0, 4, 0)
    for p in trainer.model[0].parameters():
        p.grad = None
    trainer.optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(trainer.optimizer.reducer, folder)
        (path,) = Path(folder).iterdir()
        return path.name, path.read_bytes()


@functools.cache
def other(run: str) -> bytes:
    """Of the same run, one step on."""
    trainer = RUNS[run]()
    trainer.train(0, 5, 0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(trainer.optimizer.reducer, folder)
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


# --- damage: a function from the bytes of a file to others ---


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, content: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


place = st.floats(0, 1, exclude_max=True)
LENGTHS = [0, 1, 7, 100, 2**31, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *("", "{", "null", "[]", "7", "\x00", "{}", '{"format": 1}', '{"format": 99}'),
    *('{"step": "7"}', '{"step": NaN}', "9" * 400, "[" * 2000, '{"a": ' * 900),
]
STEPS: list[Any] = ["7", None, -3, 1.5, True, 2**70, float("nan"), [5], {"a": 1}, 0, 6]


@st.composite
def flipped(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    where, bit = draw(place), draw(st.integers(0, 7))

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(where * len(data))] ^= 1 << bit
        return bytes(changed)

    return damage


@st.composite
def zeroed(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    where, size = draw(place), draw(st.integers(1, 600))

    def damage(data: bytes) -> bytes:
        at = int(where * len(data))
        return (data[:at] + bytes(size) + data[at + size :])[: len(data)]

    return damage


@st.composite
def cut(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    where, more = draw(place), draw(st.binary(max_size=20))
    return lambda data: data[: int(where * len(data))] + more


@st.composite
def grown(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    where, more = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.binary(min_size=1, max_size=99))

    def damage(data: bytes) -> bytes:
        at = int(where * len(data))
        return data[:at] + more + data[at:]

    return damage


@st.composite
def of_another_length(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    length = draw(st.sampled_from(LENGTHS))
    return lambda data: struct.pack("<Q", length) + data[8:]


@st.composite
def with_another_entry(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A tensor's dtype, shape or place, its name, or that it is there."""
    which = draw(st.integers(0, 99))
    what = draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "drop", "swap", "twice"]))
    dtype = draw(st.sampled_from(["F32", "I64", "U64", "BF16", "BOOL", "F8_E5M2", "x", 3, None]))
    shape = draw(st.sampled_from([[], [1], [9, 12], [108], [2**62], [-1], [0], ["a"], "a", [1.5]]))
    numbers = draw(st.tuples(st.integers(-9, 2**64), st.integers(-9, 2**64)))
    name = draw(
        st.sampled_from(["error", "", "/", "error/", "/0.weight", "Q/1.weight", "Z/0.weight"])
    )

    def damage(data: bytes) -> bytes:
        header, content = parts(data)
        keys = sorted(header.keys() - {"__metadata__"})
        key, next_key = keys[which % len(keys)], keys[(which + 1) % len(keys)]
        if what == "drop":
            del header[key]
        elif what == "rename":
            header[name] = header.pop(key)
        elif what == "swap":
            header[key], header[next_key] = header[next_key], header[key]
        elif what == "twice":
            header[f"{key}.copy"] = header[key]
        else:
            new = {"dtype": dtype, "shape": shape, "offsets": list(numbers)}[what]
            header[key]["data_offsets" if what == "offsets" else what] = new
        return put_together(header, content)

    return damage


@st.composite
def with_other_text(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What is beside the tensors: damaged, missing, or of another type."""
    which, what = (
        draw(st.integers(0, 99)),
        draw(st.sampled_from(["value", "drop", "rename", "all"])),
    )
    value = draw(st.sampled_from([*VALUES, 3, None, [], {}]))

    def damage(data: bytes) -> bytes:
        header, content = parts(data)
        text = header["__metadata__"]
        key = sorted(text)[which % len(text)]
        if what == "drop":
            del text[key]
        elif what == "rename":
            text[f"{key}_"] = text.pop(key)
        elif what == "all":
            header["__metadata__"] = value
        else:
            text[key] = value
        return put_together(header, content)

    return damage


@st.composite
def with_another_tag(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    keys = ["kind", "rank", "world", "step", "seed", "format", "unsteady", "new"]
    key, value = draw(st.sampled_from(keys)), draw(st.sampled_from(STEPS))
    drops = draw(st.booleans())

    def damage(data: bytes) -> bytes:
        header, content = parts(data)
        tag = json.loads(header["__metadata__"]["tag"])
        if drops:
            tag.pop(key, None)
        else:
            tag[key] = value
        header["__metadata__"]["tag"] = json.dumps(tag)
        return put_together(header, content)

    return damage


@st.composite
def without_a_header(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    text = draw(st.sampled_from([b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b'{"a": 1}', b"{}"]))
    return lambda data: put_together(text, parts(data)[1])


damages = st.one_of(
    flipped(), zeroed(), cut(), grown(), of_another_length(), with_another_entry(),
    with_other_text(), with_another_tag(), without_a_header(), st.just(lambda data: data),
)  # fmt: skip


# --- what is held ---


def everything(trainer: Trainer) -> dict[str, Any]:
    reducer = trainer.optimizer.reducer
    kept = {("error", name): e for name, e in reducer.state.error_memory().items()}
    for name, bases in reducer.state.bases().items():
        kept |= {(symbol, name): basis for symbol, basis in bases.items()}
    numbers = {"step": reducer.step, "restarts": reducer.state.restarts.irregular()}
    return {key: tensor.clone() for key, tensor in kept.items()} | numbers


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
        for key, value in one.items()
    )


@functools.cache
def loaded_from(run: str, data: bytes) -> dict[str, Any]:
    trainer = RUNS[run]()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / good(run)[0]).write_bytes(data)
        assert checkpoint.load(trainer.optimizer.reducer, folder)
    return everything(trainer)


@functools.cache
def started(run: str) -> Trainer:
    """A run that is given all the files, one after the other."""
    trainer = RUNS[run]()
    trainer.train(20, 2, 0)
    return trainer


def corpus(test: Callable[..., None]) -> Callable[..., None]:
    seeded = settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return seeded(given(damage=damages, more=st.none() | damages, named=st.booleans())(test))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.timeout(60 + CASES)
@pytest.mark.parametrize("run", RUNS)
def test_a_damaged_file_is_refused_or_gives_the_right_state(run: str) -> None:
    trainer, (file, data) = started(run), good(run)
    right, seen = loaded_from(run, data), {"refused": 0, "right": 0}

    @corpus
    def check(damage: Any, more: Any, named: bool) -> None:
        damaged = damage(data)
        if more is not None:
            # damage upon damage, where the header can still be read
            with contextlib.suppress(*UNREADABLE):
                damaged = more(damaged)
        name = file.removeprefix("lowrank_comm-").removesuffix(".safetensors") if named else None
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / file).write_bytes(damaged)
            before, room = everything(trainer), peak()
            try:
                assert checkpoint.load(trainer.optimizer.reducer, folder, name)
            except LowRankCommError as error:
                assert peak() - room < MEGABYTES
                assert file in str(error) or "is damaged" in str(error)
                assert same(everything(trainer), before)
                seen["refused"] += 1
                return
        assert same(everything(trainer), right)
        seen["right"] += 1
        # not the state that is right anyway, next time
        trainer.optimizer.reducer.reset()

    check()
    assert seen["refused"] > 0.5 * CASES
    assert seen["right"] > 0


@pytest.mark.timeout(60 + CASES)
def test_a_damaged_file_without_a_checksum_never_crashes() -> None:
    """Of an earlier version: a flipped bit cannot be seen there, so that only what is
    refused is known to be touched by nothing.
    """
    data = (OLD / "powersgd_plus" / "lowrank_comm.safetensors").read_bytes()
    written = writer()
    reducer = written.OPTIMIZERS["powersgd_plus"](written.model()).reducer
    folder = Path(tempfile.mkdtemp())
    seen = {"refused": 0, "loaded": 0}

    @corpus
    def check(damage: Any, more: Any, named: bool) -> None:
        damaged = damage(data)
        (folder / "lowrank_comm.safetensors").write_bytes(damaged)
        before = [e.clone() for e in reducer.state.error_memory().values()], reducer.step
        try:
            assert checkpoint.load(reducer, folder)
            assert not reducer.state.not_finite()
            seen["loaded"] += 1
        except LowRankCommError:
            after = reducer.state.error_memory().values()
            assert all(map(torch.equal, before[0], after))
            assert reducer.step == before[1]
            seen["refused"] += 1

    check()
    shutil.rmtree(folder)
    assert min(seen.values()) > 0.1 * CASES


@pytest.mark.parametrize("run", RUNS)
def test_control_another_save_is_another_state(run: str) -> None:
    assert not same(loaded_from(run, good(run)[1]), loaded_from(run, other(run)))
