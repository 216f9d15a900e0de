"""Accelerate without Trainer: one `prepare` line, really trained on two processes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.support.gloo import GlooPool

pytest.importorskip("accelerate")
from tests.support import accelerate_cases as cases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["ddp", "plain"])
@pytest.mark.parametrize("form", ["compression", "optimizer"])
def test_full_rank_is_uncompressed(gloo: GlooPool, engine: str, form: str) -> None:
    world = 2 if engine == "ddp" else 1
    theirs = gloo.run(cases.train, world, engine, None)
    ours = gloo.run(cases.train, world, engine, cases.FULL, form)
    for mine, other in zip(ours, theirs, strict=True):
        assert (
            mine["wrapped"]
            == other["wrapped"]
            == ("DistributedDataParallel" if engine == "ddp" else "Sequential")
        )
        assert sum(norm > cases.CLIP for norm in other["norms"]) > 5
        assert mine["norms"] == pytest.approx(other["norms"], rel=1e-4)
        assert mine["lr"] == other["lr"]
        # one pass for two micro-batches, or for the one at an epoch's end
        assert mine["steps"] == len(other["norms"])
        torch.testing.assert_close(mine["parameters"], other["parameters"], rtol=1e-4, atol=1e-5)


def test_rank_2_learns(gloo: GlooPool) -> None:
    ranks = gloo.run(functools.partial(cases.train, epochs=15), 2, "ddp", cases.RANK_2)
    assert ranks[0]["norms"] == ranks[1]["norms"]
    torch.testing.assert_close(ranks[0]["parameters"], ranks[1]["parameters"], rtol=0, atol=0)
    for found in ranks:
        assert sum(found["losses"][-5:]) < 0.8 * sum(found["losses"][:5])


def test_save_state_and_load_state(gloo: GlooPool, tmp_path: Path) -> None:
    for whole, resumed in gloo.run(cases.resumed, 2, str(tmp_path / "state")):
        assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
        assert resumed["norms"] == pytest.approx(whole["norms"], rel=1e-5)
        assert resumed["steps"] == whole["steps"] > len(resumed["norms"])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_one_rank_cannot_make_is_skipped_by_all(gloo: GlooPool, scaled: bool) -> None:
    ranks = gloo.run(cases.overflow_on_one_rank, 2, scaled)
    for found in ranks:
        assert found["skipped"] == [False, True, False, False]
        # Accelerate's scheduler goes as many steps as there are processes, and waits
        # for a step that was skipped.
        assert found["lr"] == [0.075, 0.075, 0.01875, 0.0046875]
        assert found["scale"] == ([1024.0, 512.0, 512.0, 512.0] if scaled else [None] * 4)
        assert found["norms"][0] < 10, "the norm is that of the gradient without the scale"
        assert 0 < found["error"] < 10
    torch.testing.assert_close(ranks[0]["parameters"], ranks[1]["parameters"], rtol=0, atol=0)


def test_one_optimizer_in_two_accelerators_one_after_the_other(gloo: GlooPool) -> None:
    """As in one: gradients are averaged at the end of backward, so that clipping acts
    on what was decoded, and the second accelerator is told of a step that was skipped.
    """
    (whole,) = gloo.run(cases.in_two_accelerators, 1, False)
    (parted,) = gloo.run(cases.in_two_accelerators, 1, True)
    assert parted["losses"] == whole["losses"]
    assert parted["norms"] == whole["norms"]
    assert parted["steps"] == whole["steps"]
    assert parted["skipped"] and whole["skipped"]


def test_wrong_use(gloo: GlooPool) -> None:
    for said in gloo.run(cases.wrong_use, 2):
        assert "nothing to compress with" in said["nothing"]
        assert "CompressedOptimizer already" in said["twice"]
        assert "one model and its optimizer" in said["no model"]
        assert "WORLD_SIZE=2" in said["one process of two"]
        assert "ACCELERATE_USE_CPU" in said["one process of two"]
        assert "the accelerator comes first, and got Sequential" in said["no accelerator"]
        assert 'reduce_at="step"' in said["reduces too late"]
        assert "attach(model, scaler=scaler)" in said["a scaler that nobody knows"]
