"""MARINA-P: the downlink of Inkheart SGD with a dense uplink.

    server     x+ = x - gamma mean of grad f_i(w_i)
    downlink   with probability p: w_i+ = x+;  else w_i+ = w_i + Q_i(x+ - x)

The theorem in `inkheart` holds with omega = 0, and then for heterogeneous data too:
homogeneity served there only to bound the variance that RandK adds. (The original's
constants are its authors'; those are not quoted here.)
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_comm.bidirectional.inkheart import OneUplink
from lowrank_comm.bidirectional.randk import RandK


@dataclass(frozen=True)
class MarinaP(OneUplink):
    """MARINA-P with grouped PermK: compressed from the server to the workers, dense
    from the workers to the server.

    x+ = x - gamma (1/n) sum of gradient_i at w_i
    w_i+ = x+ with probability p, else w_i + Q_i(x+ - x)

    Args:
        downlink_groups: G, 1 for a dense downlink; null for the largest divisor of n
            that is at most 8.
        sync_probability: p in (0, 1]; null for 1/G, with which a step sends at most 2
            d/G coordinates in the mean.

    Raises:
        ConfigError: a value that cannot work.

    Example:
        >>> MarinaP(downlink_groups=2).groups(n=4)
        2

    Source: MARINA-P of arXiv 2402.06412, with PermK in groups; the step-size rule is
    that of `inkheart`.
    """

    json_name = "marina_p"
    uplink = RandK(1.0)
