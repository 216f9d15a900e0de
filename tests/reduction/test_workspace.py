"""What a step holds beside the error memory, measured: Delta, and one piece where
restarts send whole matrices.
"""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.numerics.device import accelerator_path
from lowrank_comm.reduction.plan import Plan
from tests.support.allocations import metered

PIECE = 1_000_000
SHAPES = {
    "svd": [(512, 256)] * 16,
    # above 2^20 elements "auto" restarts by factors
    "auto": [(512, 256)] * 8 + [(1040, 1024)] * 4,
}


def measured(restart: str, wire: str | None) -> tuple[dict[str, float], int, Plan]:
    """Bytes held at most in ordinary steps and in restarts, those of the error memory,
    and the plan.
    """
    with accelerator_path():
        model = torch.nn.ParameterList(torch.zeros(shape) for shape in SHAPES[restart])
        base = torch.optim.SGD(model.named_parameters(), lr=0.0, foreach=True)
        with metered() as meter:
            compressor = PowerSGDPlus(4, 2, restart=restart)  # type: ignore[arg-type]
            optimizer = CompressedOptimizer(
                base, compressor, wire_dtype=wire, bucket_cap_mb=PIECE / 1e6
            )
            for t in range(4):
                for parameter in model:
                    parameter.grad = torch.randn_like(parameter)
                with meter.part("ordinary" if t % 2 else "restart"):
                    optimizer.step()
    kept = sum(error.nbytes for error in optimizer.error_memory().values())
    return {name: meter.peak(name) for name in ("ordinary", "restart")}, kept, optimizer.plan


@pytest.mark.parametrize("wire", [None, "bfloat16"])
@pytest.mark.parametrize("restart", ["auto", "svd"])
def test_a_restart_needs_delta_and_a_piece(restart: str, wire: str | None) -> None:
    peaks, kept, plan = measured(restart, wire)
    assert plan.error_bytes == kept
    assert peaks["ordinary"] <= 1.25 * kept
    assert peaks["restart"] <= 1.25 * kept + PIECE
    assert kept <= plan.needs.restart <= 1.25 * kept + PIECE
