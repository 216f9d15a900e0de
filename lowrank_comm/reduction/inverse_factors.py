"""Gram matrices of all batches, factorised together.

A factorisation of r x r matrices is some twenty small operations, whether of one matrix
or of hundreds. Compressors that orthonormalise ask for it at the same time, since all
batches of a pass are in one phase; what they give is joined, factorised once, and cut
up again. A matrix gets the factor that it would get alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_comm.compressors.requests import InverseFactor, Request
from lowrank_comm.numerics.linalg import inverse_factor

# dtype of the factor, r, dtype and device of the Gram matrix, whether a first pass
_Kind = tuple[torch.dtype, int, torch.dtype, torch.device, bool]


def inverse_factors(requests: Mapping[int, Request]) -> dict[int, object]:
    """Answer the requests for factors of Gram matrices; others are left out.

    Args:
        requests: by generator.

    Returns:
        (W, pivot) by generator; see `numerics.linalg.inverse_factor`.
    """
    alike: dict[_Kind, tuple[list[int], list[Tensor], list[Tensor]]] = {}
    for k, one in requests.items():
        if isinstance(one, InverseFactor):
            gram = one.gram
            kind = (one.dtype, gram.shape[-1], gram.dtype, gram.device, one.pivot is None)
            asked, grams, pivots = alike.setdefault(kind, ([], [], []))
            asked.append(k)
            grams.append(gram)
            if one.pivot is not None:
                pivots.append(one.pivot)
    answers: dict[int, object] = {}
    for (dtype, r, *_), (asked, grams, pivots) in alike.items():
        lengths = list(map(len, grams))
        together = grams[0].new_empty((sum(lengths), r, r), dtype=torch.float64)
        torch.cat(grams, out=together)
        before = torch.cat(pivots) if pivots else None
        factors, pivot = inverse_factor(together, dtype, before)
        parts = zip(factors.split(lengths), pivot.split(lengths), strict=True)
        answers.update(zip(asked, parts, strict=True))
    return answers
