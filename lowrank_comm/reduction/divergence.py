"""Every K steps, a comparison of what all workers should hold alike, bit for bit:
parameters, bases and the step.

    parameters   over the replicas of what a rank holds: all ranks, or with shards the
                 ranks that hold the same shard; nothing where there are no replicas
    state        bases, and what else a compressor keeps alike on all workers (not the
                 error memory, nor EF21's y_i and v_i), over the workers
    step         over all ranks

The comparison sends 32 bytes a rank, before anything is averaged: a hash of each kind
(`numerics.hashing`), computed on the device, and the step. All ranks see all hashes, so
that all raise, or all take part in the copies, together. Only after a difference do
they gather a hash of each parameter, for the message.

Only bits are compared: on unlike processors, whose roundings differ, leave it off.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_comm.communication.agreement import options_of, raise_if_different
from lowrank_comm.errors import ConfigMismatchError, DivergenceError
from lowrank_comm.numerics.hashing import hash_of
from lowrank_comm.options import PositiveInt, check
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.state import CompressionState

_log = logging.getLogger("lowrank_comm")

OnDivergence = Literal["error", "resync"]

_PARAMETERS, _STATE = "parameters", "state"


@dataclass(frozen=True)
class Replicas:
    """What of the model and of the base optimizer other ranks hold, too.

    Attributes:
        parameters: name -> this rank's part of the parameter; {} where no other rank
            holds it.
        whole: whether the ranks of a node hold the same parts, too.
        groups: of the base.
        state: name -> the base's state of the parameter, to be copied with it.
        local: returns this rank's part of a tensor of that state.
        stale: this rank's parameters stand still, and are not compared: its data are
            exhausted before the others'.
    """

    parameters: Mapping[str, Tensor]
    whole: bool
    groups: Sequence[Mapping[str, Any]]
    state: Mapping[str, dict[str, Any]]
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor
    stale: bool = False


class DivergenceCheck:
    """Compares every K steps, and mends or raises.

    Args:
        every: K; counts calls of `step()`, vetoed ones included.
        on_divergence: "error" to raise; "resync" to copy parameters, the base's state
            of them, and bases from a rank of the majority.
        owner: stands before the names in messages.

    Attributes:
        steps: how many there were; whoever makes them counts.

    Raises:
        ConfigError: another value.
    """

    def __init__(self, every: int | None, on_divergence: str, owner: str) -> None:
        check(f"{owner}check_every", every, PositiveInt | None)
        check(f"{owner}on_divergence", on_divergence, OnDivergence, "error")
        self.every, self.on_divergence = every, on_divergence
        self.steps, self._compared_at = 0, -1

    @property
    def is_due(self) -> bool:
        """Whether the step that comes is a K-th one, and was not looked at yet."""
        due = self.every is not None and (self.steps + 1) % self.every == 0
        return due and self._compared_at != self.steps

    def describe(self) -> dict[str, Any]:
        """Return what must be equal on all workers."""
        return {"check_every": self.every, "on_divergence": self.on_divergence}

    @torch.no_grad()
    def run(self, reducer: Reducer, replicas: Replicas) -> None:
        """Compare, before anything of the step is averaged; a collective of all ranks.

        Args:
            reducer: whose state is compared; no pass is pending.
            replicas: of the parameters.

        Raises:
            DivergenceError: on all ranks, if some differ, unless they could be mended.
        """
        if reducer.workers.world_size > 1:
            comparison = _Comparison(reducer, replicas)
            if comparison.differing:
                comparison.explain(self.steps + 1, self.every)
                if self.on_divergence == "error":
                    comparison.refuse("")
                comparison.mend()
                if _Comparison(reducer, replicas).differing:
                    comparison.refuse("They differ still after they were copied")
                if reducer.workers.is_writer:
                    _log.warning("%s (on_divergence)", "; ".join(comparison.found))
        # not after an error: a step that is tried again is to fail again
        self._compared_at = self.steps


class _Comparison:
    """What the ranks hold, by hashes; made by all ranks together.

    Attributes:
        differing: (kind, ranks that should hold the same) where they do not.
        found: sentences about what differs.
    """

    def __init__(self, reducer: Reducer, replicas: Replicas) -> None:
        self._reducer, self._replicas = reducer, replicas
        self._workers = workers = reducer.workers
        device, self.found = reducer.device, [""]
        bases = [tensor for _, tensor in _shared_state(reducer.state)]
        numbers = torch.stack(
            [
                hash_of(replicas.parameters.values(), device),
                hash_of(bases, device),
                torch.tensor(reducer.step, device=device),
                torch.tensor(int(replicas.stale), device=device),
            ]
        )
        reducer.ledger.bytes["fingerprint"] += numbers.nbytes
        self._table = table = workers.all_gather_numbers(numbers)
        everyone = list(range(workers.world_size))
        size = workers.intra_node.size
        places = [everyone[place::size] for place in range(size)]
        self._ranks = {
            _PARAMETERS: [everyone] if replicas.whole else places,
            _STATE: places,
            "step": [everyone],
        }
        self._ranks[_PARAMETERS] = [
            [rank for rank in ranks if not table[rank][3]] for ranks in self._ranks[_PARAMETERS]
        ]
        self.differing = [
            (kind, ranks)
            for column, (kind, classes) in enumerate(self._ranks.items())
            for ranks in classes
            if len({table[rank][column] for rank in ranks}) > 1
        ]

    def explain(self, call: int, every: int | None) -> None:
        """Find out which parameters differ, on which ranks; a collective."""
        parameters, cpu = self._replicas.parameters.items(), torch.device("cpu")
        named = _by_name(self._reducer.state)
        mine = {
            "groups": options_of(self._replicas.groups),
            _PARAMETERS: {f"the parameter {n}": int(hash_of([t], cpu)) for n, t in parameters},
            _STATE: {what: int(hash_of([t], cpu)) for what, t in named},
            "step": {"the step": self._reducer.step},
        }
        told = [json.loads(text) for text in self._workers.all_gather_text(json.dumps(mine))]
        found = [
            f"{what} {_on_ranks({rank: told[rank][kind].get(what) for rank in ranks})}"
            for kind, ranks in self.differing
            for what in told[ranks[0]][kind]
            if len({told[rank][kind].get(what) for rank in ranks}) > 1
        ]
        more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
        self.found = [
            f"before call {call} of step() (check_every={every}), ranks differ that should hold the"
            f" same bits: {'; '.join([*found[:5], *more])}"
        ]
        try:
            raise_if_different([{"param_groups": one["groups"]} for one in told])
        except ConfigMismatchError as error:
            self.refuse(str(error).removeprefix("lowrank_comm: "))

    def refuse(self, why: str) -> None:
        """Raise, on all ranks."""
        raise DivergenceError(
            f"lowrank_comm: {'. '.join([*self.found, why] if why else self.found)}. Nothing of this"
            " step was averaged or applied. Look at what these ranks do differently (data that"
            " change the model, a random draw, memory errors) and go on from a checkpoint before"
            ' it; on_divergence="resync" copies from the majority where there is one.'
        )

    def mend(self) -> None:
        """Copy from a rank of the majority; a collective."""
        sources = {}
        for kind, ranks in self.differing:
            column = list(self._ranks).index(kind)
            (_, count), *_ = Counter(self._table[rank][column] for rank in ranks).most_common(1)
            if kind == "step" or 2 * count <= len(ranks):
                what = "The step cannot be copied" if kind == "step" else "No majority agrees"
                self.refuse(what)
            value = Counter(self._table[rank][column] for rank in ranks).most_common(1)[0][0]
            source = next(rank for rank in ranks if self._table[rank][column] == value)
            sources[kind, ranks[0]] = source
            self.found.append(f"{kind} of rank {source} go to the others")
        plain = self._plain_state()
        place = self._workers.intra_node.rank
        for (kind, first), source in sources.items():
            whole = kind == _PARAMETERS and self._replicas.whole
            if not whole and first % self._workers.intra_node.size != place:
                # other ranks of this node have a part of their own
                continue
            if kind == _STATE:
                bases = [tensor for _, tensor in _shared_state(self._reducer.state)]
                self._workers.copy_from(source, bases, whole)
                continue
            tensors = [*self._replicas.parameters.values(), *self._state_tensors().values()]
            self._workers.copy_from(source, tensors, whole)
            for what, value in plain[source].items():
                if not isinstance(value, dict):
                    name, _, key = what.rpartition("/")
                    self._replicas.state[name][key] = value

    def _state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": self._replicas.local(value)
            for name, entry in self._replicas.state.items()
            for key, value in sorted(entry.items())
            if isinstance(value, Tensor)
        }

    def _plain_state(self) -> list[dict[str, Any]]:
        """Return every rank's state of the base without the tensors, of which there are
        shapes and dtypes; a collective.

        Raises:
            DivergenceError: on all ranks, if that of some rank cannot be copied to
                another.
        """
        mine: dict[str, Any] = {}
        for name, entry in self._replicas.state.items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    value = self._replicas.local(value)
                    mine[f"{name}/{key}"] = {"": f"{tuple(value.shape)} {value.dtype}"}
                elif value is None or isinstance(value, bool | int | float | str):
                    mine[f"{name}/{key}"] = value
                else:
                    mine[f"{name}/{key}"] = {"": type(value).__name__, "unknown": True}
        told = [json.loads(text) for text in self._workers.all_gather_text(json.dumps(mine))]
        for kind, ranks in self.differing:
            for what, first in told[ranks[0]].items() if kind == _PARAMETERS else ():
                others = [told[rank].get(what) for rank in ranks]
                unknown = isinstance(first, dict) and (
                    "unknown" in first or others != [first] * len(others)
                )
                if unknown or any(told[rank].keys() != told[ranks[0]].keys() for rank in ranks):
                    self.refuse(f"The base's state {what} cannot be copied: {first}")
        return told


def _shared_state(state: CompressionState) -> Iterator[tuple[str, Tensor]]:
    """Yield symbol and tensor of what a compressor keeps alike on all workers, batch by
    batch.
    """
    for batch in state.batches:
        for symbol, tensor in sorted(batch.state.items()):
            if symbol not in batch.compressor.private:
                yield symbol, tensor


def _by_name(state: CompressionState) -> Iterator[tuple[str, Tensor]]:
    """Yield the same matrix by matrix, each with what it is called in messages."""
    for batch in state.batches:
        for row, name in enumerate(batch.names):
            for symbol, tensor in sorted(batch.state.items()):
                if symbol not in batch.compressor.private:
                    yield f"the state {symbol} of {name}", tensor[row]


def _on_ranks(values: Mapping[int, Any]) -> str:
    """Return which ranks hold another value than most, or which hold which."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    *few, most = sorted(ranks.values(), key=lambda of_one: (len(of_one), -of_one[0]))
    if 2 * len(most) > len(values):
        odd = sorted(rank for of_one in few for rank in of_one)
        return f"on rank {_listed(odd)} (not on {_listed(most)})"
    return " against ".join(f"on rank {_listed(of_one)}" for of_one in [most, *few[::-1]])


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown}, ... ({len(ranks)} ranks)" if len(ranks) > 8 else shown
