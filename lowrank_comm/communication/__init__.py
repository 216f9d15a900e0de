"""Process groups, the agreement between workers at the start, and the ledger of bytes.
Nothing here knows of compressors.
"""

from __future__ import annotations

from lowrank_comm.communication.agreement import check_same
from lowrank_comm.communication.group import Group, leave
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.communication.ledger import Ledger

__all__ = ["Group", "IntraNodeGroup", "Ledger", "check_same", "leave"]
