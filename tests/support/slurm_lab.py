"""A SLURM cluster of several nodes on one machine, for tests of sbatch files: the real
daemons, nothing simulated.

    with SlurmLab(nodes=2) as slurm:
        job = slurm.submit("--nodes", "2", "job.sbatch", "--max_steps", "10")
        assert slurm.wait(job, timeout=120)["JobState"] == "COMPLETED"

munged, slurmctld and one slurmd a node run as root on the loopback, on free ports, with
all their files in one temporary directory; no service and no file of the machine is
used. They live in a PID namespace of their own, so that they end together with every
job and step when its first process does, and that one dies with the test process,
however it ends. Nodes are called n0, n1, ...; these names do not resolve, as on some
real clusters, and share the machine's file system. A node claims two GPUs, which SLURM
counts but nobody checks: enough for a job to ask for `--gpus-per-node`. A job in the
partition `high` preempts one in `low` (the default), which gets SIGTERM, five seconds
of grace, and is requeued.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

# cred_expire: a requeued job starts again after so many seconds; with the default of
# 120 a test would wait two minutes.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
JobRequeue=1
MinJobAge=600
KillWait=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = (
    "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=2000"
    " Gres=gpu:2 State=UNKNOWN"
)
# SLURM wants a device file for each GPU and only looks whether it is there.
GPUS = "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
# The first process of the namespace. Its shell waits for all, and takes in the orphans
# of jobs.
DAEMONS = """\
munged --foreground --force --socket={folder}/munge.socket --key-file={folder}/munge.key \
--pid-file={folder}/munged.pid --log-file={folder}/munged.log \
--seed-file={folder}/munged.seed --num-threads=1 &
while [ ! -S {folder}/munge.socket ]; do sleep 0.05; done
slurmctld -D -c -f {folder}/slurm.conf &
{nodes}
wait
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
PREFIX = "slurm-lab-"


def missing() -> str | None:
    """Why no cluster can be started here, or None if it can."""
    if os.geteuid() != 0:
        return "the SLURM daemons of a test cluster need root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)} (apt-get install slurm-wlm munge)"
    tried = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no PID namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def remove_ownerless() -> None:
    """Remove directories of test processes that were killed outright."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        found = re.match(rf"{PREFIX}(\d+)-", folder.name)
        if found and not Path("/proc", found.group(1)).exists():
            shutil.rmtree(folder, ignore_errors=True)


def die_with_parent() -> None:
    # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class SlurmLab:
    """The cluster, there between `with` and its end."""

    def __init__(self, nodes: int = 2, cpus: int = 2):
        self.nodes, self.cpus = nodes, cpus

    def __enter__(self) -> SlurmLab:
        remove_ownerless()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        assert len(str(self.folder)) < 90, (
            f"{self.folder}: too long for a socket's path; set TMPDIR to a shorter one"
        )
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        host, (port, *ports) = socket.gethostname().split(".")[0], free_ports(self.nodes + 1)
        nodes = "\n".join(
            NODE.format(i=i, host=host, port=ports[i], cpus=self.cpus) for i in range(self.nodes)
        )
        configuration = CONFIGURATION.format(host=host, port=port, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(configuration, encoding="utf-8")
        (self.folder / "gres.conf").write_text(GPUS, encoding="utf-8")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        daemons = "\n".join(
            f"slurmd -D -N n{i} -f {self.folder}/slurm.conf &" for i in range(self.nodes)
        )
        with (self.folder / "daemons.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c",
                 DAEMONS.format(folder=self.folder, nodes=daemons)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        try:
            self.wait_until_idle(20)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        # takes the namespace's first process with it, and the kernel then everything in
        # there
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.folder.exists():
            # again while a process that is just ending still writes
            shutil.rmtree(self.folder, ignore_errors=True)
            time.sleep(0.05)

    def wait_until_idle(self, timeout: float) -> None:
        """Wait until all nodes are there and free."""
        deadline, states = time.monotonic() + timeout, ""
        while time.monotonic() < deadline:
            states = self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False)
            if states.split() == ["idle"] * self.nodes:
                return
            time.sleep(0.1)
        raise AssertionError(f"the nodes did not become idle: {states!r}\n{self.logs()}")

    def call(
        self,
        *command: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
    ) -> str:
        """Run one of SLURM's commands; gives what it printed."""
        whole = {**os.environ, **self.environment, **(env or {})}
        done = subprocess.run(
            command, env=whole, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """`sbatch` with these words; gives the job's number."""
        return self.call("sbatch", "--parsable", *words, env=env, cwd=cwd).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` tells of a job: JobState, Restarts, ExitCode, ..."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, timeout: float) -> dict[str, str]:
        """Wait until the job has ended; gives what is then known of it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            told = self.job(job)
            if told["JobState"] in ENDED:
                return told
            time.sleep(0.2)
        raise AssertionError(
            f"job {job} is still {told['JobState']} after {timeout:g} s\n{self.logs()}"
        )

    def logs(self, lines: int = 15) -> str:
        """The last lines of every daemon."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(
            f"== {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-lines:])
            for f in files
        )
