"""The hash of the sources that a result depends on: which files it takes in, and which
changes of them it sees.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_comm.lab.runner import sources
from lowrank_comm.lab.runner.sources import sources_hash, sources_of
from tests.support import ROOT


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Files change under one name here."""
    sources._imported.cache_clear()
    sources._code.cache_clear()


def hash_of(path: Path, text: str) -> str:
    path.write_text(text)
    _forget.__wrapped__()  # type: ignore[attr-defined]
    return sources_hash(path)


def names(*files: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix() for path in sources_of(*files) if ROOT in path.parents
    }


def test_a_name_of_a_package_leads_to_its_module_and_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from lowrank_comm import PowerSGD\nfrom lowrank_comm.errors import *\n")
    found = names(script)
    assert {
        "lowrank_comm/compressors/powersgd.py",
        "lowrank_comm/compressors/subspaces.py",
        "lowrank_comm/numerics/linalg.py",
        "lowrank_comm/errors.py",
    } <= found
    assert not found & {
        "lowrank_comm/__init__.py",
        "lowrank_comm/compressors/powersgd_plus.py",
        "lowrank_comm/reduction/reducer.py",
    }
    assert "lowrank_comm/version.py" not in names(ROOT / "lowrank_comm/communication/agreement.py")


def test_imports_in_functions_and_of_modules_count_those_of_type_checkers_do_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "sibling.py").write_text("import lowrank_comm.numerics.hashing\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lowrank_comm.simulation import Simulation\n"
        "def late():\n    import sibling\n    from lowrank_comm.integrations import ddp\n"
    )
    found = names(script)
    assert {"lowrank_comm/numerics/hashing.py", "integrations/ddp.py"} <= found
    assert "lowrank_comm/simulation.py" not in found
    assert tmp_path / "sibling.py" in sources_of(script)


def test_only_what_runs_changes_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    first = hash_of(path, '"""Says."""\n\nx = "# no comment"  # one\n\n\ndef f():\n    return 1\n')
    told = (
        '"""Says more.\n"""\n# why\nx = "# no comment"\n\ndef f():\n    """One."""\n    return 1\n'
    )
    assert hash_of(path, told) == first
    assert hash_of(path, told.replace("no comment", "another")) != first
    assert hash_of(path, told.replace("return 1", "return 2")) != first


def test_a_change_in_what_is_imported_changes_the_hash(tmp_path: Path) -> None:
    sibling, script = tmp_path / "sibling.py", tmp_path / "script.py"
    sibling.write_text("x = 1\n")
    first = hash_of(script, "from sibling import x\n")
    sibling.write_text("x = 2\n")
    assert hash_of(script, "from sibling import x\n") != first
