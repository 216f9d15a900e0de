"""The compressor's state on disk and in state dicts, keyed by parameter name; safetensors, no pickle.

What is saved: for each compressed parameter its error and its basis Q; the step; of parameters for which nobody had a
gradient in some steps, what they have behind them (`restart`); the seed; and what kind of error it is (or of EF21's y and
v, which are saved as errors are: in the parameter's shape, whatever blocks of it a rank holds):

    "mean"  the mean of all workers' errors. Linear compressors use nothing else, so every worker of a run of any size
            may start from it, and the run goes on as if it had not been interrupted.
    "own"   one worker's error. It is right for the worker of the same rank in a group of the same size only: loading
            rank 0's error everywhere, as is common, loses the errors of all others without a word. It is refused.

`save` consolidates first (a collective that makes every worker's error the mean), then rank 0 writes the file beside
its final name and renames it, so that a killed job leaves no half file. It returns a name for this save, by which whoever
keeps it with the rest of the checkpoint recognises a file that another run has left in the same folder.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .batches import Slot
from .errors import StateMismatchError
from .policy import Treatment
from .reducer import Reducer

FILE_NAME = "lowrank_comm.safetensors"
FORMAT = 1
NOBODY = -1  # as a rank: a state of one rank that no rank may take for its own
_OF = "_of_blocks_"  # in a symbol: bases of that many blocks of rows, each of which is a matrix of its own
_log = logging.getLogger("lowrank_comm")


def check_format(found: object, what: str) -> None:
    """StateMismatchError if what was saved has another layout than this version reads."""
    if found != FORMAT:
        raise StateMismatchError(f"{what} has format {found}, this version reads {FORMAT}; update lowrank_comm.")


@dataclass(frozen=True)
class Tag:
    """What a saved state is: see the module's text. `step` is t of the next pass; `unsteady`, parameter name -> (restarts,
    age, owed), see `restart.Restarts`: absent in what older versions saved, and then nothing is owed."""

    kind: str
    rank: int
    world: int
    step: int
    seed: int
    format: int = FORMAT
    unsteady: dict[str, tuple[int, int, bool]] = field(default_factory=dict)

    @property
    def whose(self) -> str:
        """For messages."""
        return "some rank's" if self.rank == NOBODY else f"rank {self.rank}'s"

    def check_usable_by(self, reducer: Reducer) -> None:
        """Refuse another worker's own errors.

        Raises:
            StateMismatchError: kind "own" from another rank or world size, or an unknown format.
        """
        check_format(self.format, "the saved state")
        here, memory = reducer.here, reducer.schemes.error_feedback.memory
        if self.kind == "own" and (self.rank, self.world) != here:
            raise StateMismatchError(
                f"the saved {memory} is {self.whose} own of {self.world} ranks; this is rank {here[0]} of "
                f"{here[1]}. Loading it here would lose that of the other workers. Call "
                "optimizer.consolidate_error_memory() on all ranks before state_dict(), then it fits any worker."
            )


def tag_of(reducer: Reducer) -> Tag:
    """Tag of the reducer's present state."""
    rank, world = reducer.worker
    shared = reducer.consolidated or world == 1 or reducer.step == 0  # before the first step all errors are zero
    kind = "mean" if shared or not reducer.keeps_private_state else "own"
    return Tag(kind, rank, world, reducer.step, reducer.seed, unsteady=reducer.restarts.unsteady())


def tensors_of(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> {"error": ..., "Q": ...}; live tensors, no copies. No "error" where none is kept."""
    memory = reducer.error_memory()
    return {name: ({"error": memory[name]} if name in memory else {}) | bases for name, bases in reducer.bases().items()}


def whole_tensors_of(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    """The same of whole parameters, on the CPU; where ranks of a node hold blocks of them, a collective of these ranks.

    Where each block has a basis of its own, they are kept together, (F, n, r), by a symbol that tells F.
    """
    shards = reducer.shards
    if shards.size == 1:
        return {name: {k: t.detach().cpu() for k, t in parts.items()} for name, parts in tensors_of(reducer).items()}
    result: dict[str, dict[str, Tensor]] = {}
    for slot, largest, shaped in reducer.blocks():
        entry = {
            symbol: shards.whole(tensor.to(slot.device), slot.whole or slot.shape, slot.dim, "checkpoint")
            for symbol, tensor in shaped.items()
        }
        bases = block_bases(reducer, slot, largest)
        if not shards.whole_matrices:
            gathered = {symbol: shards.gather(basis.reshape(-1), "checkpoint") for symbol, basis in bases.items()}
            stacked = {symbol: gathered[symbol].view(-1, *bases[symbol].shape) for symbol in bases}
            bases = _by_blocks(stacked, reducer.schemes.of(largest)[0].once)
        result[slot.name] = {k: t.detach().cpu() for k, t in (entry | bases).items()}
    return result


def untouched(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    """`whole_tensors_of` before the first step, without communication: zero errors, and bases that nobody has used."""
    shards = reducer.shards
    result: dict[str, dict[str, Tensor]] = {}
    for slot, largest, shaped in reducer.blocks():
        bases = block_bases(reducer, slot, largest)
        if not shards.whole_matrices:  # copies, since DCP loads in place
            stacked = {symbol: torch.stack([basis] * shards.size) for symbol, basis in bases.items()}
            bases = _by_blocks(stacked, reducer.schemes.of(largest)[0].once)
        zeros = {symbol: torch.zeros(slot.whole or slot.shape, dtype=slot.compute_dtype) for symbol in shaped}
        result[slot.name] = zeros | bases
    return result


def _by_blocks(stacked: Mapping[str, Tensor], once: Sequence[str]) -> dict[str, Tensor]:
    """Of the bases of all blocks, (F, ...): by a symbol that tells F, and of the first block what is equal for all."""
    return {k if k in once else of_blocks(k, len(t)): t[0] if k in once else t for k, t in stacked.items()}


def of_blocks(symbol: str, count: int) -> str:
    """The symbol under which the bases of `count` blocks of a parameter are kept, each a matrix of its own."""
    return f"{symbol}{_OF}{count}"


def block_bases(reducer: Reducer, slot: Slot, largest: Treatment) -> dict[str, Tensor]:
    """symbol -> this rank's basis (n, r) in the room of that of the largest block; zero where it has no column. Of all that
    is not in the shape of the block."""
    initial, shaped = reducer.schemes.initial_state(slot, largest), reducer.schemes.of(largest)[0].model_shaped
    rooms = {symbol: torch.zeros_like(tensor) for symbol, tensor in initial.items() if symbol not in shaped}
    held = reducer.bases_of(slot.name)
    for symbol in rooms.keys() & held.keys():
        rooms[symbol][tuple(slice(0, size) for size in held[symbol].shape)] = held[symbol]
    return rooms


def _in_memory(reducer: Reducer, name: str) -> tuple[str, ...]:
    """Symbols of what is kept of one parameter's earlier gradients: right for any rank and any blocks, unlike a basis."""
    scheme = reducer.scheme_of(name)
    return ("error", *((*scheme.model_shaped, *scheme.once) if scheme else ()))


def _cut_to(reducer: Reducer, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What this rank holds of saved tensors: its block of a whole error or the like, its basis of those of all blocks."""
    slots = {slot.name: slot for slot in reducer.slots}
    own_basis = f"{_OF}{reducer.shards.size}"
    result: dict[str, dict[str, Tensor]] = {}
    for name, saved in tensors.items():
        slot = slots.get(name)
        parts: dict[str, Tensor] = {}
        memory = _in_memory(reducer, name)
        for symbol, given in saved.items():
            tensor = given.to_local() if isinstance(given, DTensor) else given
            if symbol in memory and slot is not None and slot.whole is not None and tensor.shape == slot.whole:
                tensor = reducer.shards.own(tensor, slot.dim)
            elif symbol.endswith(own_basis) and reducer.shards.size > 1:
                symbol, tensor = symbol.removesuffix(own_basis), tensor[reducer.shards.rank] if tensor.dim() == 3 else tensor
                kept = reducer.bases_of(name).get(symbol)
                tensor = tensor[tuple(slice(0, size) for size in kept.shape)] if kept is not None else tensor
            parts[symbol] = tensor
        if slot is None or slot.numel > 0 or reducer.bases_of(name):
            result[name] = parts
    return result


def check_fits(reducer: Reducer, tag: Tag, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a saved state that does not fit, before anything is changed.

    Args:
        reducer: of the resumed run, at any world size.
        tag: of the saved state.
        tensors: parameter name -> {"error": ..., "Q": ...}.

    Raises:
        StateMismatchError: the state belongs to another worker, or error memory would be lost: a saved parameter is
            not compressed now, or has another shape.
    """
    tag.check_usable_by(reducer)
    known = tensors_of(reducer)
    for name, saved in _cut_to(reducer, tensors).items():
        here = known.get(name, {})
        if "error" in saved and "error" not in here and float(torch.linalg.vector_norm(saved["error"].float())) != 0.0:
            raise StateMismatchError(
                f"{name!r} has a saved error memory but is not a compressed parameter of this run with one; it would be "
                "lost. Resume with the same model, names, rank, min_compression_rate, rules and error_feedback; to give it "
                "up on purpose, take the compressor's state out of the checkpoint (in a state dict the key 'lowrank_comm' "
                "and the entries 'lowrank_comm_...')."
            )
        for symbol in saved.keys() & here.keys() & set(_in_memory(reducer, name)):
            if saved[symbol].numel() != here[symbol].numel():
                what = "error memory" if symbol == "error" else symbol
                raise StateMismatchError(
                    f"{name!r}: the saved {what} is {tuple(saved[symbol].shape)}, the parameter "
                    f"{tuple(here[symbol].shape)}; resume with the same model."
                )


def restore(reducer: Reducer, tag: Tag, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a saved state to a reducer; what it held is replaced, and what is not in the saved state starts anew.

    Args:
        reducer, tag, tensors: see `check_fits`.

    Raises:
        StateMismatchError: see `check_fits`; then nothing is changed.
    """
    check_fits(reducer, tag, tensors)
    unsaved = {slot.name for slot in reducer.slots} - tensors.keys()
    known, tensors = tensors_of(reducer), _cut_to(reducer, tensors)
    empty = sorted(name for name, parts in known.items() if parts and name not in tensors)
    reducer.reset(empty)  # and no others: the saved tensors may be this reducer's own, as in load_state_dict(state_dict())
    anew: list[str] = []
    symbols = {(name, k.split(_OF)[0]) for name, saved in tensors.items() for k in saved}
    unused = sorted({k for name, k in symbols if k not in known.get(name, {}) and k != "error"})
    for name in sorted(known.keys() & tensors.keys()):
        saved, here = tensors[name], known[name]
        memory = here.keys() & set(_in_memory(reducer, name))
        fits = {k: saved[k] for k in here if k in saved and (k in memory or saved[k].shape == here[k].shape)}
        # Each is kept or starts anew as one: y_mean would not be the mean of y's that started from zero.
        for group, those in ((memory, empty), (here.keys() - memory, anew)):
            if not group <= fits.keys():
                those.append(name)
                fits = {k: tensor.clone() for k, tensor in fits.items() if k not in group}
        if name in empty or name in anew:
            reducer.reset([name])
        reducer.set_state(name, fits.pop("error", None), fits)
    words = reducer.schemes.error_feedback.memory
    if unused:
        _log.warning("the saved run had another scheme: its %s is not used here", ", ".join(unused))
    if empty:
        _log.warning("no saved %s for %d parameters (first: %s): they start from zero", words, len(empty), empty[0])
    if anew:
        kept = "" if set(anew) <= set(empty) or reducer.schemes.error_feedback.form == "none" else f", the {words} is kept"
        _log.warning(
            "the saved bases of %d parameters (first: %s) are of another rank, or of other blocks of rows: they start "
            f"anew{kept}",
            len(anew),
            anew[0],
        )
    if tag.seed != reducer.seed:
        _log.warning("the saved run had seed %d, this one has %d: later random draws differ", tag.seed, reducer.seed)
    reducer.continue_at(tag.step, tag.unsteady)
    # A basis that is random again is not to wait for the next period. (A rank of a node may hold no row of a matrix, and
    # could not tell that its basis starts anew; all of them must restart alike, so there it waits.)
    owing = unsaved | set(anew) if reducer.shards.size == 1 else unsaved
    reducer.restarts.start_anew(owing, tag.step)
    if tag.kind == "mean":
        reducer.mark_consolidated()


def save(reducer: Reducer, folder: str | os.PathLike[str]) -> str:
    """Write the state of all workers as one file; a collective, between steps. When it returns, the file is there.

    Args:
        reducer: the run's; its error memory is consolidated.
        folder: the file is `<folder>/lowrank_comm.safetensors`, in a file system that all workers share.

    Returns:
        A name for this very save, also written into the file, the same on all workers.

    Raises:
        StateMismatchError: on every worker, if rank 0 could not write.
    """
    reducer.consolidate_error_memory()
    tensors = whole_tensors_of(reducer) if reducer.shards.size > 1 or reducer.is_writer else {}
    mine = {"name": uuid.uuid4().hex, "error": ""}
    if reducer.is_writer:
        try:
            _write(reducer, tensors, Path(folder) / FILE_NAME, mine["name"])
        except (OSError, SafetensorError) as error:  # the others wait to be told
            mine["error"] = str(error)
    of_rank_0 = _tell(reducer, mine)[0]
    if of_rank_0["error"]:
        raise StateMismatchError(f"the compressor's state could not be saved: {of_rank_0['error']}.")
    return of_rank_0["name"]


def _write(reducer: Reducer, tensors: Mapping[str, Mapping[str, Tensor]], path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{symbol}/{parameter}": tensor.clone().contiguous()
        for parameter, parts in tensors.items()
        for symbol, tensor in parts.items()
    }
    tag = json.dumps(asdict(tag_of(reducer)))
    settings = {key: value for key, value in reducer.describe().items() if key != "parameters"}  # for who looks into it
    unfinished = path.with_suffix(".unfinished")
    save_file(flat, unfinished, metadata={"tag": tag, "name": name, "settings": json.dumps(settings)})
    unfinished.replace(path)


def _tell(reducer: Reducer, mine: dict[str, str]) -> list[dict[str, str]]:
    """Every worker's words, in rank order; a collective."""
    return [json.loads(words) for words in reducer.tell_all(json.dumps(mine))]


def load(reducer: Reducer, folder: str | os.PathLike[str], name: str | None = None) -> bool:
    """Read what `save` wrote; a collective, at any world size.

    Args:
        reducer: of the resumed run.
        folder: where the file is.
        name: what `save` returned, if the caller knows: any other file is refused.

    Returns:
        False, after a warning, where there is no file: all then starts from zero.

    Raises:
        StateMismatchError: on every worker, if the file does not fit this run, cannot be read, is another one than `name`
            says, or is there on some workers only.
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
            raise StateMismatchError(one["error"] if len(told) == 1 else f"rank {rank}: {one['error']}")
    if len({one["found"] for one in told}) > 1:
        seen = ", ".join(f"{one['found']} on rank {rank}" for rank, one in enumerate(told))
        raise StateMismatchError(f"{path} is {seen}; all workers must see the same files.")
    if found is None:
        memory = reducer.schemes.error_feedback.memory
        if name is not None:
            raise StateMismatchError(
                f"{path} is missing, and with it the {memory} that this checkpoint was saved with. Copy it from the "
                "checkpoint's original folder, or load without the optimizer's state."
            )
        _log.warning("%s is missing: the checkpoint was saved without compression; the %s starts from zero", path, memory)
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
        raise StateMismatchError(f"{path} was not written by lowrank_comm.checkpoint.save; remove it or restore it.")
    if name is not None and metadata.get("name") != name:
        raise StateMismatchError(
            f"{path} does not belong to this checkpoint: it was left there by another save. Restore the right one, or "
            "resume from another checkpoint."
        )
    entries = json.loads(metadata["tag"])
    check_format(entries.get("format"), str(path))
    return Tag(**entries), tensors
