"""Which checkpoint of a Trainer's folder a run goes on from: the newest complete one.

    # from a shell: prints the folder, or nothing where there is none
    python examples/checkpoints.py runs/ds_powersgd_plus

Trainer writes a checkpoint's files one after the other into `checkpoint-<step>`, and
`trainer_state.json` last. A job that is killed while it saves leaves a folder that has
a number and no state, or half of it; transformers' own search takes the highest number,
and such a run cannot be resumed until somebody removes the folder. Python's standard
library only: job.sh of examples/slurm calls this file, too.
"""

from __future__ import annotations

import json
import pickletools
import re
import sys
import zipfile
from pathlib import Path
from typing import Any


def saved_by(folder: Path) -> int:
    """Return how many ranks have saved a checkpoint, by what lies in it: the
    compressor's state in its own file or in optimizer.pt, or else the files that each
    rank has written of a sharded optimizer; 0 if nothing tells.
    """
    files = sorted(folder.rglob("lowrank_comm-*.safetensors"), key=lambda f: f.stat().st_mtime)
    for number in (_of_safetensors(files[-1]) if files else 0, _of_torch(folder / "optimizer.pt")):
        if number:
            return number
    # DeepSpeed's and FSDP's
    shards = [*folder.glob("*/*zero_pp_rank_*_optim_states.pt"), *folder.glob("*/__*_*.distcp")]
    found = (re.search(r"zero_pp_rank_(\d+)|__(\d+)_\d+\.distcp", file.name) for file in shards)
    return max((int(one[1] or one[2]) + 1 for one in found if one), default=0)


def _of_safetensors(file: Path) -> int:
    """Return the number of ranks in the header of a file of lowrank_comm; 0 if it
    cannot be read.
    """
    try:
        with file.open("rb") as opened:
            header = opened.read(min(int.from_bytes(opened.read(8), "little"), 10**8))
        return int(json.loads(json.loads(header)["__metadata__"]["tag"])["world"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _of_torch(file: Path) -> int:
    """Return the number of ranks in the entry "lowrank_comm" of a state dict, which is
    not unpickled; 0 if there is none.
    """
    try:
        with zipfile.ZipFile(file) as opened:
            (name,) = (name for name in opened.namelist() if name.endswith("/data.pkl"))
            words: list[Any] = [word for _, word, _ in pickletools.genops(opened.read(name))]
        # "world", where it is remembered, and its value
        return int(words[words.index("world", words.index("lowrank_comm")) + 2])
    except (OSError, ValueError, zipfile.BadZipFile, IndexError, TypeError):
        return 0


def is_complete(folder: Path) -> bool:
    """Return whether everything of a checkpoint has been written: trainer_state.json
    can be read, what torch.save wrote beside it has its end, and where several ranks
    save their random numbers' state, all have.

    How many there are is not in Trainer's own files. Where nothing else tells
    (`saved_by`: DDP without compression), the last ranks of those that had not saved
    theirs when they were killed are not missed. Such a run goes on from the right
    weights, and these ranks from other random numbers.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # rank 0 may have finished when another rank was killed
    ranks = {int(file.stem.rpartition("_")[2]) for file in folder.glob("rng_state_[0-9]*.pth")}
    saved = [*folder.glob("*.pth"), *folder.glob("*.pt")]
    return (
        "global_step" in state
        and (not ranks or ranks >= set(range(saved_by(folder) or max(2, len(ranks)))))
        and all(zipfile.is_zipfile(file) for file in saved)
    )


def newest_complete(output_dir: Path) -> Path | None:
    """Return the complete `checkpoint-<step>` of the highest step in a run's folder, or
    None.
    """
    numbered = [
        (int(found[1]), folder)
        for folder in output_dir.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    return next(
        (folder for _, folder in sorted(numbered, reverse=True) if is_complete(folder)), None
    )


def find_checkpoint(asked: str | bool | None, output_dir: Path) -> str | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        asked: a folder; "true" for the newest complete checkpoint of this run; "auto"
            for the same, or the beginning where there is none yet; None or "false" for
            the beginning.
        output_dir: the run's folder.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it is not complete.
    """
    word = str(asked or "false").lower()
    if word == "false":
        return None
    if word in ("true", "auto"):
        found = newest_complete(output_dir)
        if found is not None or word == "auto":
            return None if found is None else str(found)
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: no complete checkpoint there (looked for"
            f" {output_dir / 'checkpoint-*'} with a whole trainer_state.json). With auto instead,"
            " the run starts from the beginning."
        )
    if not is_complete(Path(str(asked))):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: no complete checkpoint there (its"
            " trainer_state.json, which is written last, is missing or cut off). With true"
            " instead, the run goes on from its newest complete one."
        )
    return str(asked)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/checkpoints.py OUTPUT_DIR")
    if (newest := newest_complete(Path(sys.argv[1]))) is not None:
        print(newest)
