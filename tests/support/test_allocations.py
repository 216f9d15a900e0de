"""The meter of allocations finds what was allocated, whoever asked for it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.allocations import metered
from tests.support.gloo import GlooPool

KB = 1024


def zeros(kilobytes: int) -> torch.Tensor:
    return torch.zeros(kilobytes * KB // 4)


def test_what_is_held_at_most_and_in_the_end() -> None:
    with metered() as meter:
        before = zeros(64)
        with meter.part("sum"):
            twice = before + before
            third = twice * 3
            del twice
            # nothing new: a view, in place, into what is there
            third.view(-1, 4).add_(1)
            torch.add(before, before, out=third)
        with meter.part("replaced"):
            # what goes makes room for what comes
            before, third = zeros(16), zeros(8)
    # numbers take a few bytes while they are an operation's arguments
    assert 128 * KB <= meter.peak("sum") < 129 * KB
    assert meter.left("sum") == 64 * KB
    assert meter.peak("replaced") == (16 + 8) * KB
    assert meter.left("replaced") == (16 + 8 - 64 - 64) * KB


def test_what_was_there_before_does_not_count() -> None:
    before = zeros(64)
    with metered() as meter, meter.part("given back"):
        del before
        after = zeros(16)
    assert meter.peak("given back") == meter.left("given back") == after.nbytes


def test_a_part_in_pieces_leaves_out_what_is_between_them() -> None:
    with metered() as meter:
        with meter.part("ours"):
            ours = zeros(16)
        theirs = zeros(512)
        with meter.part("ours", again=True):
            more = torch.cat([ours, ours])
        del theirs, more
    assert meter.peak("ours") == meter.left("ours") == (16 + 32) * KB


def test_what_an_operation_needs_in_between_counts() -> None:
    with metered() as meter:
        numbers = zeros(64)
        with meter.part("norm"):
            torch.linalg.vector_norm(numbers, dtype=torch.float64)
    # it makes a copy in float64, which no one sees who looks at operations' results
    assert 128 * KB <= meter.peak("norm") < 129 * KB


def test_hooks_of_a_backward_pass_count() -> None:
    weight = torch.ones(16 * KB, requires_grad=True)
    kept = []
    weight.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad.double()))
    with metered(places=True) as meter:
        loss = (weight * 2).sum()
        with meter.part("backward"):
            loss.backward()
    assert kept[0].nbytes == 128 * KB
    # the gradient, and what the hook keeps
    assert (64 + 127) * KB < meter.left("backward") < (64 + 129) * KB
    assert "  aten::empty_strided" in meter.at_peak("backward").splitlines()[0]


def test_files_that_are_read_count_and_those_that_are_mapped_do_not(tmp_path: Path) -> None:
    torch.save({"a": zeros(64)}, tmp_path / "saved.pt")
    with metered() as meter:
        with meter.part("read"):
            read = torch.load(tmp_path / "saved.pt")
        with meter.part("mapped"):
            mapped = torch.load(tmp_path / "saved.pt", mmap=True)
        with meter.part("used"):
            used = mapped["a"] + 1
            del mapped, used
    assert read["a"].nbytes <= meter.left("read") < 65 * KB
    assert meter.peak("mapped") < KB
    assert 64 * KB <= meter.peak("used") < 65 * KB


def summed(rank: int) -> int:
    with metered() as meter:
        for _ in range(3):
            with meter.part("sum"):
                buffer = zeros(64)
                work = dist.all_reduce(buffer, async_op=True)
                work.wait()
                everyone = [zeros(64) for _ in range(2)]
                dist.all_gather(everyone, buffer)
                del buffer, work, everyone
    return meter.peak("sum")


def test_what_a_collective_is_given_counts_and_what_gloo_copies_does_not(gloo: GlooPool) -> None:
    for peak in gloo.run(summed, 2):
        assert 3 * 64 * KB <= peak < 3 * 64 * KB + KB
