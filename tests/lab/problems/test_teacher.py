"""Teacher and student: gradients against autograd."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm.lab.problems import teacher
from lowrank_comm.lab.training.averaging import silent


def test_a_teachers_gradient_is_that_of_its_loss() -> None:
    """Against autograd, with the data of the first worker and step."""
    problem = teacher.TeacherProblem(noise=0.0, heterogeneity=0.5)
    copies = teacher.Copies(problem, [(3, 0.1)])
    found = copies.gradients(0, 0)
    w1, w2 = (copies.weights[name][0].clone().requires_grad_() for name in ("W1", "W2"))
    x = copies._inputs(0, 0, problem.batch)
    residual = torch.tanh(x[0] @ w1.mT) @ w2.mT - copies._taught(x)[0]
    (0.5 * residual.square().sum() / problem.batch).backward()
    for weight, gradient in zip((w1, w2), found.values(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-12, atol=1e-12)


def test_a_copy_that_diverges_does_not_stop_the_others() -> None:
    problem = teacher.TeacherProblem(steps=40, workers=2)
    result = teacher.train(
        problem, {"compressor": "identity"}, [(0, 0.1), (0, 500.0)], 0.9, silent
    )["final"]
    alone = teacher.train(problem, {"compressor": "identity"}, [(0, 0.1)], 0.9, silent)["final"]
    assert result == pytest.approx([alone[0], float("inf")], rel=1e-9)
