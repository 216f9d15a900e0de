"""A hash of the bits of tensors that sees where each number stands, computed on their
device.

The bits of every number are an integer b of at most 32 bits (a float64 is two of them).
A tensor is cut into rows of 2^16 integers, and

    row_k = sum over i of b_ki w_i,    hash = sum over k of row_k v_k    (mod 2^64)

with odd multipliers w_i, v_k that look random. One number that differs always changes
the hash, since |b - b'| < 2^32 times an odd number is not 0 mod 2^64; numbers that
changed places, or several that differ, change it but for one case in about 2^32.
Integer sums do not depend on their order, so that the hash is the same on a CPU and on
a GPU.

A multiplication and a sum for 2^16 numbers on a CPU, whose cache holds the product, and
for 2^22 elsewhere; tensors of fewer than 2^16 numbers are joined first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lowrank_comm.numerics.device import on_accelerator

_ROW = 1 << 16
_ROWS_TOGETHER = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def hash_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the hash of the bits of all tensors, in their order.

    Args:
        tensors: of any shape, strides and dtype; the hash is of their elements in
            row-major order, so that shapes must be compared otherwise.
        device: of the result.

    Returns:
        A number, (), int64, on the device; 0 of nothing.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> cpu = torch.device("cpu")
        >>> bool(hash_of([a], cpu) == hash_of([b], cpu))
        False
    """
    with torch.no_grad():
        rows = [_rows(piece).to(device) for piece in _pieces(tensors)]
        if not rows:
            return torch.zeros((), dtype=torch.int64, device=device)
        together = torch.cat(rows)
        return (together * _odd(torch.arange(1, len(together) + 1, device=device))).sum()


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the bits as vectors of integers; small ones of one dtype and device that
    follow each other are joined.
    """
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bits = _bits(tensor)
        if not bits.numel():
            continue
        kind = (bits.dtype, bits.device)
        if waiting and (size >= _ROW or kind != (waiting[0].dtype, waiting[0].device)):
            yield torch.cat(waiting)
            waiting, size = [], 0
        if bits.numel() >= _ROW:
            if waiting:
                yield torch.cat(waiting)
                waiting, size = [], 0
            yield bits
        else:
            waiting.append(bits)
            size += bits.numel()
    if waiting:
        yield torch.cat(waiting)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits as a vector of integers; a view of a contiguous tensor."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[min(flat.itemsize, 4)])


def _rows(bits: Tensor) -> Tensor:
    """Return row_k of a vector of integers, (rows,), int64."""
    weights = _weights(bits.device)
    whole = len(bits) // _ROW
    sums = []
    if whole:
        step = _ROWS_TOGETHER if on_accelerator(bits.device) else 1
        parts = bits[: whole * _ROW].view(whole, _ROW).split(step)
        sums += [(rows * weights).sum(dim=1) for rows in parts]
    rest = bits[whole * _ROW :]
    if len(rest):
        sums.append((rest * weights[: len(rest)]).sum().view(1))
    return torch.cat(sums)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    # other numbers than those of the rows
    return _odd(torch.arange(-_ROW, 0, device=device))


def _odd(numbers: Tensor) -> Tensor:
    """Return odd int64 that look random, one for each number: the finalizer of
    SplitMix64 (Steele, Lea, Flood 2014).
    """
    z = numbers * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) | 1


def _shifted(z: Tensor, by: int) -> Tensor:
    """Return z shifted to the right, with zeros from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
