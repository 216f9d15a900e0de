"""Everything of a run in one folder for each save: the model, the optimizer with the
compressor's state, and what else the caller gives.

    <folder>/save-00000003/      the newest complete save
        manifest.json            which files belong to it, their sizes and SHA-256, and
                                 one of itself
        state.pt                 model and optimizer, by torch.save
        optimizer_<rank>.pt      where each rank has an optimizer's state of its own
        *.distcp, .metadata      model and optimizer by torch.distributed.checkpoint,
                                 where parameters are sharded (FSDP2, HSDP)
        extra.pt                 what else the caller has given
    <folder>/save-00000002/      the one before
    <folder>/save-00000004.unfinished
                                 left by a killed job; the next save removes it

A save is written as `<name>.unfinished`, brought to the disk, and renamed. An older one
is renamed back before it is removed. So a job that is killed at any moment leaves whole
saves and what is called unfinished, and `load_all` takes the newest that is complete.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowrank_comm.checkpointing import durable, sharded_state
from lowrank_comm.checkpointing.sharded_state import copied, is_sharded
from lowrank_comm.checkpointing.state_dict import (
    PREFIX,
    check_groups,
    without_compressed_state,
)
from lowrank_comm.checkpointing.tag import refused_together
from lowrank_comm.communication.group import Group
from lowrank_comm.communication.workers import Workers
from lowrank_comm.errors import (
    ConfigError,
    LowRankCommError,
    StateMismatchError,
    UnsupportedError,
)

_log = logging.getLogger("lowrank_comm")

_NAME = re.compile(r"save-(\d{8})")
_UNFINISHED = ".unfinished"
_MANIFEST, _STATE, _EXTRA = "manifest.json", "state.pt", "extra.pt"
_passed_over: set[Path] = set()
"""The saves that this process has found damaged; they do not count as kept."""
_WRAPPERS = ("AcceleratedOptimizer", "_FabricOptimizer", "LightningOptimizer")
_WRAPPERS_OF = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
_ARGUMENTS = ("folder", "model", "optimizer")

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    size: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(BaseModel):
    """What a save consists of; fields that a later version adds are left out.

    Attributes:
        optimizer: the class of the base optimizer; "" in what older versions saved.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    sharded: bool
    world: Annotated[int, Field(ge=1)]
    optimizer: str = ""
    files: dict[str, _File]


def _refuse_extra_of_these_names(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Refuse an extra that has the name of an argument, which Python would call
    multiple values for it.
    """

    @functools.wraps(call)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in _ARGUMENTS[: len(args)]:
            if name in kwargs:
                raise ConfigError(
                    f"save_all: no extra can be called {name!r}, which is an argument of save_all;"
                    " give it another name."
                )
        return call(*args, **kwargs)

    return checked


@_refuse_extra_of_these_names
def save_all(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    keep: int = 2,
    **extra: Any,
) -> Path:
    """Save model, optimizer and compressor state as one; a collective, between steps,
    to be called by every rank. When it returns, the save is on the disk.

    A job that is killed in the middle loses nothing: the save before is as it was.

    Args:
        folder: of all saves of this run, in a file system that all ranks share.
        model: plain, or wrapped by DDP or fully_shard.
        optimizer: a `CompressedOptimizer`, one of this library's other optimizers, or
            any of torch's.
        keep: how many complete saves stay, this one included. One that is damaged does
            not count, if its files are not as long as they were, or `load_all` has
            passed it over in this process.
        extra: what else belongs to the run, such as `epoch=3` and
            `scheduler=scheduler.state_dict()`: tensors, numbers, text, and lists and
            dicts of them. Rank 0's are saved.

    Returns:
        The folder of this save.

    Raises:
        StateMismatchError: on every rank, if some rank could not write, or its state is
            not finite.
        ConfigError: an argument is of another kind, or an extra has an argument's name;
            the optimizer has none of the model's parameters (in a run of several ranks
            a StateMismatchError of all).
        UnsupportedError: the model is a DeepSpeed engine, which saves by itself.

    Example:
        >>> import tempfile, torch
        >>> from lowrank_comm import CompressedOptimizer, PowerSGD, checkpoint
        >>> model = torch.nn.Linear(8, 8)
        >>> base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        >>> optimizer = CompressedOptimizer(base, PowerSGD(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save_all(folder, model, optimizer, epoch=3).name
        ...     checkpoint.load_all(folder, model, optimizer)
        'save-00000001'
        {'epoch': 3}
    """
    optimizer = _checked("save_all", folder, model, optimizer)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ConfigError(
            f"save_all: keep={keep!r:.80} must be an integer of at least 1, the number of saves"
            " that stay; give an extra of yours another name."
        )
    workers, root = _workers_of(model, optimizer), Path(folder)
    with refused_together(workers, "save_all"):
        _refuse_optimizer_of_another("save_all", model, optimizer)
    if hasattr(optimizer, "consolidate_error_memory"):
        # rank 0 writes what is whole
        optimizer.consolidate_error_memory(for_all_ranks=False)
    path = Path(_on_rank_0(workers, lambda: str(_begin(root))))
    sharded = is_sharded(model)
    files = _on_all(workers, lambda: _write(path, workers, model, optimizer, sharded, extra), path)
    manifest = _Manifest(
        sharded=sharded,
        world=workers.world_size,
        optimizer=_class_of(optimizer),
        files=files,
    )
    return Path(_on_rank_0(workers, lambda: str(_finish(path, manifest, keep)), path))


def load_all(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer
) -> dict[str, Any] | None:
    """Load the newest complete save of a folder; a collective, to be called by every
    rank, at any number of ranks.

    Call it where the optimizer is ready for its first step: after `attach`, if that is
    called at all. The engine may be another one than that of the save.

    Args:
        folder, model, optimizer: see `save_all`.

    Returns:
        What `save_all` was given as `extra`, {} if nothing; None, after a warning, if
        the folder has no save or does not exist: the run starts from the beginning.

    Raises:
        StateMismatchError: on every rank, if the save does not fit this run (another
            model, another class of base optimizer), none is undamaged, or the ranks do
            not see the same folder; then nothing is changed.
        ConfigError: an argument is of another kind; the folder is a file or one save,
            or the optimizer has none of the model's parameters (in a run of several
            ranks a StateMismatchError of all).
        UnsupportedError: the model is a DeepSpeed engine, which loads by itself.
    """
    optimizer = _checked("load_all", folder, model, optimizer)
    workers, root = _workers_of(model, optimizer), Path(folder)
    names = _seen_by_all(workers, root)
    with refused_together(workers, "load_all"):
        _refuse_optimizer_of_another("load_all", model, optimizer)
    if not names:
        if workers.is_writer:
            _log.warning(
                "load_all: %s; nothing is loaded, and the run starts from the beginning",
                f"{root} has no complete save" if root.exists() else f"{root} does not exist",
            )
        return None
    reasons = []
    for name in names:
        path = root / name
        manifest, reason = _verified(path, workers)
        if manifest is None:
            _passed_over.add(path.resolve())
            reasons.append(reason)
            continue
        if workers.is_writer:
            for text in reasons:
                _log.warning("passed over: %s", text)
        # before anything is changed
        with refused_together(workers, str(path)):
            extra: dict[str, Any] = _read(path / _EXTRA)
        if manifest.sharded:
            same_class = functools.partial(_refuse_other_class, path, manifest, optimizer)
            sharded_state.load(path, workers, model, optimizer, same_class)
        else:
            _load_whole(path, manifest, workers, model, optimizer)
        if workers.is_writer:
            _log.info("%s is loaded", path)
        return extra
    raise StateMismatchError(
        f"no save in {root} is undamaged: {reasons[0]}; restore one, or remove them to start from"
        " the beginning."
    )


# ---------------------------------------------------------------- what was given


def _checked(call: str, folder: Any, model: Any, optimizer: Any) -> Optimizer:
    """Return the optimizer that Accelerate's and Lightning's wrappers hold, after a
    look at the kinds of all three.
    """
    _refuse_deepspeed(model)
    right = (
        isinstance(folder, (str, os.PathLike)),
        isinstance(model, nn.Module),
        hasattr(optimizer, "param_groups") and not isinstance(optimizer, nn.Module),
    )
    if not all(right):
        given = ", ".join(type(one).__name__ for one in (folder, model, optimizer))
        raise ConfigError(
            f"{call}: {_ARGUMENTS[right.index(False)]} is of another kind; give {call}(folder,"
            f" model, optimizer) in this order, got {call}({given})."
        )
    return _unwrapped(optimizer)


def _unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's and Lightning's wrappers. Others with an
    attribute `optimizer`, as Lookahead, have a state of their own beside it.
    """
    while any(
        kind.__name__ in _WRAPPERS and kind.__module__.partition(".")[0] in _WRAPPERS_OF
        for kind in type(optimizer).__mro__
    ):
        optimizer = optimizer.optimizer
    unwrapped: Optimizer = optimizer
    return unwrapped


def _refuse_optimizer_of_another(call: str, model: nn.Module, optimizer: Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"{call}: the optimizer holds none of the model's parameters: it is of another model,"
            " or was made before the model got other ones (as by fully_shard); make the optimizer"
            " from this model."
        )


def _class_of(optimizer: Optimizer) -> str:
    """Return the name of the base optimizer's class."""
    base = getattr(optimizer, "base", None)
    return type(base if isinstance(base, Optimizer) else optimizer).__name__


def _compresses(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is one of this library's, or is around one."""
    return isinstance(getattr(optimizer, "workers", None), Workers) or any(
        isinstance(one, Optimizer) and _compresses(one) for one in vars(optimizer).values()
    )


def _refuse_other_class(path: Path, manifest: _Manifest, optimizer: Optimizer) -> None:
    here = _class_of(optimizer)
    if manifest.optimizer not in ("", here):
        raise StateMismatchError(
            f"{path} was saved with {manifest.optimizer}, and the optimizer here is {here}, which"
            f" cannot go on from its state; resume with {manifest.optimizer}."
        )


# ---------------------------------------------------------------- together


def _workers_of(model: nn.Module, optimizer: Optimizer) -> Workers:
    """Return all ranks that hold a part of the run."""
    workers = getattr(optimizer, "workers", None)
    if isinstance(workers, Workers):
        return workers
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Workers(Group(None), device=device)


def _on_rank_0(workers: Workers, call: Callable[[], str], unfinished: Path | None = None) -> str:
    """Return on every rank what `call` returns on rank 0; raise on every rank what it
    raises there.
    """
    return _on_all(workers, lambda: call() if workers.is_writer else "", unfinished, first=True)


def _on_all(
    workers: Workers, call: Callable[[], Any], unfinished: Path | None, first: bool = False
) -> Any:
    """Return on every rank what `call` returns on rank 0 (first), or the dictionaries
    that it returns on all, as one; raise on every rank what it raises on some.
    """
    result, problem = None, ""
    try:
        result = call()
    # the others wait to be told
    except Exception as error:
        ours = isinstance(error, (OSError, LowRankCommError))
        problem = f"{error}" if ours else f"{type(error).__name__}: {error}"
    told = [
        json.loads(text)
        for text in workers.all_gather_text(json.dumps({"result": result, "problem": problem}))
    ]
    failed = [(rank, one["problem"]) for rank, one in enumerate(told) if one["problem"]]
    if failed:
        if unfinished is not None and workers.is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
        rank, words = failed[0]
        raise StateMismatchError(f"the checkpoint failed on rank {rank}: {words}")
    if first:
        return told[0]["result"]
    return {key: value for one in told for key, value in one["result"].items()}


def _seen_by_all(workers: Workers, root: Path) -> list[str]:
    """Return the names of the complete saves, the newest first; a collective.

    Raises:
        StateMismatchError: on every rank, if `root` is no folder of saves, or some rank
            sees none of what another sees.
    """
    mine: list[str] = []
    with refused_together(workers, str(root)):
        mine = _complete_in(root)
    names, *others = (json.loads(text) for text in workers.all_gather_text(json.dumps(mine)))
    for rank, other in enumerate(others, 1):
        if set(other).isdisjoint(names) and (other or names):
            raise StateMismatchError(
                f"rank {rank} does not see what rank 0 sees in {root}:"
                f" {', '.join(names) or 'no save'} on rank 0, {', '.join(other) or 'no save'} on"
                f" rank {rank}. Give all ranks the same folder, in a file system that all share."
            )
    return list(names)


def _refuse_deepspeed(model: nn.Module) -> None:
    if type(model).__name__ == "DeepSpeedEngine":
        raise UnsupportedError(
            "save_all and load_all: the model is a DeepSpeedEngine, whose save_checkpoint and"
            " load_checkpoint carry the compressor's state; call these."
        )


# ---------------------------------------------------------------- writing


def _complete(root: Path) -> list[str]:
    """Return the names of the complete saves, the newest first."""
    if not root.is_dir():
        return []
    return sorted((p.name for p in root.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _complete_in(root: Path) -> list[str]:
    """Return the names of the complete saves, the newest first.

    Raises:
        ConfigError: what was given is a file, or one save.
    """
    if root.is_file():
        folder = root.parent.parent if (root.parent / _MANIFEST).is_file() else root.parent
        raise ConfigError(
            f"load_all: folder={str(root)!r} is a file; give the folder of all saves, such as"
            f" {str(folder)!r}."
        )
    if (root / _MANIFEST).is_file():
        raise ConfigError(
            f"load_all: folder={str(root)!r} is one save; give the folder of all saves,"
            f" {str(root.absolute().parent)!r}. To load this one, move the newer ones away."
        )
    return _complete(root)


def _begin(root: Path) -> Path:
    """Make the folder of a new save, and remove what killed jobs have left."""
    if root.is_file():
        raise ConfigError(f"save_all: folder={str(root)!r} is a file; give a folder.")
    durable.make_folder(root)
    for left in root.glob(f"save-*{_UNFINISHED}"):
        shutil.rmtree(left)
    newest = max((int(name[5:]) for name in _complete(root)), default=0)
    path = root / f"save-{newest + 1:08d}{_UNFINISHED}"
    path.mkdir()
    return path


def _write(
    path: Path,
    workers: Workers,
    model: nn.Module,
    optimizer: Optimizer,
    sharded: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write this rank's files, and return what the manifest has of them."""
    if sharded:
        sharded_state.write(path, model, optimizer)
        written = list(path.glob(f"__{dist.get_rank()}_*"))
        written += [path / ".metadata"] if workers.is_writer else []
    else:
        written = list(_write_whole(path, workers, model, optimizer))
    if workers.is_writer:
        written.append(_put_extra(path / _EXTRA, extra))
    for file in written:
        durable.sync(file)
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in written}


def _write_whole(
    path: Path, workers: Workers, model: nn.Module, optimizer: Optimizer
) -> Iterator[Path]:
    of_each = getattr(optimizer, "saves_each_rank", False)
    if hasattr(optimizer, "workers") and not hasattr(optimizer, "consolidate_error_memory"):
        # of this library's, whose own state vetoes every step if it is not finite
        _check_finite(optimizer.state_dict())
    if of_each:
        yield _put(path / f"optimizer_{workers.global_rank}.pt", optimizer.state_dict())
    if workers.is_writer:
        state = {"model": _inner(model).state_dict()}
        if not of_each:
            state["optimizer"] = optimizer.state_dict()
        yield _put(path / _STATE, state)


def _check_finite(state: Any, where: str = "the optimizer's state") -> None:
    """Raise a StateMismatchError for a number that is not finite."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            _check_finite(value, f"{where}, {key!r}")
    elif isinstance(state, Tensor) and not bool(torch.isfinite(state).all()):
        raise StateMismatchError(f"{where} is not finite; go on from an earlier save.")


def _why_unsafe(error: Exception) -> str:
    """Return what torch says in a long text about a value that it does not load."""
    found = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"it holds a {found.group(1)}" if found else lines[-1]


def _put_extra(path: Path, extra: Mapping[str, Any]) -> Path:
    """Write what the caller gives; say which of it cannot be written."""
    try:
        return _put(path, dict(extra))
    except Exception:
        for key, value in extra.items():
            try:
                buffer = io.BytesIO()
                torch.save(value, buffer)
                torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="meta")
            # of any kind, from the value's own pickling
            except Exception as error:
                raise ConfigError(
                    f"save_all: {key}={value!r:.80} cannot be saved so that it loads without"
                    f" running code from it ({_why_unsafe(error)}); give"
                    " tensors, numbers, text, and lists and dicts of them."
                ) from None
        raise


def _put(path: Path, what: dict[str, Any]) -> Path:
    """Write a file of torch.save, and see that it can be read back safely."""
    torch.save(what, path)
    try:
        torch.load(path, weights_only=True, mmap=True, map_location="meta")
    except Exception as error:
        raise ConfigError(
            f"{path.name} could be saved, but not be loaded without running code from it"
            f" ({_why_unsafe(error)}); give tensors, numbers, text, and"
            " lists and dicts of them."
        ) from None
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finish(path: Path, manifest: _Manifest, keep: int) -> Path:
    """Give a save its name, and remove the oldest."""
    content = manifest.model_dump()
    content["sha256"] = _sha256_of(content)
    (path / _MANIFEST).write_text(json.dumps(content, indent=1))
    durable.sync(path / _MANIFEST)
    done = path.with_name(path.name.removesuffix(_UNFINISHED))
    durable.put_in_place(path, done)
    # of a folder that was removed and made again
    _passed_over.discard(done.resolve())
    kept = 0
    for name in _complete(path.parent):
        save = path.with_name(name)
        if kept >= keep:
            leaving = path.with_name(name + _UNFINISHED)
            save.replace(leaving)
            shutil.rmtree(leaving, ignore_errors=True)
        elif save.resolve() not in _passed_over and not _seen_damage(save):
            kept += 1
    return done


def _seen_damage(path: Path) -> str:
    """Return what is wrong with a save as far as that can be told without reading it
    all; "" if nothing is.
    """
    try:
        for name, file in _read_manifest(path).files.items():
            if (path / name).stat().st_size != file.size:
                return f"{path / name} is damaged: it has not its size"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read ({str(error).splitlines()[0]})"
    return ""


# ---------------------------------------------------------------- reading


def _sha256_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, but for its entry of this name."""
    entries = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> _Manifest:
    """Read what belongs to a save.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is not as it was
            written.
    """
    content = json.loads((path / _MANIFEST).read_bytes())
    if not isinstance(content, dict) or content.get("sha256") != _sha256_of(content):
        raise ValueError(f"the checksum in {_MANIFEST} is not that of its content")
    return _Manifest.model_validate(content)


def _verified(path: Path, workers: Workers) -> tuple[_Manifest | None, str]:
    """Check that a save is as it was written, each rank a part of its files.

    Returns:
        The manifest, or None and what is wrong with the save; the same on all ranks.
    """
    problem = ""
    try:
        manifest = _read_manifest(path)
        for k, (name, file) in enumerate(sorted(manifest.files.items())):
            found = path / name
            if Path(name).name != name or found.stat().st_size != file.size:
                problem = problem or f"{found} is damaged: it has not its size"
            elif k % workers.world_size == workers.global_rank and _sha256(found) != file.sha256:
                problem = problem or f"{found} is damaged: its checksum is not that of its content"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} cannot be read ({str(error).splitlines()[0]})"
    told = workers.all_gather_text(problem)
    for rank, words in enumerate(told):
        if words:
            return None, words if len(told) == 1 else f"rank {rank}: {words}"
    return manifest, ""


def _read(path: Path, mapped: bool = False) -> Any:
    """Read a file of torch.save; `mapped`: tensors take no memory until they are used,
    and who keeps one must copy it, since the file may be removed.
    """
    return torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")


def _inner(model: nn.Module) -> nn.Module:
    """Return the model that DDP or torch.compile has wrapped."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        name = "module" if isinstance(model, DistributedDataParallel) else "_orig_mod"
        model = model.get_submodule(name)
    return model


def _check_model(path: Path, saved: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse another model before anything is changed."""
    here = model.state_dict()
    for name in sorted(here.keys() | saved.keys()):
        there, own = (getattr(one.get(name), "shape", None) for one in (saved, here))
        if name not in saved or name not in here or there != own:
            shapes = [
                "missing" if name not in one else f"{tuple(shape or ())}"
                for one, shape in ((saved, there), (here, own))
            ]
            raise StateMismatchError(
                f"{path} was saved by another model: {name!r} is {shapes[0]} there and"
                f" {shapes[1]} here."
            )


def _load_whole(
    path: Path, manifest: _Manifest, workers: Workers, model: nn.Module, optimizer: Optimizer
) -> None:
    """Load what `torch.save` has written."""
    with refused_together(workers, str(path)):
        state = _read(path / _STATE, mapped=True)
        if "optimizer" not in state:
            # each rank's own, or at another number of ranks rank 0's
            rank = workers.global_rank if manifest.world == workers.world_size else 0
            state["optimizer"] = _read(path / f"optimizer_{rank}.pt", mapped=True)
        _refuse_other_class(path, manifest, optimizer)
        check_groups(state["optimizer"], optimizer.param_groups)
        inner = _inner(model)
        _check_model(path, state["model"], inner)
    of_model = state["model"]
    if not _compresses(optimizer):
        state["optimizer"] = without_compressed_state(state["optimizer"], says=workers.is_writer)
    if is_sharded(model):
        whole = StateDictOptions(full_state_dict=True)
        by_name = _by_name(state["optimizer"], inner, optimizer)
        set_optimizer_state_dict(model, optimizer, by_name, options=whole)
        # what is not sharded is kept as it was given
        for entries in optimizer.state.values():
            held = {k: v for k, v in entries.items() if not isinstance(v, DTensor)}
            entries.update(copied(held))
        set_model_state_dict(model, of_model, options=whole)
        return
    optimizer.load_state_dict(copied(state["optimizer"], but=f"{PREFIX}error"))
    if getattr(optimizer, "saves_each_rank", False):
        # it has written this rank's parameters, which are not those of rank 0
        own = {name for name, p in inner.named_parameters() if p.requires_grad}
        of_model = {name: value for name, value in of_model.items() if name not in own}
    inner.load_state_dict(of_model, strict=len(of_model) == len(state["model"]))


def _by_name(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with the model's names in the place of numbers,
    by the order of the parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    entries: dict[str, Any] = {}
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        called = [names[id(p)] for p in own["params"]]
        entries |= {
            name: state["state"][number]
            for name, number in zip(called, saved["params"], strict=True)
            if number in state["state"]
        }
        groups.append({**saved, "params": called})
    return {"state": entries, "param_groups": groups}
