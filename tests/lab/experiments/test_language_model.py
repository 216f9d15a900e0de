"""The lab's language model: texts and who sees which blocks, tuning before the final
runs, what a page says of its rows.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_comm import ConfigError
from lowrank_comm.compressors import REGISTRY
from lowrank_comm.compressors.powersgd_plus import RESTARTS
from lowrank_comm.lab.data.corpora import load_corpus
from lowrank_comm.lab.data.models import LLAMAS, new_llama, random_state
from lowrank_comm.lab.data.texts import TextSettings, load_text
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.comparison import Spread, difference, ratio, student_t, verdict
from lowrank_comm.lab.experiments.language_model import LanguageModel, LanguageModelSettings
from lowrank_comm.lab.experiments.language_model_results import PAPER
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.runner.running import ordered_rows, run_preset
from lowrank_comm.lab.training.training_loop import Recipe
from lowrank_comm.lab.training.workers import join_processes
from tests.support import ROOT

EXPERIMENT = LanguageModel()
IMPORTS = 200.0
"""Seconds for a case whose processes import transformers first; some when the machine
is idle.
"""


def quiet(share: float, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{k} to be or not {k * k}\n" for k in range(400)), encoding="utf-8")
    return path


def contents(text_file: Path, **changes: Any) -> dict[str, Any]:
    """A preset's content, small enough for a test."""
    settings: dict[str, Any] = {
        "text": {
            "file": str(text_file), "vocabulary": 300, "sequence_length": 16, "held_out_tokens": 320,
            "cache": str(text_file.parent / "cache"),
        },
        "workers": 2,
        "training": {"model": "S", "batch": 2, "recipe": {"steps": 4, "warmup_steps": 1}},
        "reference": "adam",
        "methods": {
            "adam": {"label": "full precision", "section": {"compressor": "identity"}, "has_rank": False},
            "powersgd": {"label": "PowerSGD", "section": {"compressor": "powersgd"}},
        },
        "ranks": [2],
        "learning_rates": [0.001, 0.004],
        "tuning_rank": 2,
        "tuning_seed": 0,
        "seeds": [1],
    }  # fmt: skip
    return {"experiment": "language_model", "settings": settings | changes}


def settings_of(text_file: Path, **changes: Any) -> LanguageModelSettings:
    return LanguageModelSettings.model_validate(contents(text_file, **changes)["settings"])


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


# ------------------------------------------------------------------ presets and cases


PRESETS = {size: load("language_model", size) for size in ("small", "paper")}


@pytest.mark.parametrize(
    ("size", "name"),
    [(size, name) for size, one in PRESETS.items() for name in one.settings.methods],
)
def test_every_method_of_the_presets_works(size: str, name: str) -> None:
    method = PRESETS[size].settings.methods[name]
    kind, restart = method.section["compressor"], method.section.get("restart", "svd")
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


def test_the_papers_models_have_the_size_of_their_names() -> None:
    with torch.device("meta"):
        for name, millions in (("60M", 58.1), ("130M", 134.1)):
            model = new_llama(name, LLAMAS[name]["vocab_size"], 256)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
                millions, abs=0.1
            )


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


def tuned(method: str, perplexities: dict[float, float | None]) -> list[dict]:
    return [
        {
            "key": "",
            "params": {"part": "tune", "method": method, "learning_rate": rate},
            "result": {"perplexity": perplexity},
        }
        for rate, perplexity in perplexities.items()
    ]


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


# ------------------------------------------------------------------ a run


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


def factors(recipe: Recipe) -> list[float]:
    """The learning rate of each step, where the highest is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = recipe.scheduler(optimizer)
    found = []
    for _ in range(recipe.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules() -> None:
    cosine = factors(Recipe(steps=10, warmup_steps=2, schedule="cosine"))
    assert [cosine[t] for t in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    linear = factors(Recipe(steps=10, warmup_steps=2, schedule="linear"))
    assert [linear[t] for t in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])


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


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="device='tpu' is unknown"):
        join_processes("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            join_processes("cuda")


def test_the_random_state_comes_back() -> None:
    before = torch.get_rng_state()
    with random_state(3):
        first = torch.rand(2)
    with random_state(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ texts


def test_workers_share_the_blocks_and_the_seed_gives_the_order(text_file: Path) -> None:
    text = load_text(settings_of(text_file).text)

    def epoch(seed: int) -> list[tuple[int, ...]]:
        steps = 40
        streams = [list(islice(text.batches(worker, 2, 1, seed), steps)) for worker in (0, 1)]
        return [tuple(block.tolist()) for stream in streams for batch in stream for block in batch]

    first = epoch(1)
    # no block twice in an epoch, whichever the worker
    assert len(set(first)) == len(first) == 80
    assert epoch(1) == first
    assert epoch(2) != first
    judged = [{tuple(block.tolist()) for block in text.held_out(part)} for part in (0, 1)]
    assert len(judged[0]) == len(judged[1]) == 10
    assert not judged[0] & judged[1]
    assert not (judged[0] | judged[1]) & set(first)


@pytest.fixture
def documents(tmp_path: Path, text_file: Path) -> TextSettings:
    """C4's files in small: JSON lines, one of them compressed, and a tokenizer in a
    folder.
    """
    load_corpus(text_file.parent / "cache", str(text_file), 300).tokenizer.save_pretrained(
        tmp_path / "tokenizer"
    )
    rows = [json.dumps({"text": f"document {k} " * 12, "url": "x"}) for k in range(30)]
    (tmp_path / "c4-train.0.json").write_text("\n".join(rows[:10]) + "\n")
    with gzip.open(tmp_path / "c4-train.1.json.gz", "wt") as file:
        file.write("\n".join(rows[10:20]) + "\n")
    (tmp_path / "c4-validation.json").write_text("\n".join(rows[20:]) + "\n")
    return TextSettings(
        documents=str(tmp_path / "c4-train.*"), held_out_documents=str(tmp_path / "c4-validation.json"),
        tokenizer=str(tmp_path / "tokenizer"), sequence_length=16, held_out_tokens=160,
    )  # fmt: skip


def test_a_stream_of_documents_is_dealt_to_the_workers(documents: TextSettings) -> None:
    text = load_text(documents)

    def numbers(blocks: list[torch.Tensor]) -> set[str]:
        return set(
            re.findall(r"document (\d+) ", text._tokenizer.decode(torch.cat(blocks).flatten()))
        )

    seen = [numbers(list(islice(text.batches(worker, 2, 2, 0), 120))) for worker in (0, 1)]
    # 120 batches are more than one pass over the files
    assert seen[0] == {str(k) for k in range(0, 20, 2)}
    assert seen[1] == {str(k) for k in range(1, 20, 2)}
    parts = [text.held_out(part) for part in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 5
    assert numbers(parts[0]) and numbers(parts[0]) <= {str(k) for k in range(20, 30)}
    assert not torch.equal(torch.stack(parts[0]), torch.stack(parts[1]))


def test_a_model_is_trained_on_a_stream_of_documents(
    text_file: Path, documents: TextSettings
) -> None:
    settings = settings_of(text_file, text=documents.model_dump())
    found = run(settings)
    assert not found["diverged"]
    assert found["steps"] == 4


def test_a_data_set_of_the_package_datasets_gives_the_same_blocks(
    documents: TextSettings, tmp_path: Path
) -> None:
    """The code that asks a hub, on a folder in its place."""
    pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (tmp_path / "c4-train.0.json").read_text().splitlines()
    lines += gzip.decompress((tmp_path / "c4-train.1.json.gz").read_bytes()).decode().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "validation.jsonl").write_text((tmp_path / "c4-validation.json").read_text())
    hub = documents.model_copy(
        update={"documents": None, "held_out_documents": None, "hub": str(folder)}
    )
    ours, theirs = load_text(documents), load_text(hub)
    for a, b in zip(
        islice(ours.batches(1, 2, 2, 0), 5), islice(theirs.batches(1, 2, 2, 0), 5), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(torch.stack(ours.held_out(1)), torch.stack(theirs.held_out(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "a.txt", "hub": "allenai/c4"}, "give one of file and hub"),
        ({"hub": "allenai/c4"}, "needs a tokenizer"),
        (
            {"documents": "a.jsonl", "tokenizer": "t5-base"},
            "documents and held_out_documents go together",
        ),
        ({"sequence_length": 64, "held_out_tokens": 100}, "two blocks"),
    ],
)
def test_a_text_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSettings(**changes)


def test_files_that_are_not_there_or_no_json_are_named(
    documents: TextSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no file fits the pattern .*nothing"):
        load_text(documents.model_copy(update={"documents": str(tmp_path / "nothing*.json")}))
    (tmp_path / "c4-train.0.json").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(ConfigError, match=r"c4-train\.0\.json, line 2 is no JSON"):
        next(load_text(documents.model_copy(update={"sequence_length": 40})).batches(1, 2, 2, 0))
    with pytest.raises(ConfigError, match="fewer blocks than held_out_tokens=100000"):
        load_text(documents.model_copy(update={"held_out_tokens": 100_000})).held_out(1)


# ------------------------------------------------------------------ what is said of the rows


def test_quantiles_of_student() -> None:
    """Against the printed tables."""
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042)):
        assert student_t(degrees) == pytest.approx(value, abs=6e-4)
    assert student_t(5, 0.95) == pytest.approx(2.015, abs=6e-4)


def test_only_common_seeds_are_compared() -> None:
    found = difference({1: 3.0, 2: 5.0, 3: 90.0}, {1: 1.0, 2: 2.0, 4: 0.0})
    assert found == Spread(2, 2.5, pytest.approx(math.sqrt(0.5)))
    assert ratio({1: 3.0}, {2: 1.0}) is None
    assert Spread.of([2.0]) == Spread(1, 2.0, None)


def test_a_difference_is_told_by_its_spread() -> None:
    """t_{0.975, 2} = 4.303: three differences of mean 1 and deviation s differ from
    zero if 1 > 4.303 s / sqrt(3).
    """
    clear, unclear = Spread(3, 1.0, 0.40), Spread(3, 1.0, 0.41)
    assert (clear.sign, unclear.sign, Spread(3, -1.0, 0.1).sign, Spread(1, 1.0, None).sign) == (
        1,
        0,
        -1,
        None,
    )
    assert "a > b: holds" in verdict("a > b", clear, 1, 2)
    assert "**contradicted**" in verdict("a < b", clear, -1, 2)
    assert "undecided, inside the spread" in verdict("a < b", unclear, -1, 2)
    assert "no difference seen, as claimed" in verdict("a = b", unclear, 0, 2)
    assert "**a difference is seen**" in verdict("a = b", clear, 0, 2)
    assert "no spread is known; the sign is the other one" in verdict(
        "a < b", Spread(1, 1.0, None), -1, 2
    )
    assert verdict("a < b", None, -1, 2) == "a < b: not measured."


def rows_of(perplexities: dict[tuple[str, int | None], list[float | None]]) -> list[dict[str, Any]]:
    """Final rows on seeds 1, 2, ...; None for a run that diverged."""
    return [
        {
            "key": f"final/{method}/{rank}/{seed}",
            "params": {"part": "final", "method": method, "rank": rank, "seed": seed, "learning_rate": 0.004},
            "result": {
                "perplexity": value, "loss": None, "diverged": value is None, "parameters": 1_000_000, "steps": 4,
                "curve": [[1, 5.0]], "sent": {"bytes": {}, "bytes_per_step": 2000.0, "ratio": 20.0},
            },
            "seconds": 1.0,
        }
        for (method, rank), values in perplexities.items()
        for seed, value in enumerate(values, start=1)
    ]  # fmt: skip


@pytest.fixture
def four(text_file: Path) -> LanguageModelSettings:
    """Full precision, PowerSGD, PowerSGD+ and GaLore at the paper's ranks."""
    methods = contents(text_file)["settings"]["methods"]
    methods["powersgd_plus"] = {"label": "PowerSGD+", "section": {"compressor": "powersgd_plus"}}
    methods["galore"] = {"label": "GaLore", "section": {"compressor": "galore"}}
    return settings_of(text_file, methods=methods, ranks=[4, 8], seeds=[1, 2, 3])


def test_the_page_tells_what_the_rows_say(four: LanguageModelSettings) -> None:
    rows = rows_of({
        ("adam", None): [100.0, 110.0, 105.0],
        # 1.2 times full precision on every seed
        ("powersgd", 4): [120.0, 132.0, 126.0],
        # now above PowerSGD, now below
        ("powersgd_plus", 4): [121.0, 131.0, 126.2],
        ("galore", 4): [None, 400.0, 410.0],
        ("powersgd", 8): [110.0, 121.1, 115.5],
    })  # fmt: skip
    page = EXPERIMENT.page(four, rows)
    line = next(line for line in page.splitlines() if line.startswith("| PowerSGD |"))
    assert "| 126.00 ± 6.00 | 1.200 ± 0.000 | 1.209 | - | 2 kB | 20.0 |" in line
    plus = next(line for line in page.splitlines() if line.startswith("| PowerSGD+ |"))
    assert "inside the spread" in plus
    assert f"{PAPER['60M']['powersgd_plus'][4] / PAPER['60M']['adam'][None]:.3f}" in plus
    assert "(1 of 3 diverged)" in page
    assert "rank 4, full precision < PowerSGD (paper: 29.88 < 36.11): holds" in page
    assert (
        "rank 4, PowerSGD+ < PowerSGD (paper: 35.46 < 36.11): undecided, inside the spread" in page
    )
    assert "rank 8, PowerSGD+ > PowerSGD (paper: 32.63 > 32.57): not measured." in page
    assert "rank 4, PowerSGD < GaLore (paper: 36.11 < 94.96): holds" in page
    assert "PowerSGD: rank 8 < rank 4: holds" in page


def test_the_page_says_where_the_paper_is_contradicted(four: LanguageModelSettings) -> None:
    rows = rows_of(
        {("powersgd", 4): [120.0, 130.0, 125.0], ("powersgd_plus", 4): [124.0, 134.1, 129.2]}
    )
    assert (
        "PowerSGD+ < PowerSGD (paper: 35.46 < 36.11): **contradicted** (left minus right +4.10"
        in EXPERIMENT.page(four, rows)
    )


def test_a_learning_rate_at_the_edge_of_the_grid_is_told(four: LanguageModelSettings) -> None:
    rows = tuned("powersgd", {0.001: 50.0, 0.004: 40.0})
    for row in rows:
        row["params"] |= {"rank": 4, "seed": 0}
        row["result"] |= {"parameters": 1, "diverged": False}
    page = EXPERIMENT.page(four, rows)
    assert "| PowerSGD | 50.00 | **40.00** |" in page
    assert "at the edge of the grid, so perhaps not the best there is: PowerSGD (0.004)" in page
