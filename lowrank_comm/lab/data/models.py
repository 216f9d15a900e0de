"""The models of the lab and the examples: LLaMAs with random weights, by the name of
their size.

S, M and L are for CPUs (1.05M, 5.27M and 12.2M parameters, embeddings tied); 60M and
130M are the shapes of the papers' pre-training experiments (58M and 134M parameters
with a vocabulary of 32 000, embeddings not tied).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowrank_comm.errors import ConfigError


def _llama(
    hidden: int, layers: int, intermediate: int, heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """Return the keyword arguments of `LlamaConfig` for one size."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


LlamaSize = Literal["S", "M", "L", "60M", "130M"]
LLAMAS: dict[str, dict[str, Any]] = {
    "S": _llama(128, 4, 344, 4, 2048, tied=True),
    "M": _llama(256, 6, 688, 4, 2048, tied=True),
    "L": _llama(384, 6, 1024, 6, 4096, tied=True),
    "60M": _llama(512, 8, 1376, 8, 32_000, tied=False),
    "130M": _llama(768, 12, 2048, 12, 32_000, tied=False),
}


def new_llama(
    size: str, vocabulary: int, sequence_length: int, token: int | None = None
) -> PreTrainedModel:
    """Return a LLaMA with random weights drawn from torch's random state.

    Args:
        size: a name in `LLAMAS`.
        vocabulary: number of tokens; that of `LLAMAS` is what the size is meant for.
        sequence_length: the most tokens of a sequence.
        token: begins, ends and pads texts; None for none.

    Raises:
        ConfigError: the size is unknown.
    """
    if size not in LLAMAS:
        raise ConfigError(f"model={size!r} is unknown; use one of {', '.join(LLAMAS)}.")
    config = LlamaConfig(
        **LLAMAS[size] | {"vocab_size": vocabulary},
        max_position_embeddings=max(256, sequence_length),
        use_cache=False,
        bos_token_id=token,
        eos_token_id=token,
        pad_token_id=token,
    )
    return LlamaForCausalLM(config)


@contextmanager
def random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's random state inside the block and restore it afterwards.

    Args:
        seed: of the state.
        device: a GPU whose state is restored too.
    """
    with torch.random.fork_rng([] if device is None or device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield
