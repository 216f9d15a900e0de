"""Process groups, the agreement between workers at the start, and the ledger of bytes. Knows nothing of compressors."""

from __future__ import annotations

from .agreement import check_same
from .group import Group, leave
from .ledger import Ledger
from .shards import Shards

__all__ = ["Group", "Ledger", "Shards", "check_same", "leave"]
