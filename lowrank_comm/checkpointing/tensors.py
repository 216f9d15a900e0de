"""How the tensors of a saved state are checked and put back, by parameter name and
symbol.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_comm.checkpointing.tag import Tag
from lowrank_comm.checkpointing.whole_tensors import OF, tensors_of
from lowrank_comm.errors import StateMismatchError
from lowrank_comm.numerics.linalg import is_finite
from lowrank_comm.reduction.reducer import Reducer

_log = logging.getLogger("lowrank_comm")


def _in_memory(reducer: Reducer, name: str) -> tuple[str, ...]:
    """Return the symbols of what is kept of one parameter's earlier gradients: right
    for any rank and any blocks, unlike a basis.
    """
    scheme = reducer.state.compressor_of(name)
    return (
        "error",
        *((*scheme.parameter_shaped_state, *scheme.replicated_state) if scheme else ()),
    )


def _cut_to(
    reducer: Reducer, tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return what this rank holds of saved tensors: its block of a whole error or the
    like, its basis of those of all blocks.
    """
    node, state = reducer.workers.intra_node, reducer.state
    slots = {slot.name: slot for slot in reducer.slots}
    own_basis = f"{OF}{node.size}"
    result: dict[str, dict[str, Tensor]] = {}
    for name, saved in tensors.items():
        slot, held, memory = slots.get(name), state.bases_of(name), _in_memory(reducer, name)
        parts: dict[str, Tensor] = {}
        for symbol, given in saved.items():
            tensor = given.to_local() if isinstance(given, DTensor) else given
            if slot is not None and symbol in memory and tensor.shape == slot.whole:
                tensor = node.own(tensor, slot.dim)
            elif symbol.endswith(own_basis) and node.size > 1:
                symbol = symbol.removesuffix(own_basis)
                tensor = tensor[node.rank] if tensor.dim() == 3 else tensor
                if symbol in held:
                    tensor = tensor[tuple(map(slice, held[symbol].shape))]
            parts[symbol] = tensor
        if slot is None or slot.numel > 0 or held:
            result[name] = parts
    return result


def check_fits(
    reducer: Reducer, tag: Tag, tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Refuse a saved state that does not fit, before anything is changed.

    Args:
        reducer: of the resumed run, at any world size.
        tag: of the saved state.
        tensors: parameter name -> {"error": ..., "Q": ...}.

    Returns:
        What this rank holds of these tensors.

    Raises:
        StateMismatchError: the state belongs to another worker, is not finite, or error
            memory would be lost: a saved parameter is not compressed now, or has
            another shape.
    """
    tag.check_usable_by(reducer)
    known, own = tensors_of(reducer), _cut_to(reducer, tensors)
    for name, saved in own.items():
        here = known.get(name, {})
        for symbol, tensor in saved.items():
            _check_numbers(name, symbol, tensor, here.get(symbol))
        if "error" in saved and "error" not in here and bool(saved["error"].any()):
            raise StateMismatchError(
                f"{name!r} has a saved error memory but is not a compressed parameter of this run"
                f" with one; it would be lost. {_why_none_here(reducer, name, saved)}; to give it"
                " up on purpose, take the compressor's state out of the checkpoint (in a state dict"
                " the key 'lowrank_comm' and the entries 'lowrank_comm_...')."
            )
        for symbol in saved.keys() & here.keys() & set(_in_memory(reducer, name)):
            if saved[symbol].shape != here[symbol].shape:
                raise StateMismatchError(
                    f"{name!r}: the saved {_called(symbol)} is {tuple(saved[symbol].shape)}, the"
                    f" parameter {tuple(here[symbol].shape)}; resume with the same model."
                )
    return own


def _called(symbol: str) -> str:
    return "error memory" if symbol == "error" else symbol


def _check_numbers(name: str, symbol: str, saved: Tensor, here: Tensor | None) -> None:
    """Refuse a saved tensor with a number that is not finite, or of a dtype that cannot
    have been saved.
    """
    if not isinstance(saved, Tensor) or (
        here is not None and saved.is_floating_point() != here.is_floating_point()
    ):
        kind = saved.dtype if isinstance(saved, Tensor) else type(saved).__name__
        raise StateMismatchError(
            f"{name!r}: the saved {_called(symbol)} is damaged: it is of {kind}; resume from"
            " another checkpoint."
        )
    if saved.is_floating_point() and not is_finite(saved):
        raise StateMismatchError(
            f"{name!r}: the saved {_called(symbol)} is not finite, and every step after it would be"
            " skipped; resume from an earlier checkpoint, or take the compressor's state out of"
            " this one (in a state dict the key 'lowrank_comm' and the entries"
            " 'lowrank_comm_...')."
        )


def _why_none_here(reducer: Reducer, name: str, saved: Mapping[str, Tensor]) -> str:
    """Say what the saved run kept of a parameter, why this one keeps no error memory of
    it, and which settings keep one.
    """
    assignment, node = reducer.assignment, reducer.workers.intra_node
    symbols = ", ".join(sorted(symbol.split(OF)[0] for symbol in saved))
    kept = (
        f"The saved run kept {symbols} of it; this one has compressor"
        f" {assignment.compressor.json_name!r} with error_feedback form"
        f" {assignment.error_feedback.form!r}"
    )
    slot = next((slot for slot in reducer.slots if slot.name == name), None)
    if slot is None:
        return f"{kept}, and no trainable parameter of this name. Resume with the same model"
    # the largest block of a node, which decides for all
    treatment = assignment.treat(slot, 0)
    if treatment.batched or not assignment.compressor.low_rank:
        return f"{kept}. Resume with the same compressor and error_feedback"
    kept = f"{kept}, and leaves it dense: {treatment.reason}"
    if not treatment.reason.startswith("rate "):
        return f"{kept}. Resume with the same model, names, rules and quantization"
    smaller = (
        f"min_compression_rate=0 (or below this rate), the rule Rule({name!r},"
        ' treatment="low_rank") or the rank of the saved run'
    )
    if slot.whole is None or node.whole_matrices:
        shape = tuple(slot.whole or slot.shape)
        return f"{kept} (min_compression_rate; its shape is {shape}). Resume with {smaller}"
    scope = ""
    if (
        assignment.policy.treat(name, slot.whole).low_rank
        and assignment.compressor.row_blocks
        and assignment.low_rank_compressor is assignment.compressor
    ):
        scope = 'shard_scope="matrix", which judges whole matrices, '
    return (
        f'{kept} (min_compression_rate), judged by shard_scope="shard" from the largest block of a'
        f" rank, {slot.block(node, 0)} of {slot.whole}. Resume with {scope}as many ranks in a node"
        f" as the saved run, {smaller}"
    )


def restore(reducer: Reducer, tag: Tag, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a saved state to a reducer; what it held is replaced, and what is not in the
    saved state starts from scratch.

    Args:
        reducer, tag, tensors: see `check_fits`.

    Raises:
        StateMismatchError: see `check_fits`; then nothing is changed.
    """
    unsaved = {slot.name for slot in reducer.slots} - tensors.keys()
    known, tensors = tensors_of(reducer), check_fits(reducer, tag, tensors)
    converted = [
        f"{_called(symbol)} of {name} from {tensor.dtype} to {known[name][symbol].dtype}"
        for name, saved in sorted(tensors.items())
        for symbol, tensor in saved.items()
        if symbol in known.get(name, {})
        and tensor.shape == known[name][symbol].shape
        and tensor.dtype != known[name][symbol].dtype
    ]
    empty = sorted(name for name, parts in known.items() if parts and name not in tensors)
    # and no others: the saved tensors may be this reducer's own, as in
    # load_state_dict(state_dict())
    reducer.state.reset(empty)
    anew: list[str] = []
    symbols = {(name, k.split(OF)[0]) for name, saved in tensors.items() for k in saved}
    unused = sorted({k for name, k in symbols if k not in known.get(name, {}) and k != "error"})
    for name in sorted(known.keys() & tensors.keys()):
        saved, here = tensors[name], known[name]
        memory = here.keys() & set(_in_memory(reducer, name))
        fits = {
            k: saved[k]
            for k in here
            if k in saved and (k in memory or saved[k].shape == here[k].shape)
        }
        # They are kept or reset together: y_mean would not be the mean of y's that
        # started from zero.
        for group, those in ((memory, empty), (here.keys() - memory, anew)):
            if not group <= fits.keys():
                those.append(name)
                fits = {k: tensor.clone() for k, tensor in fits.items() if k not in group}
        if name in empty or name in anew:
            reducer.state.reset([name])
        reducer.state.set_state(name, fits.pop("error", None), fits)
    words = reducer.assignment.error_feedback.memory
    if converted:
        _log.warning(
            "%d saved tensors have another dtype, and are converted (first: the %s)",
            len(converted),
            converted[0],
        )
    if unused:
        _log.warning("the saved run had another scheme: its %s is not used here", ", ".join(unused))
    if empty:
        _log.warning(
            "no saved %s for %d parameters (first: %s): they start from zero",
            words,
            len(empty),
            empty[0],
        )
    if anew:
        kept = (
            ""
            if set(anew) <= set(empty) or reducer.assignment.error_feedback.form == "none"
            else f", the {words} is kept"
        )
        _log.warning(
            "the saved bases of %d parameters (first: %s) are of another rank, or of other blocks"
            f" of rows: they start anew{kept}",
            len(anew),
            anew[0],
        )
    if tag.seed != reducer.seed:
        _log.warning(
            "the saved run had seed %d, this one has %d: later random draws differ",
            tag.seed,
            reducer.seed,
        )
    otherwise = _restart_otherwise(reducer, tag)
    if otherwise:
        _log.warning(
            "the saved run restarted all matrices by the SVD, or is of a version whose default that"
            ' was; here restart="auto" restarts %d of them (first: %s), of more than 2^20 elements,'
            ' by "randomized". To go on as before, give restart="svd"',
            len(otherwise),
            otherwise[0],
        )
    reducer.state.continue_at(tag.step, tag.unsteady)
    # A basis that is random again is not to wait for the next period. (A rank of a node
    # may hold no row of a matrix, and could not tell that its basis is new; all of
    # them must restart alike, so there it waits.)
    owing = unsaved | set(anew) if reducer.workers.intra_node.size == 1 else unsaved
    if reducer.state.warmup.length <= tag.step < tag.warmup_steps:
        # saved in a warm-up that does not go on: no basis has been computed yet
        owing = {slot.name for slot in reducer.slots}
    reducer.state.restarts.start_anew(owing, tag.step)
    if tag.kind == "mean":
        reducer.state.mark_consolidated()


def _restart_otherwise(reducer: Reducer, tag: Tag) -> list[str]:
    """Return the matrices that restart="auto" restarts by another rule than the SVD,
    where the saved run had the SVD: by its setting, or by the default of older
    versions.
    """
    compressor = reducer.assignment.compressor
    if compressor.describe().get("restart") != "auto" or tag.restart not in (None, "svd"):
        return []
    treated = [(slot.name, reducer.assignment.treat(slot, 0)) for slot in reducer.slots]
    return [
        name for name, t in treated if t.low_rank and compressor.restart_rule(t.m, t.n)[0] != "svd"
    ]
