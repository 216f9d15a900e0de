"""What a section means that names no compressor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGDPlus
from lowrank_comm.config import Section
from lowrank_comm.config.presets import PRESETS, UNKNOWN_LENGTH, expanded
from lowrank_comm.numerics.quantization import Quantization


def built(section: dict[str, Any], **keywords: Any) -> CompressedOptimizer:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    base = torch.optim.AdamW(model.named_parameters())
    return CompressedOptimizer.from_config(base, section, **keywords)


@pytest.mark.parametrize("section", [{}, {"preset": "balanced"}, {"preset": None}])
def test_an_empty_section_is_balanced(section: dict[str, Any]) -> None:
    optimizer = built(section)
    assert optimizer.compressor == PowerSGDPlus(16, 200, restart="randomized")
    plan = optimizer.plan
    assert plan.warmup_steps == UNKNOWN_LENGTH
    assert built(section, training_steps=1000).plan.warmup_steps == 30
    # r (m + n) numbers of a byte, with scales, against m n of 4
    assert plan.rows[0].bytes == pytest.approx(16 * 512 * 260 / 256)
    assert "powersgd_plus (rank=16" in str(plan)
    assert "warm-up:  50 steps first" in str(plan)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_is_valid(preset: str) -> None:
    section = Section.parse({"preset": preset})
    assert section.rank == PRESETS[preset]["rank"]
    assert section == Section.parse(section.model_dump(include={"preset"}))


def test_paper_is_the_papers() -> None:
    optimizer = built({"preset": "paper"})
    assert optimizer.compressor == PowerSGDPlus(4, 200, restart="svd")
    assert optimizer.plan.warmup_steps == 0
    assert "int8" not in str(optimizer.plan)


def test_further_keys_win_one_by_one() -> None:
    section = Section.parse(
        {"rank": 4, "quantization": {"dense": "int8"}, "warmup_steps": 7, "seed": 3}
    )
    assert (section.preset, section.rank, section.seed) == ("balanced", 4, 3)
    assert section.quantization == Quantization(factors="int8", restart="int8", dense="int8")
    assert section.reducer_options()["warmup_steps"] == 7
    assert section.reducer_options(1000)["warmup_steps"] == 7


def test_a_compressor_that_is_named_keeps_its_papers_settings() -> None:
    section = Section.parse({"compressor": "powersgd_plus"})
    assert section.make_compressor() == PowerSGDPlus()
    assert (section.preset, section.warmup_steps, section.quantization) == (None, 0, Quantization())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"preset": "balance"}, r"lowrank_comm.preset='balance' is unknown.*'balanced'"),
        ({"preset": 3}, r"lowrank_comm.preset=3 is unknown"),
        ({"preset": "small", "compressor": "acp"}, r"names its compressor.*compressor='acp'"),
        ({"warmup": 3}, r"lowrank_comm.warmup is not a known key; did you mean 'warmup_steps'"),
    ],
)
def test_bad_sections(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Section.parse(section)


def test_nothing_given_is_changed() -> None:
    given: dict[str, Any] = {"quantization": {"dense": "int8"}}
    expanded(given)
    assert given == {"quantization": {"dense": "int8"}}
    assert PRESETS["balanced"]["quantization"] == {"factors": "int8", "restart": "int8"}
