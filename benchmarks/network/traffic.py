"""What a step puts on a host's link, by what it hands to collectives: the model that
the kernel's counters are held against.

gloo, on N hosts, sends from each of them on average

    all-reduce        2 (N - 1) / N  times its payload, by a ring
    reduce-scatter    the same of the whole input: it all-reduces and keeps a part
    all-gather        N - 1          times what one host gives
    all-to-all        (N - 1) / N    times what one host gives
    broadcast         (N - 1) / N    times its payload
    reduce            (N - 1) (N + 1) / N^2

of which the library's ledger counts payloads of all-reduces, and what else it sends as
payload and surplus such that 2 (N - 1) / N times their sum is on the wire.

Around that, `HEADERS` of every byte (Ethernet, IP and TCP headers, 66 bytes of a packet
of some 16 to 64 kB, and as many of its acknowledgement) and `MESSAGE_BYTES` of every
message (gloo's three notes of 48 bytes with their headers and acknowledgements). These
two are the allowance; they were read off all-reduces of 4 kB to 20 MB.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HEADERS = 0.004
MESSAGE_BYTES = 400
ETH0 = Path("/sys/class/net/eth0/statistics")
# gloo cuts an all-reduce into segments of at most so many bytes
_SEGMENT = 2**20
# whose payloads the ledger counts
_COUNTED_BY_THE_LEDGER = "lowrank_comm/communication/group.py"


@dataclass
class Sent:
    """What one host sends on average: bytes without allowance, and messages."""

    payload: float = 0.0
    messages: float = 0.0

    def add(self, payload: float, messages: float) -> None:
        """Add a collective."""
        self.payload += payload
        self.messages += messages

    def on_the_wire(self) -> float:
        """Return the bytes with the allowance for headers and notes."""
        return self.payload * (1 + HEADERS) + self.messages * MESSAGE_BYTES


def ring(payload: float, hosts: int) -> float:
    """Return what an all-reduce of so many bytes sends from each host."""
    return 2 * (hosts - 1) / hosts * payload


Model = Callable[[list[Tensor], int], Sent]


def _all_reduce(tensors: list[Tensor], hosts: int) -> Sent:
    sent = Sent()
    for tensor in tensors:
        segments = max(math.ceil(tensor.nbytes / _SEGMENT / hosts), 2)
        sent.add(ring(tensor.nbytes, hosts), 2 * (hosts - 1) * segments)
    return sent


def _of(share: Callable[[int], float], messages: Callable[[int], float]) -> Model:
    """Return the model of a collective that sends, of its payload and of messages, so
    much from each of N hosts.
    """

    def model(tensors: list[Tensor], hosts: int) -> Sent:
        payload = sum(tensor.nbytes for tensor in tensors)
        return Sent(share(hosts) * payload, messages(hosts) * len(tensors))

    return model


_ALL_GATHER = _of(lambda n: n - 1, lambda n: 2 * (n - 1))
# Operation of torch's dispatcher -> (which argument is sent, what that puts on a link).
_MODELS: dict[str, tuple[int, Model]] = {
    "allreduce_": (0, _all_reduce),
    "allreduce_coalesced_": (0, _all_reduce),
    "_reduce_scatter_base_": (1, _all_reduce),
    "allgather_": (1, _ALL_GATHER),
    "_allgather_base_": (1, _ALL_GATHER),
    "alltoall_base_": (1, _of(lambda n: (n - 1) / n, lambda n: n - 1)),
    "broadcast_": (0, _of(lambda n: (n - 1) / n, lambda n: (n - 1) / n)),
    "reduce_": (0, _of(lambda n: (n - 1) * (n + 1) / n**2, lambda n: (n - 1) * (2 + 1 / n))),
}


@dataclass
class Counts:
    """The collectives of some steps: those of the library's reducer, and all others (an
    engine's, a peer's).
    """

    ours: Sent = field(default_factory=Sent)
    others: Sent = field(default_factory=Sent)


@contextmanager
def counted(counts: Counts) -> Iterator[None]:
    """Count the collectives that run inside.

    Raises:
        KeyError: a collective without a model.
    """
    here, all_reduce = threading.get_ident(), dist.all_reduce

    def in_every_thread(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            return all_reduce(*args, **kwargs)
        # powerSGD_hook goes on in gloo's threads, and a mode is its thread's own
        with _Mode(counts):
            return all_reduce(*args, **kwargs)

    dist.all_reduce = in_every_thread
    try:
        with _Mode(counts):
            yield
    finally:
        dist.all_reduce = all_reduce


class _Mode(TorchDispatchMode):
    """Sees the operations of torch.distributed that this thread begins."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation.namespace == "c10d":
            self._enter(operation._opname, args)
        return operation(*args, **(kwargs or {}))

    def _enter(self, name: str, args: Any) -> None:
        position, model = _MODELS[name]
        given = args[position]
        sent = model(given if isinstance(given, list) else [given], _group_size(args))
        whose = self._counts.ours if _in_the_reducer() else self._counts.others
        whose.add(sent.payload, sent.messages)


def _group_size(args: Any) -> int:
    for argument in args:
        try:
            return dist.ProcessGroup.unbox(argument).size()
        except (RuntimeError, TypeError):
            continue
    raise TypeError(f"a collective without a process group: {args}")


def _in_the_reducer() -> bool:
    """Return whether a frame of the call is of the file that the ledger counts for."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COUNTED_BY_THE_LEDGER):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def interface_bytes() -> tuple[int, int]:
    """Return the bytes that this host has sent and received, by the kernel."""
    return tuple(int((ETH0 / f"{way}_bytes").read_text()) for way in ("tx", "rx"))  # type: ignore[return-value]
