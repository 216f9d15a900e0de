"""Names of parameters: the model's own, however it was wrapped, since all state is keyed by them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def own_name(name: str) -> str:
    """The model's own name of a parameter: without `module.` in front and without `_orig_mod.` and the like anywhere.

    Example:
        >>> own_name("module._orig_mod.layers.0.weight")
        'layers.0.weight'
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


class Namer:
    """Finds the name of every parameter of an optimizer's groups.

    Looked for in this order: what `learn` was told (a model, or named_parameters=), the group's `param_names` (torch's
    own, where the optimizer was built from named_parameters()), and else "group.index", with a warning.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        self._known: dict[int, str] = {}
        self._warned = False
        if named_parameters is not None:
            self.learn(named_parameters)

    def learn(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over names, e.g. `model.named_parameters()`."""
        self._known.update({id(parameter): own_name(name) for name, parameter in named_parameters})

    def name_all(self, param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
        """(name, parameter) in the order of the groups."""
        named: list[tuple[str, Tensor]] = []
        unnamed = 0
        for g, group in enumerate(param_groups):
            own = group.get("param_names")
            for k, parameter in enumerate(group["params"]):
                if id(parameter) in self._known:
                    name = self._known[id(parameter)]
                elif own is not None:
                    name = own_name(own[k])
                else:
                    name, unnamed = f"{g}.{k}", unnamed + 1
                named.append((name, parameter))
        if unnamed and not self._warned:
            self._warned = True
            warnings.warn(
                f"{unnamed} parameters have no names and are called by group and index (0.0, 0.1, ...): a checkpoint "
                "then depends on their order. Build the base optimizer from model.named_parameters(), or call "
                "attach(model).",
                stacklevel=4,
            )
        return named
