"""Requests inside a node: what its ranks exchange among themselves on the way to a
packet and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.communication.flat_buffers import FlatBuffers
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.compressors.requests import (
    ComputeOnce,
    Decide,
    Gather,
    Mean,
    Read,
    SumOverRows,
    WholeRows,
)
from lowrank_comm.numerics.quantization import FORMATS, Format, Quantization

_AtOnce = Decide | Read | SumOverRows | WholeRows


_OnTheWire = Mean | ComputeOnce | Gather


@dataclass
class _Asked:
    """A request on its way into a packet: what of it this rank carries, and what
    completes the answer.
    """

    request: _OnTheWire
    tensor: Tensor
    averaged: bool
    # this worker's sum over rows, of which `tensor` is this rank's share
    whole: Tensor | None = None

    def put_into(self, packet: FlatBuffers, quantization: Quantization) -> int:
        """Put it into a packet; returns its number there."""
        if isinstance(self.request, Gather):
            return packet.add_to_gather(self.tensor, self.request.kind)
        format: Format | None = None
        if isinstance(self.request, Mean):
            format = (
                FORMATS[self.request.codes]
                if self.request.codes
                else quantization.format_of(self.request.kind)
            )
        return packet.add(self.tensor, self.request.kind, self.averaged, format)


class IntraNodeRequests:
    """What happens inside a node on the way to a packet and back; with one rank in the
    node, next to nothing.
    """

    def __init__(self, intra_node: IntraNodeGroup, workers: int, rank: int) -> None:
        self.intra_node = intra_node
        self._ranks = workers * intra_node.size
        self._rank = rank * intra_node.size + intra_node.rank

    def answer(self, requests: dict[int, _AtOnce]) -> dict[int, Tensor]:
        """Sums over rows, all in one collective; and whole rows."""
        sums = {
            k: request.tensor for k, request in requests.items() if isinstance(request, SumOverRows)
        }
        by_dtype: dict[torch.dtype, list[int]] = {}
        for k, tensor in sums.items():
            by_dtype.setdefault(tensor.dtype, []).append(k)
        answers: dict[int, Tensor] = {}
        for members in by_dtype.values():
            answers.update(
                zip(
                    members,
                    self.intra_node.sum_in_order([sums[k] for k in members], "sums"),
                    strict=True,
                )
            )
        for k, request in requests.items():
            if isinstance(request, WholeRows):
                answers[k] = self.intra_node.whole_rows(request.tensor, request.m, "rows")
        return answers

    def prepare(self, asking: dict[int, _OnTheWire]) -> dict[int, _Asked]:
        """This rank's share of each request. What is computed once goes round the
        ranks, matrix by matrix.
        """
        asked, offset = {}, 0
        over_rows = {
            k: r.tensor
            for k, r in asking.items()
            if isinstance(r, Mean) and r.over_rows and self.intra_node.size > 1
        }
        own = dict(zip(over_rows, self._summed(list(over_rows.values())), strict=True))
        for k, request in asking.items():
            if isinstance(request, ComputeOnce):
                asked[k] = _Asked(request, self._compute(request, offset), averaged=False)
                offset += request.matrices.shape[0]
            elif k in own:
                asked[k] = _Asked(
                    request,
                    own[k].reshape(-1)[self._share(own[k].numel())],
                    averaged=True,
                    whole=own[k],
                )
            else:
                asked[k] = _Asked(request, request.tensor, averaged=isinstance(request, Mean))
        return asked

    def complete(
        self, asked: dict[int, _Asked], answers: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[int, object]:
        """The compressors' answers from the packet's."""
        whole: dict[int, object] = {}
        for k, one in asked.items():
            mean, own = answers[k]
            if isinstance(one.request, ComputeOnce | Gather):
                whole[k] = mean
            elif one.whole is None:
                whole[k] = (mean, own)
            else:
                # unless rounded
                as_sent = one.whole if own is one.tensor else self._put_together(own, one.whole)
                whole[k] = (self._put_together(mean, one.whole), as_sent)
        return whole

    def _summed(self, parts: list[Tensor]) -> list[Tensor]:
        """Sums over the node of tensors of one dtype; this worker's own, so no other
        node need have the same bits.
        """
        if not parts:
            return []
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.intra_node.sum_([flat], "sums")
        return [
            piece.view(part.shape)
            for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]

    def _share(self, numel: int) -> slice:
        """The part of a sum over rows that this rank carries between the nodes."""
        return self.intra_node.block(numel)

    def _put_together(self, share: Tensor, like: Tensor) -> Tensor:
        """The whole from the shares of all ranks of the node."""
        column = share.reshape(1, -1, 1)
        return self.intra_node.whole_rows(column, like.numel(), "shares").reshape(like.shape)

    def _compute(self, request: ComputeOnce, offset: int) -> Tensor:
        """(B, own rows, k), zero where another worker computes. Each rank keeps the
        whole matrices of its share only.
        """
        count, rows, _ = request.matrices.shape
        mine = [index for index in range(count) if (offset + index) % self._ranks == self._rank]
        if self.intra_node.size == 1:
            parts = request.matrices.new_zeros(count, rows, request.columns)
            if mine:
                parts[mine] = request.of(request.matrices[mine], mine)
            return parts
        kept = []
        for index in range(count):
            matrix = self.intra_node.whole_rows(
                request.matrices[index : index + 1], request.m, "rows"
            )
            if index in mine:
                kept.append(matrix)
        whole = request.matrices.new_zeros(count, request.m, request.columns)
        if kept:
            whole[mine] = request.of(torch.cat(kept), mine)
        self.intra_node.sum_([whole], "rows")
        return whole[:, self.intra_node.block(request.m)]
