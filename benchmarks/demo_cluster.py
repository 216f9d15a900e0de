"""Seconds to a common loss on four hosts with slow links: the main job uncompressed,
with 16 bits a number on the wire, and compressed.

    # as root, Linux, iproute2; about 25 minutes at 100 Mbit/s and 8 at 1 Gbit/s
    make demo-cluster
    make demo-cluster DEMO_ARGS="--networks 100mbit"
    # a minute or two, for a look
    make demo-cluster DEMO_ARGS=--quick

On each network, examples/train.py runs whole with each JSON of `RUNS`, one process a
host, in the network of netlab.py: real sockets, and links that the kernel holds to the
rate. The uncompressed run comes first; the mean loss of its last steps is what the
others have to come to (`demo.crossing`). Every run has a schedule of its own, fixed
here beforehand: `steps` of the uncompressed one times `Run.longer`.

A run that has ended is kept as a row in the folder. The same command goes on with the
next one, as long as no source and no setting has changed. Not kept is what a run was in
the middle of: the longest takes about 12 minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import typer

from benchmarks.demo.crossing import first_step_at, seconds_after, trailing_means
from benchmarks.demo.page import section
from benchmarks.demo.training import Job, prepare_text, train
from benchmarks.evidence import RESULTS, ROOT, envelope, read, summary, write
from benchmarks.netlab import Lab, LabError, exit_on_sigterm, missing
from lowrank_comm.lab.runner.rows import Rows, fingerprint, read_lines
from lowrank_comm.lab.runner.sources import sources_hash

# what the rows depend on: a page may be laid out anew without a new run
MEASURING = ("benchmarks/demo/training.py", "benchmarks/netlab.py")
# started, and not imported
STARTED = ("examples/train.py", "integrations/deepspeed.py")


@dataclass(frozen=True)
class Run:
    """A way to average the gradients.

    Attributes:
        label: in tables.
        config: DeepSpeed JSON in configs/.
        longer: steps of its schedule over those of the uncompressed run.
    """

    label: str
    config: str
    longer: float

    @property
    def path(self) -> Path:
        """The JSON file."""
        return ROOT / "configs" / self.config


RUNS = {
    "uncompressed": Run("uncompressed", "ds_uncompressed.json", 1.0),
    # a rounding may end a hair above the target: a twentieth more steps
    "fp16": Run("fp16 on the wire", "ds_fp16_wire.json", 1.05),
    "balanced": Run("balanced", "ds_balanced.json", 1.5),
}
NETWORKS = {"100mbit": ("100 Mbit/s", 100.0), "1gbit": ("1 Gbit/s", 1000.0)}
HOSTS = 4
STEPS = 240
# k of the trailing mean
WINDOW = 20


def run(
    networks: list[str],
    job: Job,
    steps: int,
    window: int,
    folder: Path,
    target: Path,
    hosts: int = HOSTS,
    quick: bool = False,
) -> None:
    """Train what is not in the folder yet, and write the JSON file.

    Args:
        networks: keys of `NETWORKS`.
        job: what is trained.
        steps: of the uncompressed run.
        window: k of the trailing mean.
        folder: of rows and of the runs' own files.
        target: the JSON file.
        hosts: one process each.
        quick: whether this is for a test.
    """
    evidence = envelope(__file__, seeds=[job.seed], quick=quick, runs=STARTED)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sources = sources_hash(*(ROOT / path for path in (*MEASURING, *STARTED)))
    rows, prepared, before = Rows(folder), False, 0
    found: dict[str, Any] = {}
    for network in networks:
        label, mbit = NETWORKS[network]
        of_network: dict[str, Any] = {}
        for name, one in RUNS.items():
            length = round(one.longer * steps)
            settings = [asdict(job), length, hosts, mbit, json.loads(one.path.read_text())]
            key = fingerprint([sources, settings])
            known = {row["key"]: row["result"] for row in read_lines(rows.path)}
            if key in known:
                before += 1
            else:
                if not prepared:
                    prepare_text(job)
                    prepared = True
                print(f"{label}: {one.label}, {length} steps", flush=True)
                with Lab(hosts, mbit) as lab:
                    result = train(lab, job, one.path, length, folder / network / name)
                rows.append({"key": key, "network": network, "run": name, "result": result})
                known[key] = result
            of_network[name] = known[key]
        found[network] = {"label": label, "mbit": mbit, **compared(of_network, window)}
    results = {
        "hosts": hosts,
        "cores": evidence["machine"]["cores"],
        "job": asdict(job),
        "window": window,
        "runs": {
            name: {
                "label": one.label,
                "config": one.config,
                "content": json.loads(one.path.read_text()),
                "steps": round(one.longer * steps),
            }
            for name, one in RUNS.items()
        },
        "rows_of_earlier_calls": before,
        "difference_between_networks": differences(found),
        "networks": found,
    }
    write(target, evidence, results)


def compared(runs: dict[str, Any], window: int) -> dict[str, Any]:
    """Return the target of a network's runs, and the runs with when they came to it.

    Args:
        runs: name -> what `train` returned; with the key "uncompressed".
        window: k of the trailing mean.
    """
    target = trailing_means(runs["uncompressed"]["loss"], window)[-1]
    came: dict[str, tuple[int, float] | None] = {}
    for name, one in runs.items():
        step = first_step_at(one["loss"], target, window)
        came[name] = None if step is None else (step, seconds_after(one["seconds"], step))
    # the uncompressed run comes to its own end at the latest
    reference = came["uncompressed"]
    assert reference is not None
    whole = {}
    for name, one in runs.items():
        own, sent = came[name], statistics.fmean(one["sent_by_host"]) / 1e6
        timed = [s for s, settled in zip(one["seconds"], one["settled"], strict=True) if settled]
        whole[name] = {
            **one,
            "steps": len(one["loss"]),
            "final_loss": trailing_means(one["loss"], window)[-1],
            "step_seconds": summary(timed),
            "sent_mb": sent,
            "sent_mb_per_step": sent / len(one["loss"]),
            "crossing": own
            and {"step": own[0], "seconds": own[1], "times_as_fast": reference[1] / own[1]},
        }
    return {"target": target, "runs": whole}


def differences(found: dict[str, Any]) -> dict[str, float]:
    """Return, of each run, the largest difference of a step's loss between networks."""
    networks = list(found.values())
    return {
        name: max(
            abs(a - b)
            for other in networks[1:]
            for a, b in zip(
                networks[0]["runs"][name]["loss"], other["runs"][name]["loss"], strict=True
            )
        )
        for name in (networks[0]["runs"] if len(networks) > 1 else ())
    }


def main(
    networks: Annotated[str, typer.Option(help="of " + ", ".join(NETWORKS))] = ",".join(NETWORKS),
    model: Annotated[str, typer.Option(help="S, M or L: 1, 5 or 12 million parameters")] = "M",
    batch: Annotated[int, typer.Option(help="sequences of a host and step", min=1)] = 1,
    sequence: Annotated[int, typer.Option(help="tokens of a sequence", min=8)] = 128,
    seed: Annotated[int, typer.Option(help="of weights and data")] = 42,
    steps: Annotated[int, typer.Option(help="of the uncompressed run", min=WINDOW)] = STEPS,
    folder: Annotated[Path, typer.Option(help="of rows and runs")] = Path("runs/demo_cluster"),
    quick: Annotated[bool, typer.Option(help="the small model, few steps, 1 Gbit/s")] = False,
    target: Annotated[Path | None, typer.Option("--json", help="the file of figures")] = None,
) -> None:
    """Train each way on each network, and print the seconds to the common loss."""
    exit_on_sigterm()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    reason = missing()
    if reason is not None:
        sys.exit(f"demo_cluster: {reason}")
    names, window = networks.split(","), WINDOW
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        sys.exit(f"demo_cluster: no network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
    if quick:
        names, model, steps, window = ["1gbit"], "S", 20, 5
    if target is None:
        target = (folder if quick else RESULTS) / "demo_cluster.json"
    job = Job(model, batch, sequence, seed=seed)
    try:
        run(names, job, steps, window, folder, target, quick=quick)
    except LabError as problem:
        sys.exit(f"demo_cluster: {problem}")
    print(section(read(target)))
    print(f"all figures: {target}")


if __name__ == "__main__":
    typer.run(main)
