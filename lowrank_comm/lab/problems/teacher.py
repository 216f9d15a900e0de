"""A small problem on which methods differ: a two-layer network that learns from a noisy
teacher, by N workers whose data differ.

Student and teacher: y = W2 tanh(W1 x), the teacher's outputs with Gaussian noise.
Inputs of worker i are Gaussian around a centre of its own (`heterogeneity`), so that
the workers' gradients differ even with many samples. Momentum SGD in the form v = mu v
+ (1 - mu) g, W = W - eta v, whose step does not grow with mu. The result is the
held-out loss without noise, over inputs of all workers, averaged over the last tenth of
the steps.

Many copies (seeds x learning rates) are trained in one batch of matrices, each with its
own names, data and start; the result is that of training them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lowrank_comm.lab.experiment import LabSettings, Progress
from lowrank_comm.lab.training.averaging import Averager, Crew
from lowrank_comm.numerics.randomness import stream

DIVERGED = 1e3
"""Held-out loss from which a copy counts as diverged and is trained no further."""


class TeacherProblem(LabSettings):
    """Sizes of the problem; see the top of this file.

    Attributes:
        batch: samples of a worker and step.
    """

    inputs: int = 24
    hidden: int = 32
    outputs: int = 16
    workers: int = 4
    batch: int = 16
    noise: float = 0.5
    heterogeneity: float = 1.0
    momentum: float = 0.9
    steps: int = Field(default=400, ge=20)
    held_out: int = 256


class Copies:
    """Copies of the student, one for each pair of a seed and a learning rate.

    Args:
        problem: sizes.
        pairs: (seed, learning rate).
    """

    def __init__(self, problem: TeacherProblem, pairs: Sequence[tuple[int, float]]) -> None:
        p = self._problem = problem
        self._seeds = sorted({seed for seed, _ in pairs})
        self._data_of = [self._seeds.index(seed) for seed, _ in pairs]
        self.rates = torch.tensor([rate for _, rate in pairs], dtype=torch.float64)[:, None, None]
        shapes = {"W1": (p.hidden, p.inputs), "W2": (p.outputs, p.hidden)}
        self._teacher = {
            name: self._drawn("teacher " + name, shape, shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        start = {
            name: self._drawn("start " + name, shape, 0.5 * shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        self.weights = {name: drawn[self._data_of] for name, drawn in start.items()}
        self.velocity = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self._centres = [
            p.heterogeneity * self._drawn(f"centre {i}", (1, p.inputs), 1.0)
            for i in range(p.workers)
        ]
        self._held_out = torch.cat(
            [self._inputs(i, -1, p.held_out // p.workers) for i in range(p.workers)], dim=1
        )
        self._targets = self._taught(self._held_out)
        self.alive = torch.ones(len(pairs), dtype=torch.bool)
        self.names = {
            name: [f"{name} of seed {seed}, rate {rate:g}" for seed, rate in pairs]
            for name in shapes
        }
        self.shapes = {one: shapes[name] for name, ones in self.names.items() for one in ones}

    def gradients(self, worker: int, t: int) -> dict[str, Tensor]:
        """Return a worker's gradient at step t, by parameter name; zero for a copy that
        has diverged.
        """
        p = self._problem
        x = self._inputs(worker, t, p.batch)
        noise = p.noise * self._drawn(f"noise of worker {worker}", (p.batch, p.outputs), 1.0, t)
        x, y = x[self._data_of], (self._taught(x) + noise)[self._data_of]
        hidden = torch.tanh(x @ self.weights["W1"].mT)
        residual = (hidden @ self.weights["W2"].mT - y) / p.batch
        back = (residual @ self.weights["W2"]) * (1 - hidden**2)
        both = {"W1": back.mT @ x, "W2": residual.mT @ hidden}
        living = {
            name: torch.where(self.alive[:, None, None], gradient, 0.0)
            for name, gradient in both.items()
        }
        return {
            one: gradient[k]
            for name, gradient in living.items()
            for k, one in enumerate(self.names[name])
        }

    def step(self, applied: Mapping[str, Tensor], momentum: float) -> None:
        """Update v = mu v + (1 - mu) g, W = W - eta v."""
        for name, ones in self.names.items():
            mean = torch.stack([applied[one] for one in ones])
            self.velocity[name] = momentum * self.velocity[name] + (1 - momentum) * mean
            self.weights[name] = (
                self.weights[name] - self.rates * self.velocity[name] * self.alive[:, None, None]
            )

    def losses(self) -> Tensor:
        """Return every copy's held-out loss, 0.5 ||y - y*||^2 a sample; infinite once
        it has diverged.
        """
        predicted = (
            torch.tanh(self._held_out[self._data_of] @ self.weights["W1"].mT)
            @ self.weights["W2"].mT
        )
        losses = 0.5 * (predicted - self._targets[self._data_of]).square().sum(dim=2).mean(dim=1)
        self.alive &= losses < DIVERGED
        return torch.where(self.alive, losses, torch.inf)

    def _drawn(self, purpose: str, shape: tuple[int, ...], scale: float, t: int = -1) -> Tensor:
        """Draw (seeds, *shape) from (seed, t, purpose)."""
        draws = [
            torch.randn(shape, generator=stream(seed, "teacher", t, purpose), dtype=torch.float64)
            for seed in self._seeds
        ]
        return scale * torch.stack(draws)

    def _inputs(self, worker: int, t: int, count: int) -> Tensor:
        return self._centres[worker] + self._drawn(
            f"inputs of worker {worker}", (count, self._problem.inputs), 1.0, t
        )

    def _taught(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self._teacher["W1"].mT) @ self._teacher["W2"].mT


def train(
    problem: TeacherProblem,
    section: Mapping[str, Any],
    pairs: Sequence[tuple[int, float]],
    momentum: float,
    progress: Progress,
) -> dict[str, Any]:
    """Train copies together.

    Args:
        problem: sizes.
        section: the compressor, as in a configuration file.
        pairs: (seed, learning rate) of each copy.
        momentum: mu of the base optimizer.
        progress: called with the share that is done.

    Returns:
        "final": loss by copy over the last tenth of the steps; "curve": (step, losses
        by copy); "elements": sent by a worker per copy and step; "peak_elements": the
        most in one step after the first.
    """
    copies = Copies(problem, pairs)
    averager = Crew(problem.workers).averager(section, copies.shapes)
    last_tenth, every = problem.steps - problem.steps // 10, max(1, problem.steps // 40)
    finals: list[Tensor] = []
    curve: list[tuple[int, list[float]]] = []
    peak, sent = 0, 0
    for t in range(problem.steps):
        copies.step(
            averager.average([copies.gradients(worker, t) for worker in range(problem.workers)]),
            momentum,
        )
        before, sent = sent, elements(averager)
        peak = max(peak, sent - before) if t else peak
        if t % every == 0 or t >= last_tenth:
            losses = copies.losses()
            if t % every == 0:
                curve.append((t + 1, losses.tolist()))
                progress(t / problem.steps, f"step {t} of {problem.steps}")
            if t >= last_tenth:
                finals.append(losses)
    share = len(pairs)
    return {
        "final": torch.stack(finals).mean(dim=0).tolist(),
        "curve": curve,
        "elements": sent / share / problem.steps,
        "peak_elements": peak / share,
    }


def elements(averager: Averager) -> int:
    """Return how many elements of matrices a worker has sent, without the control
    numbers, which do not grow with the matrices.
    """
    overhead = ("control", "fingerprint")
    sent = sum(count for kind, count in averager.ledger.bytes.items() if kind not in overhead)
    return sent // torch.float64.itemsize
