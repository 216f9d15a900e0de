"""The state of whole parameters, one tensor at a time: where the ranks of a node hold
blocks of a parameter, each is gathered when it is asked for.

A whole error memory is as large as the model. Whoever writes it needs one tensor of it
at a time, and the ranks that only take part need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.policy import Treatment
from lowrank_comm.reduction.reducer import Reducer

# in a symbol: bases of that many blocks of rows, each of which is a matrix of its own
OF = "_of_blocks_"


@dataclass(frozen=True)
class WholeTensor:
    """One tensor of a whole parameter's state.

    Attributes:
        name: of the parameter.
        symbol: "error", "Q" or another of its state.
        dtype, shape: of the tensor.
        fetch: returns it; where the ranks of a node hold blocks of it, a collective of
            these ranks. A live one where this rank holds it all.
    """

    name: str
    symbol: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.symbol}/{self.name}"

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def whole_tensors(reducer: Reducer) -> list[WholeTensor]:
    """List the state of all compressed parameters, by key; the same on all ranks of a
    node, which are to fetch in this order.
    """
    node = reducer.workers.intra_node
    if node.size == 1:
        listed = _held(reducer)
    else:
        listed = _of_blocks_of_the_node(reducer)
    return sorted(listed, key=lambda one: one.key)


def by_name(tensors: Sequence[WholeTensor], keep: bool) -> dict[str, dict[str, Tensor]]:
    """Fetch tensors onto the CPU.

    Args:
        tensors: of `whole_tensors`.
        keep: whether this rank needs them; else it only takes part.

    Returns:
        Parameter name -> {"error": ..., "Q": ...}; {} unless they are kept.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for one in tensors:
        tensor = one.fetch()
        if keep:
            found.setdefault(one.name, {})[one.symbol] = tensor.detach().cpu()
    return found


def _held(reducer: Reducer) -> Iterator[WholeTensor]:
    """Yield what this rank holds, which is whole."""
    for name, parts in tensors_of(reducer).items():
        for symbol, tensor in parts.items():
            yield WholeTensor(name, symbol, tensor.dtype, tuple(tensor.shape), _giving(tensor))


def _of_blocks_of_the_node(reducer: Reducer) -> Iterator[WholeTensor]:
    """Yield what is to be gathered.

    Where each block has a basis of its own, they are kept together, (F, n, r), by a
    symbol that tells F; of what is equal for all blocks, that of the first.
    """
    node = reducer.workers.intra_node

    def whole(slot: ParamInfo, held: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: node.whole(held.to(slot.device), shape, slot.dim, "checkpoint")

    def stacked(basis: Tensor) -> Callable[[], Tensor]:
        return lambda: node.gather(basis.reshape(-1), "checkpoint").view(-1, *basis.shape)

    def first(basis: Tensor) -> Callable[[], Tensor]:
        return lambda: stacked(basis)()[0]

    for slot, largest, shaped in reducer.state.blocks():
        for symbol, tensor in shaped.items():
            shape = slot.whole or slot.shape
            yield WholeTensor(slot.name, symbol, tensor.dtype, shape, whole(slot, tensor, shape))
        replicated = reducer.assignment.compressor_for(largest)[0].replicated_state
        for symbol, basis in block_bases(reducer, slot, largest).items():
            shape, fetch = tuple(basis.shape), _giving(basis)
            if not node.whole_matrices and symbol in replicated:
                fetch = first(basis)
            elif not node.whole_matrices:
                symbol, shape = of_blocks(symbol, node.size), (node.size, *shape)
                fetch = stacked(basis)
            yield WholeTensor(slot.name, symbol, basis.dtype, shape, fetch)


def _giving(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def tensors_of(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    """Return parameter name -> {"error": ..., "Q": ...}, live tensors and no copies. No
    "error" where none is kept.
    """
    memory = reducer.state.error_memory()
    return {
        name: ({"error": memory[name]} if name in memory else {}) | reducer.state.bases_of(name)
        for name in reducer.state.compressed
    }


def untouched(reducer: Reducer) -> dict[str, dict[str, Tensor]]:
    """Return the state of whole parameters as it is before the first step, without
    communication: zero errors, and bases that no step has used.
    """
    node, result = reducer.workers.intra_node, dict[str, dict[str, Tensor]]()
    for slot, largest, shaped in reducer.state.blocks():
        # copies, since DCP loads in place
        parts = {
            symbol: torch.zeros(slot.whole or slot.shape, dtype=slot.compute_dtype)
            for symbol in shaped
        }
        replicated = reducer.assignment.compressor_for(largest)[0].replicated_state
        for symbol, basis in block_bases(reducer, slot, largest).items():
            if node.whole_matrices or symbol in replicated:
                parts[symbol] = basis.cpu()
            else:
                parts[of_blocks(symbol, node.size)] = torch.stack([basis.cpu()] * node.size)
        result[slot.name] = parts
    return result


def of_blocks(symbol: str, count: int) -> str:
    """Return the symbol under which the bases of `count` blocks of a parameter are
    kept, each a matrix of its own.
    """
    return f"{symbol}{OF}{count}"


def block_bases(reducer: Reducer, slot: ParamInfo, largest: Treatment) -> dict[str, Tensor]:
    """Return symbol -> this rank's basis (n, r), of what is not in the shape of the
    block. It is padded to the size of the largest block's basis; zero where it has no
    column.
    """
    initial = reducer.assignment.initial_state(slot, largest)
    shaped = reducer.assignment.compressor_for(largest)[0].parameter_shaped_state
    rooms = {
        symbol: torch.zeros_like(tensor)
        for symbol, tensor in initial.items()
        if symbol not in shaped
    }
    held = reducer.state.bases_of(slot.name)
    for symbol in rooms.keys() & held.keys():
        rooms[symbol][tuple(map(slice, held[symbol].shape))] = held[symbol]
    return rooms
