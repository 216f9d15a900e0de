"""1-bit Adam: Adam for some steps, then its second moment is frozen and momenta are
averaged as signs.

Source: Tang et al., "1-bit Adam", arXiv 2102.02888, and DeepSpeed's code
(`runtime/fp16/onebit/adam.py`, `runtime/comm/nccl.py`). In the first `freeze_step`
steps gradients are averaged uncompressed and AdamW steps. From then on, with m common
to all, each worker i:

    m_i   = beta1 m + (1 - beta1) g_i
    c_i   = C(m_i + d_i),    d_i <- m_i + d_i - c_i
    m     = C(mean of c_i + s),    s <- what that leaves, each worker has its share
    X    <- X - eta m / (sqrt(v) + eps)

C(x) = ||x|| / sqrt(d) sign(x), of a parameter for workers, of a worker's share of it
for s. DeepSpeed leaves out the bias corrections; here both moments keep AdamW's, that
of v as it was when it was frozen, so that the first phase is AdamW.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.lab.training.bases import Base

BETA1, EPS = 0.9, 1e-8


class OneBitAdamSettings(LabSettings):
    """1-bit Adam's numbers.

    Attributes:
        freeze_step: steps of Adam before.
    """

    kind: Literal["one_bit_adam"]
    freeze_step: int = Field(ge=1)


class GivenMomentum(Optimizer):
    """Steps by a momentum and a second moment that are handed to it.

    Attributes:
        second: parameter -> v without bias.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float) -> None:
        super().__init__(list(parameters), {"lr": rate})
        self.second: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                scale = self.second[parameter].sqrt().add_(EPS)
                parameter.addcdiv_(parameter.grad, scale, value=-group["lr"])


class OneBitAdam:
    """1-bit Adam for N workers; see `training.workers.Peer`. What it averages is the
    momentum without bias.
    """

    # what is compressed is a momentum, whose length is not that of a gradient
    clip = False

    def __init__(
        self,
        settings: OneBitAdamSettings,
        parameters: Mapping[str, Tensor],
        workers: int,
        base: Base,
    ) -> None:
        self._settings, self._parameters, self._beta2 = settings, dict(parameters), base.beta2
        self._m = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self._v = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self._errors = [
            {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
            for _ in range(workers)
        ]
        self._server = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self._step = 0
        self.optimizer = GivenMomentum(list(parameters.values()), base.rate)
        self.sent: Counter[str] = Counter()

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        self._step += 1
        warm = self._step <= self._settings.freeze_step
        means = {}
        for name, m in self._m.items():
            given = [each[name] for each in gradients]
            if warm:
                self._warm(name, torch.stack(given).mean(0))
            else:
                self._compressed(name, given)
            means[name] = m / (1 - BETA1**self._step)
        return means

    def _warm(self, name: str, mean: Tensor) -> None:
        self._m[name].mul_(BETA1).add_(mean, alpha=1 - BETA1)
        v = self._v[name].mul_(self._beta2).addcmul_(mean, mean, value=1 - self._beta2)
        unbiased = v / (1 - self._beta2**self._step)
        self.optimizer.second[self._parameters[name]] = unbiased
        self.sent["dense"] += 4 * mean.numel()

    def _compressed(self, name: str, gradients: Sequence[Tensor]) -> None:
        total = torch.zeros_like(gradients[0])
        for own, gradient in zip(self._errors, gradients, strict=True):
            wanted = BETA1 * self._m[name] + (1 - BETA1) * gradient + own[name]
            code = signs(wanted)
            own[name] = wanted - code
            total += code
        mean = (total / len(gradients) + self._server[name]).view(-1)
        # each worker rounds its share
        shares = torch.cat([signs(share) for share in mean.chunk(len(gradients))])
        self._server[name] = (mean - shares).view_as(total)
        self._m[name].copy_(shares.view_as(total))
        self.sent["signs"] += -(-total.numel() // 8) + 4


def signs(x: Tensor) -> Tensor:
    """Return ||x|| / sqrt(d) with the signs of x; zero counts as positive."""
    scale = x.norm() / x.numel() ** 0.5
    return torch.where(x >= 0, scale, -scale)
