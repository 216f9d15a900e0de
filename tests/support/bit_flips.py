"""Bits that flip on one rank, under every engine. Each function runs on every rank of a
gloo group.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_comm import CompressedOptimizer, DivergenceError
from tests.support.engine_cases import built
from tests.support.engines import Setup, loss_of, plain_names


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of it, the very memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def flip(tensor: Tensor, draws: random.Random) -> None:
    """One random bit of a contiguous tensor."""
    places = tensor.view(-1).view(torch.uint8)
    places[draws.randrange(len(places))] ^= 1 << draws.randrange(8)


def bases_of(optimizer: CompressedOptimizer) -> list[Tensor]:
    """All that a compressor keeps alike on all workers."""
    return [
        tensor
        for batch in optimizer.reducer.state.batches
        for symbol, tensor in sorted(batch.state.items())
        if symbol not in batch.compressor.private
    ]


def caught(rank: int, setup: Setup, what: str, world: int, trials: range) -> list[tuple[int, str]]:
    """For each trial: how many calls after the flip it was noticed, and what was told.

    The first call compares values by itself, so flips come later.
    """
    results = []
    every = setup.options["check_every"]
    for trial in trials:
        draws = random.Random(trial)
        when, culprit = draws.randrange(2, every + 2), draws.randrange(world)
        model, optimizer = built(setup)
        after, told = -1, "not noticed"
        try:
            for call in range(1, 2 * every + 1):
                if call == when and rank == culprit:
                    parameters = [held(p) for p in plain_names(model).values()]
                    tensors = parameters if what == "parameters" else bases_of(optimizer)
                    flip(draws.choice([t for t in tensors if t.numel()]), draws)
                loss_of(model, call, rank).backward()
                optimizer.step()
                optimizer.zero_grad()
        except DivergenceError as error:
            after, told = call - when, str(error)
        optimizer.detach()
        results.append((after, told.replace(f"rank {culprit}", "CULPRIT")))
    return results
