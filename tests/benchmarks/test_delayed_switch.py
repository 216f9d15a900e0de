"""A lab whose links delay: an answer takes twice the delay at least, and what is sent
arrives whole.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import netlab
from tests.support.needs import require

DELAY_MS, BYTES = 30.0, 3_000_000


def test_an_answer_takes_two_delays_and_bytes_arrive(capfd: pytest.CaptureFixture[str]) -> None:
    """Host 0 sends a byte to host 1 and waits for it to come back, then sends more than
    fits into one frame, which host 1 counts.
    """
    require(netlab.missing())
    require(None if Path("/dev/net/tun").exists() else "no /dev/net/tun for links that delay")
    script = f"""if True:
        import os, socket, time
        if os.environ["RANK"] == "1":
            with socket.create_server(("", 29500)) as server:
                peer = server.accept()[0]
                peer.sendall(peer.recv(1))
                left = {BYTES}
                while left:
                    left -= len(peer.recv(min(left, 1 << 20)))
                peer.sendall(b"whole")
        else:
            for _ in range(100):
                try:
                    peer = socket.create_connection(("10.77.0.2", 29500))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            began = time.monotonic()
            peer.sendall(b"x")
            peer.recv(1)
            print("answered after", time.monotonic() - began)
            peer.sendall(bytes({BYTES}))
            print("arrived", peer.recv(5).decode())
    """
    with netlab.Lab(2, 1000, delay_ms=DELAY_MS) as lab:
        name = lab.name
        done = lab.run([sys.executable, "-c", script], timeout=60)
    answered, arrived = capfd.readouterr().out.splitlines()
    assert float(answered.removeprefix("answered after ")) >= 2 * DELAY_MS / 1e3
    assert arrived == "arrived whole"
    assert BYTES < done.sent[0] < 1.1 * BYTES
    # the process that forwards is gone, and so are the namespaces
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert f"delayed_switch.py {name}" not in listed.stdout
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert name not in left.stdout
