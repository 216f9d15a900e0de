"""The lab's command line; see `lowrank_comm.lab`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import matplotlib  # noqa: F401
    import typer
    import yaml  # noqa: F401
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(
        f"the lab needs {missing.name}, which is not installed: pip install 'lowrank-comm[lab]'"
    )

from lowrank_comm.errors import ConfigError, LowRankCommError
from lowrank_comm.lab.runner import pages
from lowrank_comm.lab.runner.note import RUN_FILE, read_note
from lowrank_comm.lab.runner.preset import Preset, checked, load, names
from lowrank_comm.lab.runner.rows import Rows
from lowrank_comm.lab.runner.running import first_process, ordered_rows, run_preset

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Experiments that show what each algorithm does.",
)
console = Console()


@app.command("list")
def list_presets() -> None:
    """The presets, with their numbers of cases."""
    table = Table("run", "experiment", "cases", "what it is")
    for name in names():
        preset = load(name)
        cases = str(len(preset.experiment.cases(preset.settings)))
        table.add_row(name, preset.experiment.title, cases, preset.description)
    console.print(table)


@app.command()
def run(
    experiment: Annotated[
        str, typer.Argument(help="name of an experiment or preset, or a YAML file")
    ],
    preset: Annotated[str, typer.Option(help="small or paper")] = "small",
    output_dir: Annotated[
        Path | None, typer.Option(help="where rows go; runs/lab/<preset> if not given")
    ] = None,
    only: Annotated[str | None, typer.Option(help="pattern of case keys, e.g. 'powersgd*'")] = None,
    jobs: Annotated[int, typer.Option(help="processes side by side")] = 1,
    published: Annotated[
        Path | None, typer.Option(help="folder of published results whose rows count as finished")
    ] = None,
) -> None:
    """Run the cases that are not finished yet; a run that was stopped goes on."""
    chosen = load(experiment, preset)
    folder = output_dir or Path("runs/lab") / chosen.name
    if published is not None and first_process():
        file = published / f"{chosen.experiment.name}.jsonl"
        Rows(folder).adopt(pages.read_published(file).rows)
    ended = run_preset(chosen, folder, only=only, jobs=jobs, console=console)
    for key, text in ended.failed.items():
        console.print(f"--- {key}\n{text}", markup=False, highlight=False)
    if first_process():
        console.print(
            f"{ended.finished} of {ended.total} cases are finished in {folder}",
            markup=False,
            highlight=False,
        )
    if ended.finished and first_process():
        report(folder)
    if ended.failed:
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="output folder of a run")]) -> None:
    """Write the page and figures of a run into its folder."""
    chosen, meta = _run_of(folder)
    path = folder / f"{chosen.experiment.name}.published.jsonl"
    path.write_text(pages.published_text(meta, ordered_rows(chosen, folder)), encoding="utf-8")
    for written in pages.write(pages.read_published(path), folder):
        console.print(f"written: {written}", markup=False, highlight=False)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="output folder of a run")],
    results: Annotated[Path, typer.Argument(help="folder of published results")] = Path(
        "docs/results"
    ),
    partial: Annotated[
        bool, typer.Option("--partial", help="though cases are missing; the page names them")
    ] = False,
) -> None:
    """Copy the rows of a run into the published results, and make their page."""
    chosen, meta = _run_of(folder)
    rows = ordered_rows(chosen, folder)
    total = len(chosen.experiment.cases(chosen.settings))
    if len(rows) < total and not partial:
        raise ConfigError(
            f"{folder}: {total - len(rows)} of {total} cases are not finished; run them, or give"
            " --partial."
        )
    for written in pages.publish(meta, rows, results):
        console.print(f"written: {written}", markup=False, highlight=False)


@app.command("pages")
def regenerate(
    results: Annotated[Path, typer.Argument(help="folder of published results")] = Path(
        "docs/results"
    ),
) -> None:
    """Make all pages again from the published results."""
    for written in pages.regenerate(results):
        console.print(f"written: {written}", markup=False, highlight=False)


def _run_of(folder: Path) -> tuple[Preset, dict[str, Any]]:
    """Return the preset of a folder's rows, and the content of its run.json.

    Raises:
        ConfigError: the folder does not belong to a run.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {RUN_FILE}; give the --output-dir of a run.")
    meta = read_note(path)
    content = {key: meta[key] for key in ("experiment", "description", "settings")}
    return checked(content, meta["preset"], meta["command"].rpartition(" run ")[2]), meta


def main() -> None:
    """Run the command line. An error of the library is printed as one line; the exit
    code is then 2.
    """
    try:
        app(prog_name="python -m lowrank_comm.lab", standalone_mode=True)
    except LowRankCommError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
