"""PermK and its grouped form, the downlink's compressor: the workers get blocks of one
permutation, which together make up v.

The coordinates are permuted and cut into G blocks, and each worker gets one block of
the vector, scaled up. G = n is PermK, G = 1 a dense broadcast. Three things keep Q_i
unbiased for every worker, and the mean of all Q_i equal to v, always:

- A new permutation is drawn every step. (If it were fixed, a worker would never get
  the other coordinates.)
- Where G does not divide d, some blocks are longer by one. A group's block is therefore
  number (group + shift) mod G, with a random shift: a group that always had a longer
  block would get more than its share in the mean.
- Where G does not divide n, c_b workers share block b, its scale is n/c_b, and the
  workers are permuted over the groups every step. Where G divides n, who is in which
  group never changes, so that groups may be process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.numerics.randomness import stream


@dataclass(frozen=True)
class Blocks:
    """One draw of PermK(G).

    Attributes:
        permutation: of the d coordinates, int64 on the CPU.
        group: worker -> its group, (n,) int64.
        scale: worker -> n/c_b, (n,) float64.
        shift: a group's block is number (group + shift) mod G.
        count: G.
    """

    permutation: Tensor
    group: Tensor
    scale: Tensor
    shift: int
    count: int

    def length(self) -> int:
        """Return the length of the longest block, which is what the busiest link
        carries.
        """
        return -(-len(self.permutation) // self.count)

    def coordinates(self, group: int) -> Tensor:
        """Return the coordinates of a group's block, int64 on the CPU."""
        number = (group + self.shift) % self.count
        size, longer = divmod(len(self.permutation), self.count)
        start = number * size + min(number, longer)
        return self.permutation[start : start + size + (number < longer)]

    def place(self, values: Tensor, worker: int) -> Tensor:
        """Return Q_i(v), (d,), from v on the block of worker i's group."""
        there = self.coordinates(int(self.group[worker])).to(values.device)
        return values.new_zeros(len(self.permutation)).index_copy_(
            0, there, values * float(self.scale[worker])
        )

    def restrict(self, vector: Tensor, workers: Sequence[int]) -> Tensor:
        """Return Q_i(vector) of several workers at once: (d,) -> (W, d)."""
        size, longer = divmod(len(self.permutation), self.count)
        lengths = torch.full((self.count,), size, device="cpu")
        lengths[:longer] += 1
        owner = torch.empty_like(self.permutation)
        groups = (torch.arange(self.count, device="cpu") - self.shift).remainder(self.count)
        owner[self.permutation] = groups.repeat_interleave(lengths)
        rows, scale = self.group, self.scale
        if len(workers) < len(rows):
            rows, scale = rows[list(workers)], scale[list(workers)]
        mask = (owner == rows[:, None]).to(device=vector.device, dtype=vector.dtype)
        return mask.mul_(scale[:, None].to(mask)).mul_(vector)


@dataclass(frozen=True)
class PermK:
    """Correlated sparsification for n workers.

    Q_i(v) = (n/c_b) v on the block of i's group, 0 elsewhere
    E Q_i(v) = v;  (1/n) sum of Q_i(v) = v
    E ||Q_i(v) - v||^2 = omega ||v||^2;  omega = (1/G) sum_b n/c_b - 1

    omega is G - 1 where G divides n.

    Args:
        groups: G, from 1 to n.

    Example:
        >>> import torch
        >>> blocks = PermK(2).draw(seed=0, t=0, n=4, d=6)
        >>> blocks.restrict(torch.ones(6), range(4)).mean(dim=0).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: PermK of arXiv 2110.03300; the grouped form is ours.
    """

    groups: int

    def omega(self, n: int) -> float:
        """Return the variance of Q_i relative to ||v||^2."""
        sizes = [len(range(b, n, self.groups)) for b in range(self.groups)]
        return sum(n / c for c in sizes) / self.groups - 1.0

    def draw(self, seed: int, t: int, n: int, d: int) -> Blocks:
        """Draw the blocks of step t, for n workers and d coordinates."""
        permutation = torch.randperm(
            d, generator=stream(seed, "bidirectional", t, "PermK coordinates"), device="cpu"
        )
        numbers = stream(seed, "bidirectional", t, "PermK workers")
        shift = int(torch.randint(self.groups, (), generator=numbers, device="cpu"))
        in_order = torch.arange(n, device="cpu")
        fixed = n % self.groups == 0
        places = in_order if fixed else torch.randperm(n, generator=numbers, device="cpu")
        group = places % self.groups
        sizes = torch.bincount(group, minlength=self.groups)
        return Blocks(permutation, group, (n / sizes.double())[group], shift, self.groups)
