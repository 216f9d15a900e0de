"""The lab's language model: texts and who sees which blocks, tuning before the final
runs, what a page says of its rows.
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
from lowrank_comm.compressors import REGISTRY
from lowrank_comm.compressors.powersgd_plus import RESTARTS
from lowrank_comm.lab.data.texts import TextSettings
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.language_model import LanguageModelSettings
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from tests.support import ROOT
from tests.support.language_model_runs import EXPERIMENT, contents, settings_of, tuned

IMPORTS = 200.0
"""Seconds for a case whose processes import transformers first; some when the machine
is idle.
"""


def quiet(share: float, text: str) -> None:
    pass


def run(
    settings: LanguageModelSettings,
    method: str = "powersgd",
    rank: int | None = 2,
    seed: int = 1,
    **extra: Any,
) -> dict:
    params = {
        "part": "final",
        "method": method,
        "rank": rank,
        "seed": seed,
        "learning_rate": 0.004,
    } | extra
    return EXPERIMENT.run(settings, Case("x", params), quiet)


# --- presets and cases ---
PRESETS = {size: load("language_model", size) for size in ("small", "paper")}


@pytest.mark.parametrize(
    ("size", "name"),
    [(size, name) for size, one in PRESETS.items() for name in one.settings.methods],
)
def test_every_method_of_the_presets_works(size: str, name: str) -> None:
    method = PRESETS[size].settings.methods[name]
    kind, restart = method.section["compressor"], method.section.get("restart", "auto")
    if kind not in REGISTRY or restart not in RESTARTS:
        pytest.skip(f"{kind} with restart={restart!r} is not in this version")
    compressor = method.checked(4 if method.has_rank else None, 0).make_compressor()
    assert compressor.json_name == kind


@pytest.mark.parametrize("size", list(PRESETS))
def test_the_keys_of_the_presets_differ(size: str) -> None:
    keys = [case.key for case in EXPERIMENT.cases(PRESETS[size].settings)]
    assert len(set(keys)) == len(keys)


def test_the_papers_preset_is_its_table_5() -> None:
    settings = PRESETS["paper"].settings
    for training, steps, tokens in (
        (settings.training, 10_000, 1.31e9),
        (settings.larger.training, 20_000, 2.62e9),
    ):
        recipe = training.recipe
        assert (recipe.steps, recipe.warmup_steps, recipe.schedule, recipe.clip) == (
            steps,
            steps // 10,
            "cosine",
            1.0,
        )
        assert (
            settings.workers * training.batch * settings.text.sequence_length * steps
            == pytest.approx(tokens, rel=1e-2)
        )
    assert settings.learning_rates == [1e-3, 2e-3, 4e-3]
    assert {m.section.get("restart_every", 200) for m in settings.methods.values()} == {200}


def test_tuning_is_at_one_rank_on_a_seed_of_its_own(text_file: Path) -> None:
    settings = settings_of(text_file, ranks=[2, 4], seeds=[1, 2])
    keys = [case.key for case in EXPERIMENT.cases(settings)]
    assert keys == [
        "tune/adam/lr0.001", "tune/adam/lr0.004", "tune/powersgd/lr0.001", "tune/powersgd/lr0.004",
        "final/adam/seed1", "final/powersgd/r2/seed1", "final/powersgd/r4/seed1",
        "final/adam/seed2", "final/powersgd/r2/seed2", "final/powersgd/r4/seed2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"tuning_seed=2 is among the seeds"):
        settings_of(text_file, seeds=[1, 2], tuning_seed=2)
    with pytest.raises(ValueError, match=r"reference='powersgd' must be .* has_rank: false"):
        settings_of(text_file, reference="powersgd")


def test_a_final_run_takes_the_best_learning_rate_of_its_method(text_file: Path) -> None:
    settings = settings_of(text_file)
    case = next(
        case for case in EXPERIMENT.cases(settings) if case.key == "final/powersgd/r2/seed1"
    )
    others = tuned("adam", {0.001: 1.0, 0.004: 9.0})

    def rate(own: dict[float, float | None]) -> float:
        return EXPERIMENT.prepared(settings, case, others + tuned("powersgd", own)).params[
            "learning_rate"
        ]

    assert rate({0.001: 50.0, 0.004: 40.0}) == 0.004
    assert rate({0.001: 40.0, 0.004: 50.0}) == 0.001
    assert rate({0.001: 50.0, 0.004: None}) == 0.001
    with pytest.raises(
        ConfigError, match=r"lacks the learning rates \[0.004\].*--only 'tune/powersgd/\*'"
    ):
        rate({0.001: 40.0})
    with pytest.raises(ConfigError, match="diverged at every learning rate"):
        rate({0.001: None, 0.004: None})


def test_a_row_depends_on_its_method_and_not_on_which_others_there_are(text_file: Path) -> None:
    settings = settings_of(text_file)
    case = EXPERIMENT.cases(settings)[-1]
    more = settings_of(text_file, seeds=[1, 2, 3], ranks=[2, 4])
    assert EXPERIMENT.depends_on(settings, case) == EXPERIMENT.depends_on(more, case)
    finer = settings_of(text_file, learning_rates=[0.001, 0.002, 0.004])
    assert EXPERIMENT.depends_on(settings, case) != EXPERIMENT.depends_on(finer, case)
    tune = EXPERIMENT.cases(settings)[0]
    assert EXPERIMENT.depends_on(settings, tune) == EXPERIMENT.depends_on(finer, tune)


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
    preset_file.write_text(json.dumps(contents(text_file, methods=methods)))
    preset = load(str(preset_file))
    ended = run_preset(preset, tmp_path / "out", only="tune/*")
    assert set(ended.failed) == {"tune/other/lr0.001", "tune/other/lr0.004"}
    assert "'not_there' is unknown" in ended.failed["tune/other/lr0.001"]
    ended = run_preset(preset, tmp_path / "out", only="final/*")
    assert set(ended.failed) == {"final/other/r2/seed1"}
    rows = {row["key"]: row for row in ordered_rows(preset, tmp_path / "out")}
    assert len(rows) == 6
    for name, key in (("adam", "final/adam/seed1"), ("powersgd", "final/powersgd/r2/seed1")):
        losses = {
            rate: rows[f"tune/{name}/lr{rate:g}"]["result"]["loss"] for rate in (0.001, 0.004)
        }
        assert rows[key]["params"]["learning_rate"] == min(losses, key=lambda rate: losses[rate])
    page = EXPERIMENT.page(preset.settings, list(rows.values()))
    shown = set(re.findall(r"\]\(([\w-]+)\.png\)", page))
    assert shown == set(EXPERIMENT.figures(preset.settings, list(rows.values())))
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    run_preset(preset, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


# --- a run ---
def test_methods_start_from_the_same_model_and_batches(text_file: Path) -> None:
    settings, state = settings_of(text_file), torch.get_rng_state()
    dense, compressed, other = run(settings, "adam", None), run(settings), run(settings, seed=2)
    # before the first update
    assert dense["curve"][0] == compressed["curve"][0]
    assert dense["curve"][-1] != compressed["curve"][-1]
    assert other["curve"][0] != dense["curve"][0]
    # from the seed, to the last bit
    assert run(settings) == compressed
    assert torch.equal(torch.get_rng_state(), state)
    assert dense["sent"]["ratio"] == pytest.approx(1.0, abs=1e-2)
    assert compressed["sent"]["ratio"] > 3
    assert compressed["perplexity"] == pytest.approx(math.exp(compressed["loss"]))


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
    assert found["perplexity"] is None
    # given up after so many skipped steps
    assert found["steps"] < 60


def as_process(rank: int, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    parsed = LanguageModelSettings.model_validate(settings)
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
        run(LanguageModelSettings.model_validate(settings))
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
    assert (tmp_path / "out" / "language_model.md").is_file()


def test_a_model_is_trained_on_a_stream_of_documents(
    text_file: Path, documents: TextSettings
) -> None:
    settings = settings_of(text_file, text=documents.model_dump())
    found = run(settings)
    assert not found["diverged"]
    assert found["steps"] == 4
