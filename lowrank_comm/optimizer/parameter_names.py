"""Finds the names of parameters: the model's own, however it was wrapped, since all
state is keyed by them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_comm.optimizer.environment import warn_user

_log = logging.getLogger("lowrank_comm")

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def wrappers_in_front(names: Iterable[str]) -> int:
    """Count how many `module.` of wrappers stand in front of all names (a part of the
    model that is called so does not).
    """
    own = [_WRAPPERS.sub("", name) for name in names]
    depth = 0
    while own and all(name.startswith("module.") for name in own):
        own, depth = [name.removeprefix("module.") for name in own], depth + 1
    return depth


def own_name(name: str, depth: int) -> str:
    """Return the model's own name of a parameter: without `_orig_mod.` and the like
    anywhere, and without `depth` wrappers.

    Example:
        >>> names = ["module._orig_mod.layers.0.weight", "module._orig_mod.head.weight"]
        >>> [own_name(name, wrappers_in_front(names)) for name in names]
        ['layers.0.weight', 'head.weight']
    """
    name = _WRAPPERS.sub("", name)
    for _ in range(depth):
        name = name.removeprefix("module.")
    return name


def keeping_names(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], said: bool = True
) -> dict[str, Any]:
    """Return a state dict whose groups have this run's names of the parameters, or none
    where it has none: torch loads by order, and takes the saved names over with it.

    Args:
        state_dict: to be loaded into a base optimizer.
        groups: the base's own.
        said: whether to warn where names differ.
    """
    renamed, differing = [], []
    for group, own in zip(state_dict["param_groups"], groups, strict=True):
        kept = {key: value for key, value in group.items() if key != "param_names"}
        if "param_names" in own:
            kept["param_names"] = own["param_names"]
        both = [one.get("param_names", ()) for one in (group, own)]
        there, here = ([own_name(n, wrappers_in_front(names)) for n in names] for names in both)
        differing += [pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]]
        renamed.append(kept)
    if differing and said:
        _log.warning(
            "the saved run called %d parameters otherwise (first: %r there, %r here): the state is"
            " loaded by their order, as torch does; random draws go by name, and differ",
            len(differing),
            *differing[0],
        )
    return {**state_dict, "param_groups": renamed}


class Namer:
    """Finds the name of every parameter of an optimizer's groups.

    Looked for in this order: what `learn` was told (a model, or named_parameters=), the
    group's `param_names` (torch's own, where the optimizer was built from
    named_parameters()), and else "group.index", with a warning.

    Args:
        named_parameters: names that are known.
        in_ddp: what to do where the names look like those of a model in DDP that nobody
            has told of.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        in_ddp: str = "build the base optimizer from the plain model, and do not wrap it.",
    ) -> None:
        self._in_ddp = in_ddp
        self._known: dict[int, str] = {}
        # of wrappers in torch's own names
        self._depth: int | None = None
        self._warned = False
        if named_parameters is not None:
            self.learn(named_parameters)

    def learn(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over names, e.g. `model.named_parameters()`."""
        named = list(named_parameters)
        depth = wrappers_in_front(name for name, _ in named)
        self._known.update({id(parameter): own_name(name, depth) for name, parameter in named})

    def name_all(self, param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
        """Return (name, parameter) in the order of the groups."""
        named: list[tuple[str, Tensor]] = []
        unnamed = 0
        # once: parameters that are added later must not rename the others
        if self._depth is None:
            torchs = [name for group in param_groups for name in group.get("param_names", ())]
            self._depth = wrappers_in_front(torchs) if torchs else None
        for g, group in enumerate(param_groups):
            for k, parameter in enumerate(group["params"]):
                if id(parameter) in self._known:
                    name = self._known[id(parameter)]
                elif "param_names" in group:
                    name = own_name(group["param_names"][k], self._depth or 0)
                else:
                    name, unnamed = f"{g}.{k}", unnamed + 1
                named.append((name, parameter))
        if unnamed and not self._warned:
            self._warned = True
            warn_user(
                f"{unnamed} parameters have no names and are called by group and index (0.0, 0.1,"
                " ...): a checkpoint then depends on their order. Build the base optimizer from"
                " model.named_parameters(), or call attach(model).",
            )
        if self._depth and not self._known and not self._warned:
            self._warned = True
            warn_user(
                "the names of all parameters start with 'module.', as in a model wrapped by"
                " DistributedDataParallel. If it is, gradients are averaged by it and then once"
                f" more: {self._in_ddp}",
            )
        return named
