"""LLaMA's loss and its gradients for several workers in one pass.

A worker's gradient is that of its own batch. Computed one after another, the batches
of a small model are too small to keep a processor busy. Here all weights have a leading
dimension, one copy a worker (views of one memory), every product is a batched one, and
one backward pass leaves each worker's gradient in its own place. The result is that of
`transformers`' model up to round-off, which a test holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

Weights = Mapping[str, Tensor]
"""Parameter name -> (W, *shape)."""


class FastLlama:
    """The forward pass of a `LlamaForCausalLM` over weights of W workers.

    Args:
        model: whose parameters and configuration are used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.parameters = dict(model.named_parameters())
        self._angles: tuple[Tensor, Tensor] | None = None

    def gradients(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Compute each worker's loss and gradient.

        Args:
            ids: (W, B, T) token ids.

        Returns:
            Losses (W,), the mean over a worker's B (T - 1) next tokens; and for each
            worker parameter name -> gradient.
        """
        workers = len(ids)
        weights = {
            name: parameter.detach().expand(workers, *parameter.shape).requires_grad_()
            for name, parameter in self.parameters.items()
        }
        losses = self.losses(weights, ids)
        found = torch.autograd.grad(losses.sum(), list(weights.values()))
        named = dict(zip(weights, found, strict=True))
        each = [{name: grad[k] for name, grad in named.items()} for k in range(workers)]
        return losses.detach(), each

    @torch.no_grad()
    def held_out(self, blocks: Sequence[Tensor], batch: int) -> float:
        """Return the sum over blocks of one length of the mean loss of a token."""
        weights = {name: parameter.unsqueeze(0) for name, parameter in self.parameters.items()}
        device, total = next(iter(weights.values())).device, 0.0
        for start in range(0, len(blocks), batch):
            ids = torch.stack(list(blocks[start : start + batch])).to(device)
            total += self.losses(weights, ids.unsqueeze(0)).item() * len(ids)
        return total

    def losses(self, weights: Weights, ids: Tensor) -> Tensor:
        """Return each worker's mean loss of a next token, (W,).

        Args:
            weights: of W workers.
            ids: (W, B, T).
        """
        workers, batch, length = ids.shape
        width, eps = self.config.hidden_size, self.config.rms_norm_eps
        table = weights["model.embed_tokens.weight"]
        offsets = torch.arange(workers, device=ids.device).view(-1, 1, 1) * table.shape[1]
        x = F.embedding(ids + offsets, table.reshape(-1, width)).view(workers, -1, width)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (width,), None, eps) * weights[f"{name}.weight"].unsqueeze(1)

        def linear(x: Tensor, name: str) -> Tensor:
            return torch.bmm(x, weights[f"{name}.weight"].mT)

        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}"
            h = norm(x, f"{at}.input_layernorm")
            q, k, v = (
                linear(h, f"{at}.self_attn.{part}_proj")
                .view(workers * batch, length, self.config.num_attention_heads, -1)
                .transpose(1, 2)
                for part in "qkv"
            )
            mixed = F.scaled_dot_product_attention(
                self._rotated(q), self._rotated(k), v, is_causal=True
            )
            mixed = mixed.transpose(1, 2).reshape(workers, -1, width)
            x = x + linear(mixed, f"{at}.self_attn.o_proj")
            h = norm(x, f"{at}.post_attention_layernorm")
            gate = F.silu(linear(h, f"{at}.mlp.gate_proj"))
            x = x + linear(gate * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        x = norm(x, "model.norm").view(workers, batch, length, width)[:, :, :-1]
        head = table if self.config.tie_word_embeddings else weights["lm_head.weight"]
        logits = torch.bmm(x.reshape(workers, -1, width), head.mT)
        every = F.cross_entropy(
            logits.view(-1, logits.shape[-1]).float(), ids[:, :, 1:].reshape(-1), reduction="none"
        )
        return every.view(workers, -1).mean(dim=1)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (..., T, d) by their positions."""
        if self._angles is None or self._angles[0].shape[0] != x.shape[-2]:
            size = x.shape[-1]
            base = self.config.rope_parameters["rope_theta"]
            speeds = base ** -(torch.arange(0, size, 2, device=x.device).float() / size)
            angles = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), speeds)
            angles = torch.cat([angles, angles], dim=-1)
            self._angles = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cos, sin = self._angles
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin
