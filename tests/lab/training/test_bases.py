"""The lab's Muon against torch's, and which parameters it steps."""

from __future__ import annotations

import torch

from lowrank_comm.lab.training.bases import Base, base_optimizer


def test_muon_is_torchs_up_to_bfloat16() -> None:
    """Hidden matrices by Muon, embeddings and vectors by AdamW, on one schedule."""
    torch_s, ours = (
        {
            name: torch.nn.Parameter(torch.zeros(shape))
            for name, shape in (
                ("a", (6, 8)),
                ("b", (8, 6)),
                ("c", (6, 8)),
                ("embed", (9, 8)),
                ("d", (8,)),
            )
        }
        for _ in range(2)
    )
    hidden = [torch_s[name] for name in "abc"]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([torch_s["embed"], torch_s["d"]], 0.01, (0.9, 0.95), weight_decay=0.1)
    optimizer = base_optimizer(ours, Base("muon", 1.0, 0.95, 0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in torch_s.items():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            ours[name].grad = parameter.grad.clone()
        for one in (muon, adamw, optimizer):
            one.step()
    for name, parameter in torch_s.items():
        # three steps of size .01 x .2 sqrt(8); bfloat16 has 2 to 3 digits
        tolerance = 3e-4 if name in "abc" else 1e-7
        assert torch.allclose(ours[name], parameter, rtol=0, atol=tolerance), name
    assert max((ours[name] - torch_s[name]).abs().max() for name in "abc") > 0
