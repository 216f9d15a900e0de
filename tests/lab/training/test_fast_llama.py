"""The fast forward pass against transformers' model, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_comm.lab.training.fast_llama import FastLlama


@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_of_workers_are_those_of_the_model(tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=24, num_hidden_layers=2, intermediate_size=40, num_attention_heads=2,
        vocab_size=50, tie_word_embeddings=tied, max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        ids = torch.randint(50, (3, 2, 9))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    fast = FastLlama(model)
    losses, found = fast.gradients(ids)
    for worker in range(3):
        model.zero_grad()
        loss = model(input_ids=ids[worker], labels=ids[worker]).loss
        loss.backward()
        assert losses[worker].item() == pytest.approx(loss.item(), rel=1e-6)
        assert set(found[worker]) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(found[worker][name], parameter.grad, rtol=1e-6, atol=1e-7), name
    blocks = list(ids.reshape(6, 9))
    with torch.no_grad():
        whole = model(input_ids=ids.reshape(6, 9), labels=ids.reshape(6, 9)).loss
    assert fast.held_out(blocks, 4) / 6 == pytest.approx(whole.item(), rel=1e-6)
