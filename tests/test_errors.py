"""The classes of the library's errors, and the word that it suggests."""

from __future__ import annotations

import pytest

from lowrank_comm import errors


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (errors.ConfigError, ValueError),
        (errors.ConfigMismatchError, RuntimeError),
        (errors.DivergenceError, RuntimeError),
        (errors.StateMismatchError, RuntimeError),
        (errors.UnsupportedError, NotImplementedError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_error_is_the_librarys_and_one_of_pythons(
    kind: type[Exception], also: type[Exception]
) -> None:
    assert issubclass(kind, errors.LowRankCommError)
    assert issubclass(kind, also)


def test_the_nearest_word_is_suggested() -> None:
    known = ["restart_every", "rank", "power_iterations"]
    assert errors.nearest("restart_evry", known) == "; did you mean 'restart_every'?"
    assert errors.nearest("Rank", known) == "; did you mean 'rank'?"
    assert errors.nearest("momentum", known) == "."
