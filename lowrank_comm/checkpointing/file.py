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

`save` consolidates first (a collective that makes every worker's error the mean), then
rank 0 writes the file beside its final name and renames it, so that a killed job leaves
no half file. It returns a name for this save, to be kept with the rest of the
checkpoint; by it `load` recognises a file that another run has left in the same folder.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_comm.checkpointing.tag import Tag, check_format, tag_of
from lowrank_comm.checkpointing.tensors import _log, check_fits, restore, whole_tensors_of
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.reduction.reducer import Reducer

FILE_NAME = "lowrank_comm.safetensors"


def save(reducer: Reducer, folder: str | os.PathLike[str]) -> str:
    """Write the state of all workers as one file; a collective, between steps. When it
    returns, the file is there.

    Args:
        reducer: the run's; its error memory is consolidated.
        folder: the file is `<folder>/lowrank_comm.safetensors`, in a file system that
            all workers share.

    Returns:
        A name for this very save, also written into the file, the same on all workers.

    Raises:
        StateMismatchError: on every worker, if rank 0 could not write.
    """
    reducer.consolidate_error_memory()
    tensors = (
        whole_tensors_of(reducer)
        if reducer.workers.intra_node.size > 1 or reducer.workers.is_writer
        else {}
    )
    mine = {"name": uuid.uuid4().hex, "error": ""}
    if reducer.workers.is_writer:
        try:
            _write(reducer, tensors, Path(folder) / FILE_NAME, mine["name"])
        except (OSError, SafetensorError) as error:
            # the others wait to be told
            mine["error"] = str(error)
    of_rank_0 = _tell(reducer, mine)[0]
    if of_rank_0["error"]:
        raise StateMismatchError(
            f"the compressor's state could not be saved: {of_rank_0['error']}."
        )
    return of_rank_0["name"]


def _write(
    reducer: Reducer, tensors: Mapping[str, Mapping[str, Tensor]], path: Path, name: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{symbol}/{parameter}": tensor.clone().contiguous()
        for parameter, parts in tensors.items()
        for symbol, tensor in parts.items()
    }
    tag = json.dumps(asdict(tag_of(reducer)))
    # for a reader of the file
    settings = {key: value for key, value in reducer.describe().items() if key != "parameters"}
    unfinished = path.with_suffix(".unfinished")
    save_file(
        flat, unfinished, metadata={"tag": tag, "name": name, "settings": json.dumps(settings)}
    )
    unfinished.replace(path)


def _tell(reducer: Reducer, mine: dict[str, str]) -> list[dict[str, str]]:
    """Gather `mine` of every rank, in rank order; a collective."""
    return [json.loads(words) for words in reducer.workers.all_gather_text(json.dumps(mine))]


def load(reducer: Reducer, folder: str | os.PathLike[str], name: str | None = None) -> bool:
    """Read what `save` wrote; a collective, at any world size.

    Args:
        reducer: of the resumed run.
        folder: where the file is.
        name: what `save` returned, if the caller knows: any other file is refused.

    Returns:
        False, after a warning, where there is no file: all then starts from zero.

    Raises:
        StateMismatchError: on every worker, if the file does not fit this run, cannot
            be read, is another one than `name` says, or is there on some workers only.
    """
    path = Path(folder) / FILE_NAME
    found: tuple[Tag, dict[str, dict[str, Tensor]]] | None = None
    mine = {"found": "missing", "error": ""}
    try:
        if path.is_file():
            found = _read(path, name)
            check_fits(reducer, *found)
            mine["found"] = f"of step {found[0].step}"
    except StateMismatchError as error:
        mine["error"] = str(error)
    told = _tell(reducer, mine)
    for rank, one in enumerate(told):
        if one["error"]:
            raise StateMismatchError(
                one["error"] if len(told) == 1 else f"rank {rank}: {one['error']}"
            )
    if len({one["found"] for one in told}) > 1:
        seen = ", ".join(f"{one['found']} on rank {rank}" for rank, one in enumerate(told))
        raise StateMismatchError(f"{path} is {seen}; all workers must see the same files.")
    if found is None:
        memory = reducer.assignment.error_feedback.memory
        if name is not None:
            raise StateMismatchError(
                f"{path} is missing, and with it the {memory} that this checkpoint was saved with."
                " Copy it from the checkpoint's original folder, or load without the optimizer's"
                " state."
            )
        _log.warning(
            "%s is missing: the checkpoint was saved without compression; the %s starts from zero",
            path,
            memory,
        )
        reducer.reset()
        return False
    restore(reducer, *found)
    return True


def _read(path: Path, name: str | None) -> tuple[Tag, dict[str, dict[str, Tensor]]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                symbol, parameter = key.split("/", 1)
                tensors.setdefault(parameter, {})[symbol] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise StateMismatchError(
            f"{path} cannot be read ({error}); restore it, or resume from another checkpoint."
        ) from None
    if "tag" not in metadata:
        raise StateMismatchError(
            f"{path} was not written by lowrank_comm.checkpointing.file.save; remove it or"
            " restore it."
        )
    if name is not None and metadata.get("name") != name:
        raise StateMismatchError(
            f"{path} does not belong to this checkpoint: it was left there by another save. Restore"
            " the right one, or resume from another checkpoint."
        )
    entries = json.loads(metadata["tag"])
    check_format(entries.get("format"), str(path))
    return Tag(**entries), tensors
