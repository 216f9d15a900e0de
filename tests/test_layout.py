"""One finds the test of a file by its path, or in the table of tests/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

TESTS, SUPPORT = ROOT / "tests", ROOT / "tests" / "support"
MODULES = sorted(
    file.relative_to(ROOT)
    for folder in ("lowrank_comm", "integrations")
    for file in (ROOT / folder).rglob("*.py")
    if file.name != "__init__.py"
)


def table() -> dict[str, list[str]]:
    """Module, or pattern of modules -> test files, by the table's rows."""
    found: dict[str, list[str]] = {}
    for line in (TESTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            modules, files = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            found |= dict.fromkeys(modules, files)
    return found


TOGETHER = table()


def own_test(module: Path) -> Path:
    """The path of a module's test: without `lowrank_comm/` and without underscores
    around the name.
    """
    inside = module.relative_to("lowrank_comm") if module.parts[0] == "lowrank_comm" else module
    return TESTS / inside.parent / f"test_{module.stem.strip('_')}.py"


@pytest.mark.parametrize("module", MODULES, ids=Path.as_posix)
def test_every_module_has_its_test_file_or_stands_in_the_table(module: Path) -> None:
    listed = [file for row, files in TOGETHER.items() if module.match(row) for file in files]
    assert own_test(module).is_file() or listed, (
        f"{module}: give it {own_test(module).relative_to(ROOT)}, or a row in tests/README.md"
    )
    for file in listed:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("row", TOGETHER)
def test_the_table_names_modules_that_exist(row: str) -> None:
    assert any(module.match(row) for module in MODULES)


def test_every_folder_of_tests_is_a_package() -> None:
    files = TESTS.rglob("*.py")
    folders = {file.parent for file in files if "fixtures" not in file.parts}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize(
    "helper",
    [
        file.stem
        for file in sorted(SUPPORT.glob("*.py"))
        if file.stem != "__init__" and not file.stem.startswith("test_")
    ],
)
def test_every_helper_is_used(helper: str) -> None:
    users = [
        file
        for file in TESTS.rglob("*.py")
        if file.stem != helper
        and re.search(
            rf"tests\.support\.{helper}\b|from tests\.support import [^#]*\b{helper}\b"
            rf"|[\"/]{helper}\.py\b",
            file.read_text(encoding="utf-8"),
        )
    ]
    assert users, f"tests/support/{helper}.py is used by no test"
