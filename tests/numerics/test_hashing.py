"""A hash of bits sees every difference, wherever it is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowrank_comm.numerics.hashing import hash_of

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def hashed(tensors: Sequence[Tensor]) -> int:
    return int(hash_of(tensors, CPU))


def by_definition(words: list[int]) -> int:
    """The sums of the module's text in Python's integers, of one tensor of words."""
    mask = (1 << 64) - 1

    def odd(number: int) -> int:
        z = number * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31 | 1

    size = 1 << 16
    total = 0
    for k, start in enumerate(range(0, len(words), size)):
        row = sum(b * odd(i - size) for i, b in enumerate(words[start : start + size]))
        total += row * odd(k + 1)
    total &= mask
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("size", [1, 1000, (1 << 16) + 3])
def test_the_hash_is_what_its_formula_says(size: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert hashed([numbers]) == by_definition(numbers.view(torch.int32).tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_bit_and_exchanged_numbers_change_the_hash(dtype: torch.dtype) -> None:
    draws = random.Random(0)
    sizes = (3, 70_000, 0, 41, 140_000)
    tensors = [
        torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype) for n in sizes
    ]
    before = hashed(tensors)
    for _ in range(50):
        chosen = tensors[draws.choice([0, 1, 3, 4])].view(torch.uint8)
        place, bit = draws.randrange(len(chosen)), 1 << draws.randrange(8)
        chosen[place] ^= bit
        assert hashed(tensors) != before
        chosen[place] ^= bit
        one, other = (draws.randrange(len(chosen)) for _ in range(2))
        swapped = chosen.clone()
        swapped[one], swapped[other] = chosen[other], chosen[one]
        if not torch.equal(swapped, chosen):
            kept = chosen.clone()
            chosen.copy_(swapped)
            assert hashed(tensors) != before
            chosen.copy_(kept)
    assert hashed(tensors) == before


def test_structured_changes_change_the_hash() -> None:
    """Those which a plain sum, or one with weights 1, 2, 3, ..., does not see."""
    for dtype in (torch.float64, torch.float32):
        a = torch.randn(4, 300, dtype=dtype, generator=torch.Generator().manual_seed(1))
        others = [a.flip(0), a.flip(1), a.roll(1), -a, a[:, torch.randperm(300)]]
        signs = a.clone()
        signs[0, :2] *= -1
        second = a.clone().view(torch.int32)
        second[0, 0] += 1
        second[0, 2] -= 2
        second[0, 4] += 1
        seen = [hashed([x]) for x in (a, signs, second, *others)]
        assert len(set(seen)) == len(seen)


def test_the_hash_is_of_the_elements_however_they_lie_in_memory() -> None:
    a = torch.randn(30, 50)
    assert hashed([a.t().contiguous().t()]) == hashed([a])
    assert hashed([torch.randn(7, 3)[:0], a[:, ::2]]) == hashed([a[:, ::2].clone()])
    assert hashed([torch.ones(()).expand(9)]) == hashed([torch.ones(9)])
    assert hashed([]) == 0
    flags = torch.tensor([True, False, False])
    assert hashed([flags]) != hashed([flags.roll(1)])
    z = torch.randn(5, dtype=torch.complex128)
    assert hashed([z]) != hashed([z.conj().resolve_conj()])
