"""Several hosts with slow links on one machine: a network namespace for each host, its
links shaped by the kernel.

    with Lab(hosts=4, mbit=100) as lab:
        # one process a host; RANK, WORLD_SIZE, MASTER_ADDR, ... are set
        done = lab.run([sys.executable, "train.py"])
        # bytes that left each host's interface meanwhile
        done.sent

and from a shell

    python benchmarks/netlab.py up --hosts 4 --mbit 100
    python benchmarks/netlab.py run -- python train.py
    # sent and received by each host since `up`
    python benchmarks/netlab.py bytes
    # ends what runs there and removes everything
    python benchmarks/netlab.py down

Host i is the namespace <name>i and has the address 10.77.0.(i+1) on its interface
`eth0`, the end of a veth pair whose other end is at a bridge in a namespace of its own,
<name>sw. `tc htb` limits both ends, so a host sends and receives at the rate, as on a
full-duplex switch; without a rate nothing is limited. With a delay, a process forwards
the frames instead of the bridge (`delayed_switch`). Nothing is added to the machine's
own network, and labs of different names do not meet. Needs root and iproute2 (Linux);
Python's standard library only.

Nothing is left behind: `with` removes the lab however its body ends, processes die with
the one that started them, and a lab whose owner was killed outright is removed by the
next one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

NAMESPACES = Path("/run/netns")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# A lab made by the library is named by the process that owns it, which is how a lab
# without an owner is known.
OWNED = re.compile(r"lrc(\d+)x\d+n")
_numbers = itertools.count()
_libc = ctypes.CDLL(None)


class LabError(RuntimeError):
    """A lab could not be built, or a process in it failed."""


@dataclass(frozen=True)
class Run:
    """Wall-clock seconds of a run, and the kernel's count of bytes at each host's
    interface.
    """

    seconds: float
    sent: list[int]
    received: list[int]


def _sh(command: str, check: bool = True) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise LabError(f"`{command}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _namespaces(prefix: str = "") -> list[str]:
    return (
        [p.name for p in NAMESPACES.iterdir() if p.name.startswith(prefix)]
        if NAMESPACES.is_dir()
        else []
    )


def _remove(name: str) -> None:
    """End the processes in a lab's namespaces and remove these (their interfaces go
    with them).
    """
    names = [one for one in _namespaces(name) if re.fullmatch(r"\d+|sw", one[len(name) :])]
    for sign in (signal.SIGTERM, signal.SIGKILL):
        alive = {
            int(pid) for one in names for pid in _sh(f"ip netns pids {one}", check=False).split()
        } - {os.getpid()}
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in alive):
            time.sleep(0.05)
    for one in names:
        _sh(f"ip netns del {one}", check=False)


def _remove_ownerless() -> None:
    """Remove the labs of processes that no longer exist."""
    labs = {
        (found.group(), int(found.group(1)))
        for found in map(OWNED.match, _namespaces("lrc"))
        if found
    }
    for name, owner in labs:
        if not Path(f"/proc/{owner}").exists():
            _remove(name)


def missing() -> str | None:
    """Return why no lab can be built here, or None if a small one can be built."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no `{tool}` (apt-get install iproute2)"
    try:
        with Lab(hosts=1, mbit=100):
            return None
    except LabError as problem:
        return f"no shaped network namespaces here: {problem}"


class Lab:
    """`hosts` hosts whose links carry `mbit` Mbit/s in either direction (None: as much
    as the machine can), and take `delay_ms` one way; a context manager that builds and
    removes them.
    """

    def __init__(
        self, hosts: int, mbit: float | None, name: str | None = None, delay_ms: float = 0.0
    ):
        if not 1 <= hosts <= 200 or (mbit is not None and mbit <= 0) or delay_ms < 0:
            raise LabError(
                "a lab has 1 to 200 hosts, a rate above 0 and no negative delay, not"
                f" {hosts} hosts at {mbit} Mbit/s and {delay_ms:g} ms"
            )
        self.hosts, self.mbit, self.delay_ms = hosts, mbit, delay_ms
        self.name = name or f"lrc{os.getpid()}x{next(_numbers)}n"
        self._switch: subprocess.Popen | None = None

    @staticmethod
    def address(host: int) -> str:
        """Return the host's address inside the lab."""
        return f"10.77.0.{host + 1}"

    def up(self) -> None:
        """Build the lab, in place of one of the same name."""
        _remove_ownerless()
        _remove(self.name)
        switch = f"{self.name}sw"
        _sh(f"ip netns add {switch}")
        for i in range(self.hosts):
            _sh(f"ip netns add {self.name}{i}")
            _sh(f"ip -n {self.name}{i} link set lo up")
        self._start_delayed_switch() if self.delay_ms else self._bridge(switch)
        for i in range(self.hosts):
            host = f"{self.name}{i}"
            _sh(f"ip -n {host} address add {self.address(i)}/24 dev eth0")
            _sh(f"ip -n {host} link set eth0 up")
            # what the host sends
            self._limit(host, "eth0")

    def _bridge(self, switch: str) -> None:
        _sh(f"ip -n {switch} link add br0 type bridge forward_delay 0")
        _sh(f"ip -n {switch} link set br0 up")
        for i in range(self.hosts):
            host = f"{self.name}{i}"
            _sh(f"ip -n {switch} link add p{i} type veth peer name eth0 netns {host}")
            _sh(f"ip -n {switch} link set p{i} master br0 up")
            # what the host receives
            self._limit(switch, f"p{i}")

    def _start_delayed_switch(self) -> None:
        """Start the process that makes every host's `eth0`; `down` ends it."""
        words = [self.name, str(self.hosts), str(self.delay_ms)]
        words += [] if self.mbit is None else [str(self.mbit)]
        script = Path(__file__).with_name("delayed_switch.py")
        self._switch = subprocess.Popen(
            [sys.executable, str(script), *words], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._switch.stdout is not None
        if self._switch.stdout.readline().strip() != b"ready":
            raise LabError("the delaying switch did not start: its reason is above")

    def _limit(self, namespace: str, device: str) -> None:
        if self.mbit is None:
            return
        # a millisecond's worth: a large burst would hide a low rate
        burst = max(16_000, int(self.mbit * 1e6 / 8 / 1000))
        rate = (
            f"rate {self.mbit}mbit ceil {self.mbit}mbit burst {burst} cburst {burst} quantum 60000"
        )
        _sh(f"tc -n {namespace} qdisc add dev {device} root handle 1: htb default 1")
        _sh(f"tc -n {namespace} class add dev {device} parent 1: classid 1:1 htb {rate}")

    def down(self) -> None:
        """Remove the lab; harmless when there is none."""
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
            self._switch = None
        _remove(self.name)

    def __enter__(self) -> Lab:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def counters(self) -> tuple[list[int], list[int]]:
        """Return the bytes sent and received by each host since the lab was built."""
        shown = [_sh(f"ip -n {self.name}{i} -s -j link show dev eth0") for i in range(self.hosts)]
        stats = [json.loads(one)[0]["stats64"] for one in shown]
        return [one["tx"]["bytes"] for one in stats], [one["rx"]["bytes"] for one in stats]

    def run(
        self,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        port: int = 29500,
        timeout: float | None = None,
        cwd: Path | None = None,
    ) -> Run:
        """Run the command on every host at once, with the environment that `torchrun`
        would set for one process a node.

        Host 0 writes to our own output; of another host nothing is shown unless it
        fails. When one fails, or at the timeout, all are ended and LabError is raised
        with the last lines of the one that failed.
        """
        sent, received = self.counters()
        began = time.monotonic()
        logs: list[IO[bytes] | None] = [None]
        logs += [tempfile.TemporaryFile() for _ in range(1, self.hosts)]  # noqa: SIM115
        processes: list[subprocess.Popen] = []
        sys.stdout.flush()
        try:
            for i, log in enumerate(logs):
                processes.append(self._start(i, command, env or {}, port, cwd, log))
            while any(process.poll() is None for process in processes):
                failed = next((i for i, process in enumerate(processes) if process.poll()), None)
                if failed is not None or (
                    timeout is not None and time.monotonic() - began > timeout
                ):
                    break
                time.sleep(0.02)
            failed = next((i for i, process in enumerate(processes) if process.poll()), None)
            if failed is not None:
                output = _tail(logs[failed]) or "(its output is above)"
                raise LabError(f"host {failed} ended with {processes[failed].returncode}: {output}")
            if any(process.poll() is None for process in processes):
                raise LabError(f"not done after {timeout:g} s")
        finally:
            _end(processes)
            for log in logs:
                if log is not None:
                    log.close()
        seconds = time.monotonic() - began
        after = self.counters()
        return Run(
            seconds,
            [new - old for new, old in zip(after[0], sent, strict=True)],
            [new - old for new, old in zip(after[1], received, strict=True)],
        )

    def _start(
        self,
        host: int,
        command: Sequence[str],
        env: dict[str, str],
        port: int,
        cwd: Path | None,
        log: IO[bytes] | None,
    ) -> subprocess.Popen:
        rank = {
            "RANK": host,
            "GROUP_RANK": host,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": self.hosts,
            "LOCAL_WORLD_SIZE": 1,
        }
        place = {
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": port,
            **dict.fromkeys(INTERFACE_VARIABLES, "eth0"),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}{host}", *command],
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                **{k: str(v) for k, v in (rank | place).items()},
                **env,
            },
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if log is not None else None,
            # a process group of its own, so that what it starts can be ended with it
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG; kept over exec
    _libc.prctl(1, signal.SIGKILL)


def _tail(log: IO[bytes] | None, lines: int = 30) -> str:
    if log is None:
        return ""
    log.seek(0)
    return "\n" + "\n".join(log.read().decode("utf-8", "replace").splitlines()[-lines:])


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM, a second, SIGKILL, to the groups of those that still run."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.02)
    for process in processes:
        process.wait()


def exit_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception does, so that labs are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    """The commands of a shell: a lab that stays up until `down`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["up", "run", "bytes", "down"])
    parser.add_argument(
        "--name", default="netlab", help="letters; labs of different names live side by side"
    )
    parser.add_argument("--hosts", type=int, default=4, help="up: number of hosts")
    parser.add_argument(
        "--mbit", type=float, default=100.0, help="up: rate of every link, either way"
    )
    parser.add_argument("--port", type=int, default=29500, help="run: MASTER_PORT")
    parser.add_argument("--timeout", type=float, help="run: end everything after so many seconds")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if not given.name.isalpha():
        parser.error("--name takes letters only")
    exit_on_sigterm()
    try:
        if given.command == "up":
            lab = Lab(given.hosts, given.mbit, given.name)
            lab.up()
            return print(
                f"{lab.hosts} hosts {lab.address(0)} to {lab.address(lab.hosts - 1)} at"
                f" {lab.mbit:g} Mbit/s"
            )
        if given.command == "down":
            return _remove(given.name)
        hosts = len([one for one in _namespaces(given.name) if one[len(given.name) :].isdigit()])
        if not hosts or (given.command == "run" and not words):
            parser.error("`up` comes first, then `run -- command`")
        lab = Lab(hosts, given.mbit, given.name)
        if given.command == "run":
            done = lab.run(words, port=given.port, timeout=given.timeout)
            print(f"{done.seconds:.2f} s")
        sent, received = (done.sent, done.received) if given.command == "run" else lab.counters()
        for i in range(hosts):
            print(f"host {i}: sent {sent[i] / 1e6:.3f} MB, received {received[i] / 1e6:.3f} MB")
    except LabError as problem:
        sys.exit(f"netlab: {problem}")


if __name__ == "__main__":
    main()
