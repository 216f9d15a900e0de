"""What a test needs of the machine: it skips where that is missing, and fails where it
was promised to be there.

.ci/run sets LOWRANK_COMM_CLUSTER_TESTS=1 on machines where it has installed what the
cluster tests need, so that none of them is passed over there unnoticed.
"""

from __future__ import annotations

import os

import pytest

PROMISE = "LOWRANK_COMM_CLUSTER_TESTS"


def require(missing: str | None) -> None:
    """Go on if nothing is missing (None); else skip with this reason, or fail with it
    if the promise is set.
    """
    if missing is None:
        return
    if os.environ.get(PROMISE) == "1":
        pytest.fail(f"{PROMISE}=1, but {missing}", pytrace=False)
    pytest.skip(missing)
