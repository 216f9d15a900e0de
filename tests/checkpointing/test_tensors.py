"""What a saved state holds that the run does not, and the other way round: what is
refused, what starts from zero, what is said.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from lowrank_comm import (
    CompressedOptimizer,
    ErrorFeedback,
    PowerSGD,
    PowerSGDPlus,
    Rule,
    StateMismatchError,
    checkpoint,
)
from lowrank_comm.checkpointing.state_dict import KEY, PREFIX
from lowrank_comm.compressors import powersgd_plus
from lowrank_comm.compressors.base import Compressor
from tests.support.checkpointed import Trainer, equal, everything, largest_difference
from tests.support.gloo import GlooPool


def test_errors_that_would_be_lost_are_refused() -> None:
    """Resuming with other rules: the saved error has no place to go. It is not dropped
    without a word.
    """
    one = Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    with pytest.raises(
        StateMismatchError, match=r"0\.weight.*kept Q, error.*compressor 'powersgd' with"
    ):
        Trainer(PowerSGD(2), min_compression_rate=1000).optimizer.load_state_dict(
            one.optimizer.state_dict()
        )


def test_the_cause_of_a_refusal_is_named() -> None:
    """Each reason why a run keeps no error memory, with the setting that mends it; and
    with that setting it loads.
    """
    one = Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    state = one.optimizer.state_dict()
    for options, words in (
        ({"min_compression_rate": 2.5}, r"dense: rate 1\.76 is not above 2\.5 \(min_compression"),
        ({"error_feedback": ErrorFeedback(form="none")}, "the same compressor and error_feedback"),
        ({"rules": [Rule("0.weight", treatment="dense")]}, r"dense: rule '0\.weight'.*rules"),
    ):
        with pytest.raises(StateMismatchError, match=words):
            Trainer(PowerSGD(2), **options).optimizer.load_state_dict(state)
    mended = Trainer(
        PowerSGD(2), min_compression_rate=2.5, rules=[Rule("*.weight", treatment="low_rank")]
    )
    mended.optimizer.load_state_dict(state)
    assert mended.optimizer.error_memory()["0.weight"].any()


def loads_smaller_blocks(rank: int, state: Any) -> tuple[str, bool]:
    """A block (3, 8) of a whole (6, 8) matrix: 24 / (2 * 11) is below a rate of 1.5,
    48 / (2 * 14) above.
    """
    mesh = init_device_mesh("cpu", (1, 2))
    said = ""
    for scope in ("shard", "matrix"):
        model = torch.nn.Linear(8, 6, bias=False)
        optimizer = CompressedOptimizer(
            torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(2),
            min_compression_rate=1.5, process_group=mesh, shard_scope=scope,
        )  # fmt: skip
        try:
            optimizer.load_state_dict(copy.deepcopy(state))
        except StateMismatchError as error:
            said += str(error)
    return said, bool(optimizer.error_memory()["weight"].any())


def test_blocks_too_small_to_be_compressed_are_named(gloo: GlooPool) -> None:
    model = torch.nn.Linear(8, 6, bias=False)
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=1.5)
    model(torch.randn(9, 8)).pow(2).sum().backward()
    optimizer.step()
    for said, mended in gloo.run(loads_smaller_blocks, 2, optimizer.state_dict()):
        assert "'weight' has a saved error memory" in said
        assert (
            'rate 1.09 is not above 1.5 (min_compression_rate), judged by shard_scope="shard"'
            in said
        )
        assert "(3, 8) of (6, 8)" in said
        assert said.count('Resume with shard_scope="matrix"') == 1
        assert mended


def test_what_a_saved_state_does_not_have_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    fresh, used = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    used.train(0, 3, 0)
    state = used.optimizer.state_dict()
    # the second layer, as saved before it was trained
    for number in (2, 3):
        state["state"][number] = {
            k: v for k, v in state["state"][number].items() if not k.startswith("lowrank_comm_")
        }
    kept = used.optimizer.error_memory()["0.weight"].clone()
    used.train(3, 2, 0)
    state = copy.deepcopy(state)
    state["state"][0]["lowrank_comm_error"] = kept
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        used.optimizer.load_state_dict(state)
    assert "1.weight" in caplog.text
    assert torch.equal(used.optimizer.error_memory()["0.weight"], kept)
    assert not used.optimizer.error_memory()["1.weight"].any()
    assert torch.equal(
        used.optimizer.reducer.state.bases()["1.weight"]["Q"],
        fresh.optimizer.reducer.state.bases()["1.weight"]["Q"],
    )


@pytest.mark.parametrize("symbols", [("error",), ("Q",), ("error", "Q")], ids=str)
def test_a_conversion_to_another_dtype_is_said_in_one_line(
    symbols: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    state = one.optimizer.state_dict()
    for entries in state["state"].values():
        for key in entries.keys() & {f"lowrank_comm_{symbol}" for symbol in symbols}:
            entries[key] = entries[key].float()
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(state)
    (line,) = (record.getMessage() for record in caplog.records if "dtype" in record.getMessage())
    assert line.startswith(f"{2 * len(symbols)} saved tensors have another dtype")
    assert "of 0.weight from torch.float32 to torch.float64" in line


def test_another_rank_keeps_the_error_and_starts_the_basis_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(3))
    one.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert "rank" in caplog.text
    for name, error in one.optimizer.error_memory().items():
        assert torch.equal(other.optimizer.error_memory()[name], error)
    other.train(3, 2, 0)


KEPT = {"ef14": ", the error memory is kept", "ef21": ", the EF21 memory (y) is kept", "none": ""}

KEPT["ef21_sgdm"] = ", the EF21 memory (y, v) is kept"


@pytest.mark.parametrize("form", KEPT)
def test_what_is_kept_beside_a_basis_that_starts_anew_is_said(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """y and v are the parameter's, whatever the rank, and so is what is said
    of them.
    """
    options = {"error_feedback": ErrorFeedback(form=form)}
    one, other = Trainer(PowerSGD(2), **options), Trainer(PowerSGD(3), **options)
    one.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert caplog.messages == [
        "the saved bases of 2 parameters (first: 0.weight) are of another rank, or of other blocks"
        " of rows: they start anew" + KEPT[form]
    ]
    for name, kept in one.optimizer.reducer.state.bases().items():
        found = other.optimizer.reducer.state.bases()[name]
        for symbol in kept.keys() - {"Q"}:
            assert kept[symbol].any()
            assert torch.equal(found[symbol], kept[symbol])
    other.train(3, 2, 0)


def test_what_another_form_did_not_keep_starts_from_zero(caplog: pytest.LogCaptureFixture) -> None:
    """All of it, and that is said: y without v, or without the mean of the y's, is not
    what the form keeps. Bases go on.
    """
    one, other = (
        Trainer(PowerSGD(2), error_feedback=ErrorFeedback(form=form))
        for form in ("ef21", "ef21_sgdm")
    )
    one.train(0, 3, 0)
    other.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert caplog.messages == [
        "no saved EF21 memory (y, v) for 2 parameters (first: 0.weight): they start from zero"
    ]
    for name, kept in one.optimizer.reducer.state.bases().items():
        found = other.optimizer.reducer.state.bases()[name]
        assert not any(found[symbol].any() for symbol in ("y", "v", "v_started"))
        assert torch.equal(found["Q"], kept["Q"])


def test_what_ef21_keeps_of_another_model_is_refused() -> None:
    """As an error is; and a v that is one worker's own does not go to another."""
    one, other = (
        Trainer(PowerSGD(2), error_feedback=ErrorFeedback(form="ef21_sgdm")) for _ in range(2)
    )
    one.train(0, 3, 0)
    before = everything(other)
    state = copy.deepcopy(one.optimizer.state_dict())
    state["state"][0]["lowrank_comm_v"] = torch.zeros(9, 11)
    with pytest.raises(
        StateMismatchError, match=r"'0\.weight': the saved v is \(9, 11\), the parameter \(12, 9\)"
    ):
        other.optimizer.load_state_dict(state)
    state = copy.deepcopy(one.optimizer.state_dict())
    state["lowrank_comm"] |= {"kind": "own", "rank": 1, "world": 2}
    with pytest.raises(
        StateMismatchError, match=r"the saved EF21 memory \(y, v\) is rank 1's own of 2 ranks"
    ):
        other.optimizer.load_state_dict(state)
    assert equal(everything(other), before)


def aged(state: dict[str, Any], entries: int, keeps_the_top: bool) -> dict[str, Any]:
    """As an older version saved it, with so many numbers in its tag; and with its
    top-level key, or as torch.distributed.checkpoint keeps it.
    """
    state = copy.deepcopy(state)
    for ours in state["state"].values():
        ours[PREFIX + "tag"] = ours[PREFIX + "tag"][:entries]
    if keeps_the_top:
        state[KEY] = {k: v for k, v in state[KEY].items() if k != "restart" or entries == NOW}
    else:
        del state[KEY]
    return state


NOW, BEFORE = 11, 10
"""Numbers in a tag."""


@pytest.mark.parametrize("keeps_the_top", [True, False])
@pytest.mark.parametrize("entries", [NOW, BEFORE, 7, 6])
def test_a_run_saved_by_the_svd_goes_on_by_auto(
    entries: int, keeps_the_top: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """All matrices are small, so that it is the same algorithm: bit by bit, and nothing
    is said.
    """
    one = Trainer(PowerSGDPlus(2, restart_every=4, restart="svd"))
    one.train(0, 6, 0)
    other = Trainer(PowerSGDPlus(2, restart_every=4))
    other.model.load_state_dict(one.model.state_dict())
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(aged(one.optimizer.state_dict(), entries, keeps_the_top))
    assert not caplog.messages
    assert largest_difference(one.train(6, 10, 0), other.train(6, 10, 0)) == 0.0


def says_otherwise(
    saved: Compressor, loaded: Compressor, entries: int, keeps_the_top: bool, caplog: Any
) -> bool:
    """Whether loading says that matrices restart by another rule."""
    one, other = Trainer(saved), Trainer(loaded)
    one.train(0, 3, 0)
    state = aged(one.optimizer.state_dict(), entries, keeps_the_top)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(state)
    said = [text for text in caplog.messages if 'give restart="svd"' in text]
    assert said in (
        [],
        [
            "the saved run restarted all matrices by the SVD, or is of a version whose default"
            ' that was; here restart="auto" restarts 1 of them (first: 0.weight), of more than 2^20'
            ' elements, by "randomized". To go on as before, give restart="svd"'
        ],
    )
    return bool(said)


@pytest.mark.parametrize("keeps_the_top", [True, False])
def test_another_rule_than_the_saved_runs_is_said(
    keeps_the_top: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where restart="auto" takes another one than the SVD for some matrices. What an
    older version saved does not tell its rule, and the SVD was the default.
    """
    # one of the two weights is larger
    monkeypatch.setattr(powersgd_plus, "SVD_ELEMENTS", 100)
    auto, svd, randomized = (
        PowerSGDPlus(2, restart=word) for word in ("auto", "svd", "randomized")
    )
    for saved, loaded, entries, said in (
        (svd, auto, NOW, True),
        (svd, auto, BEFORE, True),
        (auto, auto, NOW, False),
        (randomized, auto, NOW, False),
        (PowerSGD(2), auto, NOW, False),
        (svd, svd, BEFORE, False),
        (randomized, randomized, BEFORE, False),
        (svd, PowerSGDPlus(2, exact_restart=True), BEFORE, False),
    ):
        found = says_otherwise(saved, loaded, entries, keeps_the_top, caplog)
        assert found == said, (saved, loaded, entries)


def test_another_rule_than_that_of_the_saved_file_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(powersgd_plus, "SVD_ELEMENTS", 100)
    for saved, said in (("svd", 1), ("auto", 0)):
        one, other = Trainer(PowerSGDPlus(2, restart=saved)), Trainer(PowerSGDPlus(2))
        one.train(0, 3, 0)
        name = checkpoint.save(one.optimizer.reducer, tmp_path)
        caplog.clear()
        assert checkpoint.load(other.optimizer.reducer, tmp_path, name)
        assert sum('give restart="svd"' in text for text in caplog.messages) == said
