"""Counts what a function would cost an accelerator: operations, of which each is about
one kernel launch, bytes that they touch, and numbers that the host waits for.

    counted = count(optimizer.step)
    assert counted.launches <= 700 and counted.host_reads == 2

The counts are of operations dispatched under a TorchDispatchMode, so they need no
accelerator and do not vary from run to run. On CPU tensors the CPU's branches are
counted, unless all that is counted was made and runs inside
`lowrank_comm.numerics.device.accelerator_path`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what starts no kernel, beside views: allocations, metadata, and the reads below
_NO_KERNEL = {
    *("_unsafe_view", "reshape", "_reshape_alias", "lift_fresh", "set_", "resize_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("is_same_size", "promote_types", "is_pinned", "_local_scalar_dense"),
}
# what an operation of these writes it does not read
_WRITES_ONLY = {
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "random_"),
    *("_foreach_copy_", "_foreach_zero_"),
}
# operations whose result the host holds, or whose result's size it must know
_READS = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
# methods that read a CPU tensor without any operation
_READING_METHODS = (torch.Tensor.tolist, torch.Tensor.numpy)


@dataclass
class Launches:
    """What was counted.

    Attributes:
        operations: name of an operation -> how often it was started; views, allocations
            and metadata are left out. One over a list of tensors (`_foreach_add`) is
            one.
        bytes: that operations read and write: tensors given are read, tensors made anew
            or written to are written, each once for each operation.
        host_reads: how often the host asks for numbers of a device.
    """

    operations: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    host_reads: int = 0

    @property
    def launches(self) -> int:
        """How many operations were started."""
        return self.operations.total()


def count(function: Callable[[], Any]) -> Launches:
    """Call the function once and count what it does in this thread.

    Example:
        >>> import torch
        >>> a = torch.ones(4, 4)
        >>> counted = count(lambda: (a @ a).sum().item())
        >>> counted.operations
        Counter({'mm': 1, 'sum': 1})
        >>> counted.bytes, counted.host_reads  # mm: 3 x 64; sum: 64 + 4
        (260, 1)
    """
    counted = Launches()
    with _Operations(counted), _Methods(counted):
        function()
    return counted


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Launches) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.partition("::")[2]
        self._counted.host_reads += name in _READS
        if name not in _NO_KERNEL and not _is_view(schema):
            self._counted.operations[name] += 1
            self._counted.bytes += _bytes(schema, name, args, kwargs, out)
        return out


class _Methods(TorchFunctionMode):
    def __init__(self, counted: Launches) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counted.host_reads += func in _READING_METHODS
        return func(*args, **(kwargs or {}))


def _is_view(schema: Any) -> bool:
    """Whether all results are views of what was given, and nothing is written."""
    aliases = [result.alias_info for result in schema.returns]
    return bool(aliases) and all(alias and not alias.is_write for alias in aliases)


def _bytes(schema: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    positional = zip(schema.arguments, args, strict=False)
    named = [(argument, kwargs.get(argument.name)) for argument in schema.arguments[len(args) :]]
    total = 0
    for argument, value in [*positional, *named]:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and (argument.is_out or name in _WRITES_ONLY))
        total += _size(value) * (writes + reads)
    if all(result.alias_info is None for result in schema.returns):
        total += _size(out)
    return total


def _size(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
