"""What the examples report about a run: the log that goes on after a resume, the
summary, the table and the plot.
"""

import io
import json
import math
from types import SimpleNamespace

import pytest
import recording
import report
import torch
from PIL import Image
from rich.console import Console

SETUP = {"model": "toy of 12 parameters", "workers": 2, "steps": 4}


class Ledger:
    """Counts as a run would: 10 bytes of factors a step, and a restart at the first."""

    def __init__(self):
        self.bytes, self.uncompressed_bytes, self.collectives, self.restarts = {}, 0, 0, 0

    def count(self):
        self.bytes["factors"] = self.bytes.get("factors", 0) + 10
        if not self.restarts:
            self.bytes["restart"], self.restarts = 100, 3
        self.uncompressed_bytes += 48
        self.collectives += 2


class Run:
    """Drives a Recorder as Trainer does."""

    def __init__(self, folder, compressed=True, checkpoint=None):
        self.handle = SimpleNamespace(ledger=Ledger(), last_report=None) if compressed else None
        trainer = SimpleNamespace(model=torch.nn.Linear(3, 3))
        self.recorder = recording.Recorder(trainer, folder, lambda: self.handle, checkpoint)
        self.state = SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True)

    def steps(self, first, last, log_every=1, save_at=None):
        self.state.global_step = first - 1
        self.recorder.on_train_begin(None, self.state, None)
        self.recorder.on_evaluate(None, self.state, None, metrics={"eval_loss": 2.0 / first})
        for step in range(first, last + 1):
            self.recorder.on_step_begin(None, self.state, None)
            if self.handle is not None:
                self.handle.ledger.count()
                self.handle.last_report = SimpleNamespace(
                    seconds={"compress": 0.25}, captured_energy=step / 10
                )
            self.state.global_step = step
            control = SimpleNamespace(should_log=step % log_every == 0)
            self.recorder.on_step_end(None, self.state, control)
            if control.should_log:
                self.recorder.on_log(None, self.state, None, logs={"loss": 8.0 / step})
            if step == save_at:
                self.handle.ledger.bytes["consolidation"] = (
                    self.handle.ledger.bytes.get("consolidation", 0) + 7
                )
                self.recorder.on_save(None, self.state, None)
        self.recorder.on_train_end(None, self.state, None)
        return self.recorder.summary(
            "powersgd_plus rank 4", SETUP, {"compressor": "powersgd_plus"} if self.handle else None
        )


def test_summary_of_a_compressed_run(tmp_path):
    summary = Run(tmp_path).steps(1, 4)
    assert summary.bytes == {"factors": 40, "restart": 100}
    assert summary.total_bytes == 140
    assert summary.uncompressed_bytes == 4 * 48
    assert summary.ratio == 192 / 140
    assert (summary.collectives, summary.restarts, summary.steps) == (8, 3, 4)
    assert summary.captured_energy == pytest.approx(0.25)
    assert summary.phases == {"compress": pytest.approx(0.25)}
    assert (summary.first_loss, summary.last_loss) == (8.0, pytest.approx((8 + 4 + 8 / 3 + 2) / 4))


def test_an_uncompressed_run_counts_what_its_parameters_weigh(tmp_path):
    summary = Run(tmp_path, compressed=False).steps(1, 4)
    assert summary.bytes == {"all-reduce": 4 * 12 * 4}
    assert summary.ratio == 1


def test_gradient_bytes_count_tied_parameters_once_and_frozen_ones_not_at_all():
    layers = torch.nn.ModuleList([torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(5, 5)])
    layers[0].weight = layers[1].weight
    layers[1].bias.requires_grad_(False)
    assert recording.gradient_bytes(layers) == 4 * 25
    assert recording.gradient_bytes(layers, 2) == 2 * 25


@pytest.mark.parametrize("log_every", [1, 2, 3])
def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path, log_every):
    """Whatever is logged when: the checkpoint's own line has the totals, its own bytes
    included.
    """
    whole = Run(tmp_path / "whole").steps(1, 4, log_every, save_at=2)
    cut = tmp_path / "cut"
    # died after step 3; its last checkpoint is of step 2
    Run(cut).steps(1, 3, log_every, save_at=2)
    with (cut / report.LOG).open("a") as file:
        # in the middle of a line
        file.write('{"step": 3, "lo')
    resumed = Run(cut)
    # this worker's ledger restarts nothing by itself
    resumed.handle.ledger.restarts = 3
    summary = resumed.steps(3, 4, log_every)
    assert summary.bytes == whole.bytes == {"factors": 40, "restart": 100, "consolidation": 7}
    assert summary.uncompressed_bytes == whole.uncompressed_bytes
    assert summary.first_perplexity == whole.first_perplexity
    assert summary.steps == 4


def test_a_run_that_is_resumed_in_another_folder(tmp_path):
    """Its totals go on with the log beside the checkpoint; without one, it says from
    where it counts.
    """
    whole = Run(tmp_path / "whole").steps(1, 4, save_at=2)
    Run(tmp_path / "old").steps(1, 2, save_at=2)
    resumed = Run(tmp_path / "new", checkpoint=tmp_path / "old" / "checkpoint-2")
    resumed.handle.ledger.restarts = 3
    assert resumed.steps(3, 4).bytes == whole.bytes
    assert resumed.recorder.first_step == 1
    alone = Run(tmp_path / "alone", checkpoint=tmp_path / "nowhere" / "checkpoint-2")
    alone.handle.ledger.restarts = 3
    assert alone.steps(3, 4).bytes == {"factors": 20}
    assert alone.recorder.first_step == 3


def test_times_leave_out_the_first_steps_however_rare_the_logs(tmp_path):
    run = Run(tmp_path)
    summary = run.steps(1, 4, log_every=3)
    lines = report.logged_steps(tmp_path)
    assert [line["warm_up"] for line in lines] == [False, False]
    # each step counts once
    assert summary.captured_energy == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4)
    every = Run(tmp_path / "every").steps(1, 4)
    assert [line["warm_up"] for line in report.logged_steps(tmp_path / "every")] == [
        True,
        True,
        False,
        False,
    ]
    assert every.phases == {"compress": pytest.approx(0.25)}


def test_rare_logs_still_count_every_step(tmp_path):
    run = Run(tmp_path)
    summary = run.steps(1, 4, log_every=3)
    lines = report.logged_steps(tmp_path)
    # the last step is logged in any case
    assert [(line["step"], line["steps"]) for line in lines] == [(3, 3), (4, 1)]
    assert lines[0]["captured_energy"] == pytest.approx(0.2)
    assert lines[0]["phases"] == {"compress": pytest.approx(0.25)}
    assert summary.total_bytes == 140
    assert summary.first_loss_steps == 3
    assert (summary.last_loss_steps, summary.last_loss) == (
        4,
        pytest.approx((3 * 8 / 3 + 8 / 4) / 4),
    )


def test_perplexities_belong_to_the_start_and_the_end_only(tmp_path):
    run = Run(tmp_path)
    # evaluated before the first step, never after the last
    assert run.steps(1, 3).last_perplexity is None
    run.recorder.on_evaluate(None, run.state, None, metrics={"eval_loss": 1.0})
    summary = run.recorder.summary("name", SETUP, None)
    assert (summary.first_perplexity, summary.last_perplexity) == (
        pytest.approx(math.e**2),
        pytest.approx(math.e),
    )


def test_table_and_plot_of_two_runs(tmp_path):
    folders = tmp_path / "compressed", tmp_path / "dense"
    for folder, compressed in zip(folders, (True, False), strict=True):
        Run(folder, compressed).steps(1, 4).save(folder)
    runs = [report.Summary.load(folder) for folder in folders]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(runs))
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:4]
        for line in console.export_text().splitlines()
        if line.count("│") == 4
    }
    assert [cell.strip() for cell in rows["sent per worker: factors"]] == ["40 B", "–"]
    assert [cell.strip() for cell in rows["sent per worker: all-reduce"]] == ["–", "192 B"]
    assert [cell.strip() for cell in rows["ratio"]] == ["1.4x", "1.0x"]
    assert [cell.strip() for cell in rows["restarts, all matrices"]] == ["3", "–"]
    picture = report.plot(*folders)
    assert picture == folders[0] / "loss_vs_bytes.png"
    assert Image.open(picture).format == "PNG"


def test_differences_name_what_is_not_comparable(tmp_path):
    one = Run(tmp_path).steps(1, 4)
    other = report.Summary(**(vars(one) | {"setup": SETUP | {"steps": 9}}))
    assert one.differences(one) == []
    assert one.differences(other) == ["steps 4 against 9"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        report.Summary.load(tmp_path)


def test_log_lines_are_json_with_totals(tmp_path):
    Run(tmp_path).steps(1, 2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # an evaluation, two steps, the end
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert [line["bytes_total"] for line in lines[1:]] == [110, 120, 120]


def test_smoothing_takes_what_there_is_on_both_sides():
    assert report.smoothed([4.0, 2.0, 0.0, 7.0], 1) == [3.0, 2.0, 3.0, 3.5]
