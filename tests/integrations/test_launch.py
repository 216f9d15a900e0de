"""The launcher: what it hands on, and an unchanged Trainer script under `deepspeed
--module`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_comm.integrations.launch import main, parse
from tests.support import ROOT

SUPPORT = ROOT / "tests" / "support"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train.py"], (False, "train.py", [])),
        # DeepSpeed's launcher puts the rank first; the script sees it where `deepspeed
        # train.py` would put it.
        (
            ["--local_rank=1", "train.py", "--lr", "3"],
            (False, "train.py", ["--local_rank=1", "--lr", "3"]),
        ),
        (
            ["train.py", "--local_rank=1", "-m", "--", "x"],
            (False, "train.py", ["--local_rank=1", "-m", "--", "x"]),
        ),
        (
            ["--local_rank=0", "-m", "package.train", "--help"],
            (True, "package.train", ["--local_rank=0", "--help"]),
        ),
    ],
)
def test_the_scripts_own_words_stay_its_own(
    given: list[str], expected: tuple[bool, str, list[str]]
) -> None:
    assert parse(given) == expected


@pytest.mark.parametrize(
    "given",
    [[], ["--local", "1", "train.py"], ["--mod", "package.train"], ["--unknown", "train.py"]],
)
def test_nothing_is_abbreviated_or_guessed(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(given)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_sees_what_python_would_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "neighbour.py").write_text("value = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys, neighbour\n"
        "seen = [__name__, sys.argv, neighbour.value, sys.path[0], __file__]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(seen))\n"
    )
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    main([str(script), str(tmp_path / "seen"), "--x"])
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen == [
        "__main__",
        [str(script), str(tmp_path / "seen"), "--x"],
        7,
        str(tmp_path),
        str(script),
    ]


@pytest.mark.slow
def test_an_unchanged_trainer_script_is_compressed_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
        "lowrank_comm": {"compressor": "powersgd_plus", "rank": 2, "restart_every": 4},
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = subprocess.run(
        [
            str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port",
            str(port), "--module", "lowrank_comm.integrations.launch",
            str(SUPPORT / "plain_trainer.py"), "--deepspeed", str(tmp_path / "ds.json"),
            "--output_dir", str(out),
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    # once an engine, on rank 0 only
    assert ran.stdout.count("lowrank_comm: powersgd_plus") == 2
    assert "ZeRO stage 2 (DeepSpeedZeroOptimizer)" in ran.stdout
    seen = json.loads((out / "seen.json").read_text())
    assert seen["name"] == "__main__"
    assert seen["local_rank"] == 0
    assert seen["argv"][:2] == [str(SUPPORT / "plain_trainer.py"), "--local_rank=0"]
    assert seen["path"] == str(SUPPORT)
    whole, resumed = seen["curves"]["whole"], seen["curves"]["resumed"]
    assert list(whole) == list("123456")
    assert list(resumed)[-3:] == list("456")
    for step in "456":
        assert resumed[step] == pytest.approx(whole[step], rel=1e-5)
    assert whole["6"][0] < whole["1"][0]
    assert list((out / "checkpoint-3" / "global_step3").glob("lowrank_comm-*.safetensors"))
