"""Computes a page of Markdown and its figures from a published file of rows, and from
nothing else.

A published file is docs/results/<experiment>.jsonl. Its first line states what was run,
by which command, on which machine and when; the rows follow, floats cut to six digits.
The page is a function of this file, so a test can compare it byte by byte. A figure
carries the file's sha256 in its PNG header instead, since pixels differ between
versions of the plotting library.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lowrank_comm.errors import ConfigError
from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments import EXPERIMENTS, experiment
from lowrank_comm.lab.runner.preset import Preset, checked
from lowrank_comm.lab.runner.rows import line, read_lines
from lowrank_comm.lab.runner.sources import NOT_NOTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = 6
KEPT = ("key", "params", "result", "seconds", "made_for", "code", "versions")
SOURCE = "Source sha256"
"""Key in a figure's PNG header of the sha256 of its data."""


@dataclass(frozen=True)
class Published:
    """A published file: what was run, and the rows in the order of the cases."""

    meta: dict[str, Any]
    rows: list[Row]
    sha256: str

    @property
    def preset(self) -> Preset:
        """The preset that the rows were made by."""
        content = {key: self.meta[key] for key in ("experiment", "description", "settings")}
        return checked(content, self.meta["preset"], self.meta["command"].rpartition(" run ")[2])


def published_text(meta: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the text of a published file of these rows."""
    kept = [{key: row[key] for key in KEPT if key in row} for row in rows]
    first = {key: value for key, value in meta.items() if key != "settings_hash"}
    # hashes of the sources that made the rows
    first["code"] = sorted({row.get("code", NOT_NOTED) for row in rows})
    return line({"meta": first}) + "".join(line(row, DIGITS) for row in kept)


def read_published(path: Path) -> Published:
    """Read a published file.

    Raises:
        ConfigError: the file is not there, or does not begin with what was run.
    """
    lines = read_lines(path)
    if not lines or "meta" not in lines[0]:
        raise ConfigError(
            f"{path} is no file of published results; `python -m lowrank_comm.lab publish` writes"
            " one."
        )
    return Published(lines[0]["meta"], lines[1:], hashlib.sha256(path.read_bytes()).hexdigest())


def page_of(published: Published) -> str:
    """Return the page, with figures as <experiment>/<stem>.png."""
    preset, meta = published.preset, published.meta
    kind = preset.experiment
    present = {row["key"] for row in published.rows}
    missing = [case.key for case in kind.cases(preset.settings) if case.key not in present]
    seconds = sum(row["seconds"] for row in published.rows)
    computer = meta["machine"]
    device = computer["accelerator"] or computer["cpu"]
    text = [
        f"# {kind.title}\n",
        (
            f"<!-- Made from {kind.name}.jsonl by `make results`. Change the experiment or run it"
            " anew; do not edit. -->\n"
        ),
        f"{kind.paper} [Algorithms](../algorithms.md), [all results](README.md).\n",
        (
            f"`{meta['command']}`, {meta['date']}, {device}, {computer['cores']} cores, torch"
            f" {computer['torch']}. {_seeds(meta['settings'])}{len(published.rows)} cases in"
            f" {_time(seconds)} of one process's time. {_sources(meta)}\n"
        ),
    ]
    if missing:
        text.append(f"Not run, or failed: {', '.join(f'`{key}`' for key in missing)}.\n")
    body = kind.page(preset.settings, published.rows).strip()
    text.append(re.sub(r"\]\(([\w-]+\.png)\)", rf"]({kind.name}/\1)", body) + "\n")
    return "\n".join(text)


def figures_of(published: Published) -> dict[str, Figure]:
    """Return file stem -> figure."""
    return published.preset.experiment.figures(published.preset.settings, published.rows)


def write(published: Published, folder: Path) -> list[Path]:
    """Write <experiment>.md and <experiment>/<stem>.png into the folder and delete old
    figures.

    Returns:
        The paths written.

    Raises:
        ConfigError: the page shows a figure that is not drawn, or leaves one out.
    """
    name = published.meta["experiment"]
    page, figures = page_of(published), figures_of(published)
    shown = set(re.findall(rf"\]\({name}/([\w-]+)\.png\)", page))
    if shown != set(figures):
        raise ConfigError(
            f"{name}: the page shows the figures {sorted(shown)}, drawn are {sorted(figures)}; they"
            " must agree."
        )
    pictures = folder / name
    for old in pictures.glob("*.png"):
        old.unlink()
    paths = [folder / f"{name}.md"]
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(page, encoding="utf-8")
    for stem, figure in figures.items():
        pictures.mkdir(exist_ok=True)
        paths.append(pictures / f"{stem}.png")
        figure.savefig(paths[-1], dpi=110, metadata={SOURCE: published.sha256})
    return paths


def publish(meta: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the published file, its page and figures, and the index of the folder."""
    path = folder / f"{meta['experiment']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(published_text(meta, rows), encoding="utf-8")
    return [path, *write(read_published(path), folder), write_index(folder)]


def regenerate(folder: Path) -> list[Path]:
    """Write all pages and figures of a folder of published files, and its index.

    Raises:
        ConfigError: the folder holds no published file.
    """
    files = published_files(folder)
    if not files:
        raise ConfigError(
            f"{folder} holds no <experiment>.jsonl; `python -m lowrank_comm.lab publish` writes"
            " one."
        )
    return [path for file in files for path in write(read_published(file), folder)] + [
        write_index(folder)
    ]


def published_files(folder: Path) -> list[Path]:
    """Return the published files of a folder, in the order of the experiments."""
    return [path for name in EXPERIMENTS if (path := folder / f"{name}.jsonl").is_file()]


def index_of(folder: Path) -> str:
    """Return the text of the folder's README.md."""
    lines = [
        "# Results of the lab\n",
        "<!-- Made by `make results`; do not edit. -->\n",
        (
            "Each page is computed from the `.jsonl` file of the same name, which holds the result"
            " of every case, the settings"
        ),
        (
            "and seeds, the command and the machine. `make results` computes the pages anew; a test"
            " fails where one does not"
        ),
        (
            "match its file. The paper, its theorems and tables are those of PowerSGD+ (arXiv"
            " 2509.11254), unless another one"
        ),
        "is named; [docs/algorithms.md](../algorithms.md) tells the algorithms.\n",
        (
            "A page names the sources that made it by a hash of the experiment and of all that it"
            " imports of the library"
        ),
        "(`lowrank_comm/lab/runner/sources.py`), or says that they were not noted.\n",
        "| experiment | what it shows | command | run on |",
        "| --- | --- | --- | --- |",
    ]
    for path in published_files(folder):
        meta = read_published(path).meta
        title = experiment(meta["experiment"]).title
        lines.append(
            f"| [{title}]({meta['experiment']}.md) | {meta['description']} | `{meta['command']}` |"
            f" {meta['date']} |"
        )
    here = {path.stem for path in published_files(folder)}
    if without := [f"`{name}`" for name in EXPERIMENTS if name not in here]:
        lines += [
            "",
            f"Not run in full yet, so without results here: {', '.join(without)}. Run one by"
            " `python -m lowrank_comm.lab run <experiment> --preset small`.",
        ]
    return "\n".join(lines) + "\n"


def write_index(folder: Path) -> Path:
    path = folder / "README.md"
    path.write_text(index_of(folder), encoding="utf-8")
    return path


def source_of(picture: Path) -> str | None:
    """Return the sha256 in a figure's PNG header; None if it has none."""
    with Image.open(picture) as image:
        return image.info.get(SOURCE)


def _sources(meta: Mapping[str, Any]) -> str:
    """Return which sources made the rows, as a sentence."""
    hashes = meta.get("code", [NOT_NOTED])
    known = ", ".join(f"`{value}`" for value in hashes if value != NOT_NOTED)
    if NOT_NOTED not in hashes:
        return f"Sources {known}."
    return f"The sources were not noted{f' for all rows; of the others: {known}' if known else ''}."


def _seeds(settings: Mapping[str, Any]) -> str:
    """Return the settings' seeds as a sentence, each with the parts of the settings
    that use it; an empty string without seeds.
    """
    found: dict[str, list[str]] = {}
    for where, seeds in _seeds_in(settings):
        found.setdefault(seeds, []).append(where)
    if list(found.values()) == [[""]]:
        seeds = next(iter(found))
        return f"Seed{'s' if ',' in seeds else ''} {seeds}. "
    stated = [
        f"{seeds} ({', '.join(where or 'all else' for where in parts)})"
        for seeds, parts in found.items()
    ]
    return f"Seeds {'; '.join(stated)}. " if stated else ""


def _seeds_in(settings: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path of the part, its seeds)."""
    for key, value in settings.items():
        if key in ("seed", "seeds"):
            yield where, ", ".join(map(str, value if isinstance(value, list) else [value]))
        elif isinstance(value, Mapping):
            yield from _seeds_in(value, f"{where} {key}".strip())


def _time(seconds: float) -> str:
    """Return a duration with its unit, e.g. 3.2 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
