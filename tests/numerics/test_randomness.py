"""Random draws that do not depend on torch's settings."""

from __future__ import annotations

import torch

from lowrank_comm.numerics.randomness import gaussian


def test_draws_do_not_depend_on_torchs_default_dtype_or_device() -> None:
    expected = gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu"))
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(
            gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu")),
            expected,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(
            gaussian(3, ("a", "b"), 5, "test", (40, 3), torch.float64, torch.device("cpu")),
            expected,
        )
