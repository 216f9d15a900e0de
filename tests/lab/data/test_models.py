"""The papers' models."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm.lab.data.models import LLAMAS, new_llama


def test_the_papers_models_have_the_size_of_their_names() -> None:
    with torch.device("meta"):
        for name, millions in (("60M", 58.1), ("130M", 134.1)):
            model = new_llama(name, LLAMAS[name]["vocab_size"], 256)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
                millions, abs=0.1
            )
