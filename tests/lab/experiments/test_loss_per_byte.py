"""The study of loss per byte: tuning before results, importance of cases, one model
for every method, bases and peers.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.config import Section
from lowrank_comm.lab import peers
from lowrank_comm.lab.data.texts import TextSettings
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.loss_per_byte import LossPerByteSettings
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from lowrank_comm.lab.training.bases import Base
from tests.support import ROOT
from tests.support.loss_per_byte_runs import (
    EXPERIMENT,
    contents,
    dense_tuning,
    settings_of,
    tuning,
)

IMPORTS = 200.0
"""Seconds for a case whose processes import transformers first; some when the machine
is idle.
"""


def quiet(share: float, text: str) -> None:
    pass


def run(
    settings: LossPerByteSettings, method: str = "powersgd", seed: int = 1, **extra: Any
) -> dict:
    params = {
        "part": "final",
        "base": "adamw",
        "method": method,
        "seed": seed,
        "learning_rate": 0.004,
        "beta2": 0.99,
        "factor": 1.0,
    } | extra
    return EXPERIMENT.run(settings, Case("x", params), quiet)


# --- presets and cases ---
PRESETS = {size: load("loss_per_byte", size) for size in ("small", "paper")}


@pytest.mark.parametrize(
    ("size", "name"),
    [(size, name) for size, one in PRESETS.items() for name in one.settings.methods],
)
def test_every_method_of_the_presets_works(size: str, name: str) -> None:
    method = PRESETS[size].settings.methods[name]
    if method.peer is not None:
        weights = {"w": torch.zeros(8, 6), "b": torch.zeros(6)}
        assert peers.start(method.peer, weights, 2, Base("adamw", 1e-3), 1e-3, 0).optimizer
    else:
        kind = Section.parse(method.section).make_compressor().json_name
        assert kind == method.section["compressor"]


def test_the_small_preset_is_as_the_protocol_says() -> None:
    """Eight seeds for the main methods, none of which any tuning has seen."""
    settings = PRESETS["small"].settings
    assert len(settings.seeds) == 8
    assert len(settings.tuning_seeds) == 3
    keys = [case.key for case in EXPERIMENT.cases(settings)]
    assert len(set(keys)) == len(keys)
    stages = [EXPERIMENT.stage(settings, case) for case in EXPERIMENT.cases(settings)]
    assert stages == sorted(stages)


def test_the_papers_preset_is_its_table_5() -> None:
    settings = PRESETS["paper"].settings
    recipe = settings.training.recipe
    assert (recipe.steps, recipe.warmup_steps, recipe.schedule, recipe.clip) == (
        10_000,
        1000,
        "cosine",
        1.0,
    )
    tokens = settings.workers * settings.training.batch * settings.text.sequence_length
    assert tokens * recipe.steps == pytest.approx(1.31e9, rel=1e-2)
    assert settings.bases["adamw"].learning_rates == [1e-3, 2e-3, 4e-3]
    sections = [method.section for method in settings.methods.values()]
    assert {section.get("restart_every", 200) for section in sections} == {200}


def test_cases_come_by_importance(text_file: Path) -> None:
    methods = contents(text_file)["settings"]["methods"]
    methods["late"] = {"label": "late", "section": {"compressor": "identity"}, "few": True}
    settings = settings_of(
        text_file, methods=methods, seeds=[1, 2], few_seeds=1, tuning_seeds=[10], factors=[1.0, 2.0]
    )
    assert [case.key for case in EXPERIMENT.cases(settings)] == [
        "tune/adamw/dense/lr0.001/b0.99/seed10", "tune/adamw/dense/lr0.004/b0.99/seed10",
        "tune/adamw/powersgd/x1/seed10", "tune/adamw/powersgd/x2/seed10",
        "final/adamw/dense/seed1", "final/adamw/powersgd/seed1",
        "final/adamw/dense/seed2", "final/adamw/powersgd/seed2",
        "tune/adamw/late/x1/seed10", "tune/adamw/late/x2/seed10", "final/adamw/late/seed1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"seed 2 is in tuning_seeds and in seeds"):
        settings_of(text_file, seeds=[1, 2], tuning_seeds=[2])
    with pytest.raises(ValueError, match=r"either a section or a peer"):
        settings_of(text_file, methods={"x": {"label": "x"}})


def test_rates_come_from_the_means_over_the_tuning_seeds(text_file: Path) -> None:
    settings = settings_of(text_file)
    cases = {case.key: case for case in EXPERIMENT.cases(settings)}
    dense = dense_tuning({0.001: [4.0, 7.0], 0.004: [5.0, 5.0]})

    def found(key: str, rows: list) -> tuple[float, float]:
        params = EXPERIMENT.prepared(settings, cases[key], rows).params
        return params["factor"], params["learning_rate"]

    assert found("final/adamw/dense/seed1", dense) == (1.0, 0.004)
    assert found("tune/adamw/powersgd/x0.5/seed10", dense) == (0.5, 0.002)
    own = tuning("powersgd", {0.5: [4.0, 5.0], 1.0: [5.0, 5.0]})
    assert found("final/adamw/powersgd/seed1", dense + own) == (0.5, 0.002)
    # a point that diverged on one seed is not chosen
    own = tuning("powersgd", {0.5: [1.0, None], 1.0: [5.0, 5.0]})
    assert found("final/adamw/powersgd/seed1", dense + own) == (1.0, 0.004)
    with pytest.raises(ConfigError, match=r"3 tuning runs of 'powersgd' .*'tune/adamw/powersgd/"):
        found("final/adamw/powersgd/seed1", dense + own[:1])
    lost = tuning("powersgd", {0.5: [None, None], 1.0: [None, 1.0]})
    with pytest.raises(ConfigError, match="diverged at every point"):
        found("final/adamw/powersgd/seed1", dense + lost)


def test_a_row_depends_on_its_method_and_not_on_which_others_there_are(text_file: Path) -> None:
    settings = settings_of(text_file)
    tune, case = EXPERIMENT.cases(settings)[0], EXPERIMENT.cases(settings)[-1]
    more = settings_of(text_file, seeds=[1, 2, 3], few_seeds=2)
    finer = settings_of(text_file, factors=[0.5, 1.0, 2.0])
    wider = settings_of(text_file, bases={"adamw": {"learning_rates": [0.001], "beta2": [0.99]}})
    assert EXPERIMENT.depends_on(settings, case) == EXPERIMENT.depends_on(more, case)
    assert EXPERIMENT.depends_on(settings, case) != EXPERIMENT.depends_on(finer, case)
    assert EXPERIMENT.depends_on(settings, case) != EXPERIMENT.depends_on(wider, case)
    assert EXPERIMENT.depends_on(settings, tune) == EXPERIMENT.depends_on(wider, tune)


def test_a_row_depends_on_what_is_in_the_text(tmp_path: Path) -> None:
    def told(name: str, content: str | None) -> dict[str, Any]:
        if content is not None:
            (tmp_path / name).write_text(content)
        return TextSettings(file=str(tmp_path / name)).what_it_says()

    one, other = told("one.txt", "a"), told("other.txt", "b")
    assert one["sha256"] != other["sha256"]
    with pytest.raises(ConfigError, match=r"third\.txt'.*no such file"):
        told("third.txt", None)


def test_a_whole_run_tunes_first_and_goes_on_where_it_was(text_file: Path, tmp_path: Path) -> None:
    """A compressor that there is not fails its own cases only; a second call runs
    nothing that is finished.
    """
    methods = contents(text_file)["settings"]["methods"]
    methods["other"] = {"label": "other", "section": {"compressor": "not_there"}}
    preset_file = tmp_path / "tiny.yaml"
    preset_file.write_text(json.dumps(contents(text_file, methods=methods, tuning_seeds=[10])))
    preset = load(str(preset_file))
    ended = run_preset(preset, tmp_path / "out")
    assert set(ended.failed) == {
        "tune/adamw/other/x0.5/seed10",
        "tune/adamw/other/x1/seed10",
        "final/adamw/other/seed1",
    }
    assert "'not_there' is unknown" in ended.failed["tune/adamw/other/x1/seed10"]
    assert "2 tuning runs of 'other'" in ended.failed["final/adamw/other/seed1"]
    rows = {row["key"]: row for row in ordered_rows(preset, tmp_path / "out")}
    assert len(rows) == 6
    losses = {
        rate: rows[f"tune/adamw/dense/lr{rate:g}/b0.99/seed10"]["result"]["loss"]
        for rate in (0.001, 0.004)
    }
    chosen = rows["final/adamw/dense/seed1"]["params"]["learning_rate"]
    assert chosen == min(losses, key=lambda rate: losses[rate])
    page = EXPERIMENT.page(preset.settings, list(rows.values()))
    shown = set(re.findall(r"\]\(([\w-]+)\.png\)", page))
    assert shown == set(EXPERIMENT.figures(preset.settings, list(rows.values())))
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    run_preset(preset, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


# --- a run ---
def test_methods_start_from_the_same_model_and_batches(text_file: Path) -> None:
    settings, state = settings_of(text_file), torch.get_rng_state()
    dense, compressed, other = run(settings, "dense"), run(settings), run(settings, seed=2)
    # before the first update
    assert dense["curve"][0] == compressed["curve"][0]
    assert dense["curve"][-1] != compressed["curve"][-1]
    assert other["curve"][0] != dense["curve"][0]
    # from the seed, to the last bit
    assert run(settings) == compressed
    assert torch.equal(torch.get_rng_state(), state)
    assert dense["sent"]["ratio"] == pytest.approx(1.0, abs=1e-2)
    assert compressed["sent"]["ratio"] > 3


def test_peers_and_muon_start_there_too(text_file: Path) -> None:
    """The first training loss is that of the weights, whatever then steps them; k = all
    of SparseLoCo's step is uncompressed training.
    """
    methods = {
        "whole": {"label": "all", "peer": {"kind": "sparse", "k": 4096, "bits": None, "decay": 0}},
        "demo": {"label": "DeMo", "peer": {"kind": "demo"}},
    }
    settings = settings_of(text_file, methods=methods)
    for base in ("adamw", "muon"):
        dense = run(settings, "dense", base=base)
        whole, demo = (run(settings, name, base=base) for name in ("whole", "demo"))
        assert whole["loss"] == pytest.approx(dense["loss"], rel=1e-5)
        assert demo["curve"][0] == dense["curve"][0]
        assert demo["loss"] != pytest.approx(dense["loss"], rel=1e-4)
        assert demo["sent"]["ratio"] > 10
    assert dense["loss"] != pytest.approx(run(settings, "dense")["loss"], rel=1e-4)


def test_training_lowers_the_held_out_loss(text_file: Path) -> None:
    recipe = {"steps": 40, "warmup_steps": 4}
    settings = settings_of(text_file, training={"model": "S", "batch": 2, "recipe": recipe})
    # log of the vocabulary: nothing learnt
    assert run(settings)["loss"] < math.log(300) - 1.5


def test_micro_batches_change_nothing(text_file: Path) -> None:
    whole = run(settings_of(text_file))
    micro = run(
        settings_of(
            text_file, training=contents(text_file)["settings"]["training"] | {"micro_batch": 1}
        )
    )
    assert micro["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_run_that_diverges_is_a_result(text_file: Path) -> None:
    recipe = {"steps": 60, "warmup_steps": 0, "clip": None}
    settings = settings_of(text_file, training={"model": "S", "batch": 1, "recipe": recipe})
    found = run(settings, learning_rate=1e30)
    assert found["diverged"]
    assert not math.isfinite(found["loss"])
    # given up after so many skipped steps
    assert found["steps"] < 60


def as_process(rank: int, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    parsed = LossPerByteSettings.model_validate(settings)
    found = run(parsed, seed=seed)
    return {key: found[key] for key in ("loss", "curve", "sent")}


def test_processes_and_the_simulation_train_the_same_model(text_file: Path, gloo: Any) -> None:
    """Each process is a worker, with a CompressedOptimizer; the held-out loss is
    shared, and the same on all.
    """
    settings = settings_of(text_file)
    simulated = run(settings)
    ranks = gloo.run(as_process, 2, settings.model_dump(mode="json"), 1, timeout=IMPORTS)
    assert ranks[0]["loss"] == ranks[1]["loss"] == pytest.approx(simulated["loss"], rel=1e-5)
    own, counted = ranks[0]["sent"]["bytes"], simulated["sent"]["bytes"]
    # workers compare settings once
    assert {kind: count for kind, count in own.items() if kind != "fingerprint"} == counted
    # each has batches of its own
    assert ranks[0]["curve"][0][1] != ranks[1]["curve"][0][1]
    other = gloo.run(as_process, 2, settings.model_dump(mode="json"), 2, timeout=IMPORTS)
    assert other[0]["loss"] != pytest.approx(simulated["loss"], rel=1e-5)


def with_wrong_number(rank: int, settings: dict[str, Any]) -> str:
    try:
        run(LossPerByteSettings.model_validate(settings))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_another_number_of_processes_is_refused(text_file: Path, gloo: Any) -> None:
    settings = settings_of(text_file, workers=3).model_dump(mode="json")
    assert all(
        "workers=3, but 2 processes" in message
        for message in gloo.run(with_wrong_number, 2, settings, timeout=IMPORTS)
    )


@pytest.mark.slow
def test_torchrun_writes_every_row_once(text_file: Path, tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(json.dumps(contents(text_file)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "lowrank_comm.lab", "run", str(preset), "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    keys = [
        json.loads(line)["key"]
        for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    ]
    assert keys == [case.key for case in EXPERIMENT.cases(load(str(preset)).settings)]
    assert (tmp_path / "out" / "loss_per_byte.md").is_file()


def test_a_model_is_trained_on_a_stream_of_documents(
    text_file: Path, documents: TextSettings
) -> None:
    settings = settings_of(text_file, text=documents.model_dump())
    found = run(settings)
    assert not found["diverged"]
    assert found["steps"] == 4
