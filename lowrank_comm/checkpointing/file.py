"""The compressor's state as one safetensors file beside a checkpoint, keyed by
parameter name.

What is saved:

- for each compressed parameter its error memory and its basis Q (or what else the
  compressor keeps, as EF21's y and v, which are saved as errors are: in the parameter's
  shape, whichever blocks of it a rank holds);
- the step, the seed, and for parameters that no worker had a gradient for in some steps
  their irregular history (`reduction.restarts`);
- the kind of error memory:

  "mean"  the mean of all workers' errors. Linear compressors use nothing else, so every
          worker of a run of any size may start from it, and the run goes on as if it
          had not been interrupted.
  "own"   one worker's error. It is right for the worker of the same rank in a group of
          the same size only, and refused elsewhere: loading rank 0's error on all
          ranks, as is common, would silently lose the errors of all others.

- a checksum over names, dtypes, shapes, bytes, and all the rest of the file.

`save` consolidates first (a collective that makes every worker's error the mean), then
rank 0 writes the file under another name, brings it to the disk and renames it, so that
a killed job leaves no half file. It returns a name for this save, to be kept with the
rest of the checkpoint. The name is part of the file's name: each save has a file of its
own, and `load` with the name finds the one that belongs to the rest, whichever others
lie beside it. A save removes those of its predecessors that nobody can need: the one
before it stays, since the caller may be killed before the rest of the new checkpoint is
there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_comm.checkpointing import durable
from lowrank_comm.checkpointing.tag import WAY_OUT, Tag, read_tag, readable, tag_of
from lowrank_comm.checkpointing.tensor_file import write_tensors
from lowrank_comm.checkpointing.tensors import _log, check_fits, restore
from lowrank_comm.checkpointing.whole_tensors import WholeTensor, whole_tensors
from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.reduction.reducer import Reducer

FILE_NAME = "lowrank_comm.safetensors"
"""The file of a version without checksums; one file a folder, whatever the save."""

# of files with a checksum
_FORMAT = "2"
_UNFINISHED = "lowrank_comm.unfinished"
_PREFIX, _SUFFIX = "lowrank_comm-", ".safetensors"


def _name_of(name: str) -> str:
    """Return the name of a save, which may be given as its file's name.

    Raises:
        StateMismatchError: no save has such a name.
    """
    if isinstance(name, str) and name.startswith(_PREFIX) and name.endswith(_SUFFIX):
        name = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
        raise StateMismatchError(
            f"name={name!r:.80} is not one that lowrank_comm.checkpoint.save returns; give load()"
            " what save() returned, or None for the newest."
        )
    return name


def file_of(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the file that the save of this name writes.

    Raises:
        StateMismatchError: no save has such a name.
    """
    return Path(folder) / f"{_PREFIX}{_name_of(name)}{_SUFFIX}"


def files_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return all files in a folder that `save` has written, earlier versions' too."""
    return sorted([*Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"), *_plain(folder)])


def _plain(folder: str | os.PathLike[str]) -> list[Path]:
    path = Path(folder) / FILE_NAME
    return [path] if path.is_file() else []


def _check_kinds(call: str, reducer: Any, folder: Any) -> None:
    if isinstance(reducer, Reducer) and isinstance(folder, (str, os.PathLike)):
        return
    given = f"{type(reducer).__name__}, {type(folder).__name__}"
    raise ConfigError(
        f"checkpoint.{call}({given}): give {call}(optimizer.reducer, folder), with the reducer of"
        f" a CompressedOptimizer first; {call}_all(folder, model, optimizer) takes everything."
    )


def save(reducer: Reducer, folder: str | os.PathLike[str]) -> str:
    """Write the state of all workers as one file; a collective, between steps. When it
    returns, the file is there, and on the disk.

    Args:
        reducer: the run's; its error memory is consolidated.
        folder: the file is `<folder>/lowrank_comm-<name>.safetensors`, in a file system
            that all workers share. The file of the save before stays until the next.

    Returns:
        The name of this very save, the same on all workers. Keep it with the rest of
        the checkpoint, and give it to `load`.

    Raises:
        StateMismatchError: on every worker, if rank 0 could not write, or the state of
            some worker is not finite.
        ConfigError: an argument is of another kind, as the optimizer itself.
    """
    _check_kinds("save", reducer, folder)
    reducer.consolidate_error_memory()
    tensors = whole_tensors(reducer)
    fetched = (one.fetch() for one in tensors)
    state, path = reducer.state, Path()
    mine = {"name": f"{reducer.step}-{uuid.uuid4().hex[:16]}", "lineage": "", "error": ""}
    if reducer.workers.is_writer:
        mine["lineage"] = state.lineage or uuid.uuid4().hex
        try:
            path = file_of(folder, mine["name"])
            _write(reducer, tensors, fetched, path, mine["name"], mine["lineage"])
        # the others wait to be told
        except Exception as error:
            mine["error"] = str(error) or type(error).__name__
    if reducer.workers.intra_node.size > 1:
        # all take part in fetching what is left, also when nothing is written
        collections.deque(fetched, maxlen=0)
    of_rank_0 = _tell(reducer, mine)[0]
    if of_rank_0["error"]:
        raise StateMismatchError(
            f"the compressor's state could not be saved: {of_rank_0['error']}."
        )
    state.lineage = of_rank_0["lineage"]
    if reducer.workers.is_writer:
        _remove_predecessors(reducer, path)
    return of_rank_0["name"]


def _write(
    reducer: Reducer,
    tensors: Sequence[WholeTensor],
    fetched: Iterable[Tensor],
    path: Path,
    name: str,
    lineage: str,
) -> None:
    durable.make_folder(path.parent)
    layout = {one.key: (one.dtype, one.shape) for one in tensors}
    # for a reader of the file
    settings = {key: value for key, value in reducer.describe().items() if key != "parameters"}
    metadata = {
        "format": _FORMAT,
        "tag": json.dumps(asdict(tag_of(reducer))),
        "name": name,
        "lineage": lineage,
        "written": str(time.time_ns()),
        "base_steps": str(reducer.base_steps()),
        "settings": json.dumps(settings),
    }
    unfinished = path.with_name(_UNFINISHED)
    with durable.removed_on_failure(unfinished):
        write_tensors(unfinished, layout, fetched, metadata)
        durable.put_in_place(unfinished, path)


def _remove_predecessors(reducer: Reducer, path: Path) -> None:
    """Remove the files of this run's earlier saves, but the last one: what the caller
    keeps may still name that.
    """
    state, path = reducer.state, path.resolve()
    before, state.files[path.parent] = state.files.get(path.parent), path
    if before is None:
        return
    for other in map(Path.resolve, files_in(path.parent)):
        if other not in (before, path) and _metadata(other).get("lineage") == state.lineage:
            with contextlib.suppress(OSError):
                other.unlink()


def _tell(reducer: Reducer, mine: dict[str, str]) -> list[dict[str, str]]:
    """Gather `mine` of every rank, in rank order; a collective."""
    return [json.loads(words) for words in reducer.workers.all_gather_text(json.dumps(mine))]


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        path: of the file.
        tag: what the state is.
        tensors: parameter name -> {"error": ..., "Q": ...}.
        metadata: all text of the file.
    """

    path: Path
    tag: Tag
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]


def load(reducer: Reducer, folder: str | os.PathLike[str], name: str | None = None) -> bool:
    """Read what `save` wrote; a collective, at any world size.

    Args:
        reducer: of the resumed run.
        folder: where the file is.
        name: what `save` returned for this checkpoint, or its file's name. None takes
            the newest complete file, and says which: it may be of another save than the
            rest of what the caller loads. Where a base optimizer that counts its steps
            (Adam; not SGD) has been loaded before, one of as many steps is taken.

    Returns:
        False, after a warning, where there is no file: all then starts from zero.

    Raises:
        StateMismatchError: on every worker, if the file does not fit this run, is
            damaged, belongs to another save than `name` says, or is there on some
            workers only; then nothing is changed.
        ConfigError: an argument is of another kind, as the optimizer itself.
    """
    _check_kinds("load", reducer, folder)
    found: Saved | None = None
    say_loaded: Callable[[], None] | None = None
    seen, problem = "missing", None
    try:
        if name is None:
            found, say_loaded = _newest(folder, reducer)
        else:
            found = _named(folder, _name_of(name))
        if found is not None:
            check_fits(reducer, found.tag, found.tensors)
            seen = f"of step {found.tag.step} ({found.path.name})"
    # the others wait to be told
    except Exception as error:
        problem = readable(error, str(folder))
    reducer.workers.refuse_together(problem, f"the compressor's file in {folder}", seen)
    if found is None:
        memory = reducer.assignment.error_feedback.memory
        if name is not None:
            raise StateMismatchError(
                f"{file_of(folder, name)} is missing, and with it the {memory} that this checkpoint"
                " was saved with. Copy it from the checkpoint's original folder, or load without"
                " the optimizer's state."
            )
        if Path(folder).is_dir():
            _log.warning(
                "%s has no file of lowrank_comm: the checkpoint was saved without compression; the"
                " %s starts from zero",
                folder,
                memory,
            )
        else:
            _log.warning(
                "%s is no folder: nothing is loaded, and the %s starts from zero", folder, memory
            )
        reducer.reset()
        return False
    restore(reducer, found.tag, found.tensors)
    reducer.state.lineage = found.metadata.get("lineage", "")
    reducer.state.files[found.path.parent.resolve()] = found.path.resolve()
    if say_loaded is not None:
        say_loaded()
    return True


def _named(folder: str | os.PathLike[str], name: str) -> Saved | None:
    """Return what the file of a save holds; None where there is no file at all."""
    path = file_of(folder, name)
    # that of an earlier version has its name inside only
    for file in (path, *_plain(folder)):
        if file.is_file() and (file == path or _metadata(file).get("name") == name):
            found = read(file)
            if found.metadata.get("name") == name:
                return found
    others = files_in(folder)
    if others:
        raise StateMismatchError(
            f"{others[0]} does not belong to this checkpoint: it was left there by another save,"
            f" and {path.name} is missing. Restore the right one, or resume from another"
            " checkpoint."
        )
    return None


def _newest(
    folder: str | os.PathLike[str], reducer: Reducer
) -> tuple[Saved | None, Callable[[], None] | None]:
    """Return what the newest complete file of a folder holds, of as many steps of the
    base as this one has made; the newest of all where there is none of these; None
    where there is no file. And what logs that it is loaded, on the rank that logs.
    """
    now, says = reducer.base_steps(), reducer.workers.is_writer
    files = sorted(files_in(folder), key=_written, reverse=True)
    if now is not None:
        # a stable sort: the newest come first among each
        files.sort(key=lambda file: _metadata(file).get("base_steps") != str(now))
    damaged: list[str] = []
    for file in files:
        try:
            found = read(file)
        except StateMismatchError as error:
            damaged.append(str(error))
            continue
        for text in damaged if says else ():
            _log.warning("passed over: %s", text)
        several = len(files) > 1 or bool(damaged)
        say = functools.partial(_say_loaded, found, folder, now, several)
        return found, say if says else None
    if damaged:
        raise StateMismatchError(damaged[0])
    return None, None


def _say_loaded(
    found: Saved, folder: str | os.PathLike[str], now: int | None, several: bool
) -> None:
    """Log which file was taken without a name, and where it may be the wrong one.

    Args:
        found: what was loaded.
        folder: that was given.
        now: steps of the base here; None if it counts none.
        several: whether others were there, complete or damaged.
    """
    then = found.metadata.get("base_steps", "None")
    if now is not None and then not in ("None", str(now)):
        _log.warning(
            "%s is of another save than what the base optimizer has loaded: %s steps there, %d"
            " here; give load() the name that save() returned with the rest",
            found.path,
            then,
            now,
        )
    elif several:
        which = "" if then == "None" or now is None else f" of {now} steps of the base optimizer"
        _log.warning(
            "%s of step %d is the newest complete file%s in %s, and is loaded; give load() the name"
            " that save() returned, to be sure that it belongs to the rest",
            found.path.name,
            found.tag.step,
            which,
            folder,
        )
    else:
        _log.info("%s of step %d is loaded", found.path, found.tag.step)


def _metadata(path: Path) -> dict[str, str]:
    """Return the text in a file; {} where it cannot be read."""
    with contextlib.suppress(SafetensorError, OSError, ValueError):  # noqa: SIM117
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    return {}


def _written(path: Path) -> int:
    """Return when a file was written, in nanoseconds: copying it changes nothing."""
    text = _metadata(path).get("written", "")
    return int(text) if text.isdecimal() and len(text) < 20 else path.stat().st_mtime_ns


def read(path: Path) -> Saved:
    """Read a file, and check that it is as it was written.

    Raises:
        StateMismatchError: it is not, or is no file of `save`.
    """
    flat: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                flat[key] = file.get_tensor(key)
    # a damaged header leads to many kinds of them
    except Exception as error:
        raise StateMismatchError(f"{path} cannot be read ({error}); {WAY_OUT}") from None
    if "tag" not in metadata:
        raise StateMismatchError(
            f"{path} was not written by lowrank_comm.checkpoint.save; remove it or restore it."
        )
    layout = metadata.get("format", _FORMAT)
    if layout.isdecimal() and layout != _FORMAT:
        raise StateMismatchError(
            f"{path} has format {layout}, this version reads {_FORMAT}; update lowrank_comm."
        )
    tag = read_tag(_entries(metadata["tag"]), str(path))
    if path.name == FILE_NAME and "format" not in metadata:
        _log.warning("%s was written by an earlier version, without a checksum", path)
    elif layout != _FORMAT or metadata.get("checksum") != durable.checksum(flat, metadata):
        raise StateMismatchError(
            f"{path} is damaged: its checksum is not that of its content; {WAY_OUT}"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        symbol, slash, parameter = key.partition("/")
        if not slash:
            raise StateMismatchError(f"{path} is damaged: it has a tensor {key!r}; {WAY_OUT}")
        tensors.setdefault(parameter, {})[symbol] = tensor
    return Saved(path, tag, tensors, metadata)


def _entries(text: str) -> object:
    """Return what a tag's JSON holds; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
