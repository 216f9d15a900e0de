"""A switch whose every link delays: frames between the hosts of a lab, forwarded by a
process after a time, since not every kernel has `tc netem`.

    python benchmarks/delayed_switch.py NAME HOSTS DELAY_MS [MBIT]

Host i's `eth0`, in the namespace <NAME>i, is a TAP device that this process holds; it
prints "ready" once all are there, and ends when its parent does. A frame arrives
DELAY_MS after the end of its sending, and leaves no faster than MBIT lets a link
receive; what a host sends is limited by the kernel, as in a lab without delay. Frames
are as large as TCP makes them (segmentation is left out, as between virtual machines),
so that a thousand a second carry a Gbit/s. A switch of this kind learns where an
address is from the frames that it sends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import signal
import struct
import sys
import time

# of <linux/if_tun.h>
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PACKET_INFORMATION, _VIRTUAL_HEADER = 0x2, 0x1000, 0x4000
_CHECKSUM, _SEGMENTATION_4, _SEGMENTATION_6 = 0x1, 0x2, 0x4
# struct virtio_net_hdr, before every frame, in both directions
HEADER_BYTES = 10
_LARGEST_FRAME = 1 << 17
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    with open(f"/run/netns/{namespace}") as file:  # noqa: PTH123
        if _libc.setns(file.fileno(), _CLONE_NEWNET):
            sys.exit(f"setns {namespace}: {os.strerror(ctypes.get_errno())}")


def _tap() -> int:
    """Return a new TAP device `eth0` of the present namespace."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    kind = _TAP | _NO_PACKET_INFORMATION | _VIRTUAL_HEADER
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", kind))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUM | _SEGMENTATION_4 | _SEGMENTATION_6)
    return device


def forward(taps: list[int], delay: float, byte_seconds: float) -> None:
    """Forward frames for ever.

    Args:
        taps: a device for each host.
        delay: seconds that a frame is on its way.
        byte_seconds: of a byte on the link that receives; 0 for no limit.
    """
    by_address: dict[bytes, int] = {}
    free = dict.fromkeys(taps, 0.0)
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready, _, _ = select.select(taps, [], [], wait)
        now = time.monotonic()
        for tap in ready:
            frame = os.read(tap, _LARGEST_FRAME)
            target, source = frame[HEADER_BYTES:][:6], frame[HEADER_BYTES + 6 :][:6]
            by_address[source] = tap
            known = by_address.get(target)
            for other in [known] if known is not None else [one for one in taps if one != tap]:
                free[other] = max(now, free[other]) + (len(frame) - HEADER_BYTES) * byte_seconds
                count += 1
                heapq.heappush(on_the_way, (free[other] + delay, count, other, frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, tap, frame = heapq.heappop(on_the_way)
            # a full or closed device drops, as a switch does
            with contextlib.suppress(OSError):
                os.write(tap, frame)


def main(name: str, hosts: int, delay_ms: float, mbit: float | None = None) -> None:
    """Make the devices of a lab and forward between them."""
    # PR_SET_PDEATHSIG
    _libc.prctl(1, signal.SIGKILL)
    # the hosts' processes may not hold the network up
    with contextlib.suppress(OSError):
        os.nice(-10)
    taps = []
    for i in range(hosts):
        _enter(f"{name}{i}")
        taps.append(_tap())
    # whoever ends what runs in the lab's namespaces finds it here
    _enter(f"{name}sw")
    print("ready", flush=True)
    forward(taps, delay_ms / 1e3, 8 / (mbit * 1e6) if mbit else 0.0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
