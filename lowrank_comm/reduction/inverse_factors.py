"""Gram matrices of all batches, factorised together.

A factorisation of r x r matrices is some twenty small operations, whether of one matrix
or of hundreds. Compressors that orthonormalise ask for it at the same time, since all
batches of a pass are in one phase; what they give is joined, factorised once, and cut
up again. A matrix gets the factor that it would get alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowrank_comm.compressors.requests import InverseFactor, Request
from lowrank_comm.numerics.linalg import inverse_factor


def inverse_factors(requests: Mapping[int, Request]) -> dict[int, object]:
    """Answer the requests for factors of Gram matrices; others are left out.

    Args:
        requests: by generator.

    Returns:
        (W, pivot) by generator; see `numerics.linalg.inverse_factor`.
    """
    alike: dict[tuple[object, ...], dict[int, InverseFactor]] = {}
    for k, one in requests.items():
        if isinstance(one, InverseFactor):
            kind = (*one.gram.shape[1:], one.gram.dtype, one.gram.device, one.dtype)
            alike.setdefault((*kind, one.pivot is None), {})[k] = one
    answers: dict[int, object] = {}
    for asked in alike.values():
        ones = list(asked.values())
        lengths = [len(one.gram) for one in ones]
        like = ones[0].gram
        grams = like.new_empty((sum(lengths), *like.shape[1:]), dtype=torch.float64)
        torch.cat([one.gram for one in ones], out=grams)
        before = [one.pivot for one in ones if one.pivot is not None]
        pivot = torch.cat(before) if before else None
        factors, pivots = inverse_factor(grams, ones[0].dtype, pivot)
        parts = zip(factors.split(lengths), pivots.split(lengths), strict=True)
        answers.update(zip(asked, parts, strict=True))
    return answers
