"""What a user installs: the wheel, a checkout without installation, and what `import
lowrank_comm` costs.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT


def python(code: str, folder: Path, *path: Path) -> str:
    """Run code in a fresh interpreter, from `folder`, with `path` in front; what it
    printed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRY_IT = """
import torch, lowrank_comm
from lowrank_comm import CompressedOptimizer, Identity, PowerSGD, PowerSGDPlus
model = torch.nn.Linear(64, 64)
base = torch.optim.AdamW(model.named_parameters())
optimizer = CompressedOptimizer(base, compressor=PowerSGDPlus(rank=4))
model(torch.ones(2, 64)).sum().backward()
optimizer.step()
assert sorted(optimizer.error_memory()) == ["weight"]
import lowrank_comm.integrations
print(lowrank_comm.__file__)
print(lowrank_comm.integrations.__file__)
"""


def test_a_checkout_that_is_not_installed_works(tmp_path: Path) -> None:
    """PYTHONPATH=<checkout> is enough, `lowrank_comm.integrations` included."""
    core, integrations = map(Path, python(TRY_IT, tmp_path, ROOT).split())
    assert core == ROOT / "lowrank_comm" / "__init__.py"
    assert integrations == ROOT / "integrations" / "__init__.py"


@pytest.fixture(scope="module")
def after_the_import(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one fresh interpreter found in which `lowrank_comm` and its light parts were
    imported, and then parts asked for one after the other.
    """
    code = """
import json, pkgutil, sys, lowrank_comm
extensions = ("bidirectional", "projected", "lab", "integrations")
def loaded():
    rooms = {m.split(".")[1] for m in sys.modules if m.startswith("lowrank_comm.")}
    return sorted(rooms & set(extensions))
found = {"doors": [lowrank_comm.checkpoint.save, lowrank_comm.simulation.Simulation]}
import lowrank_comm.config, lowrank_comm.checkpointing.file, lowrank_comm.reduction.plan
found["modules"] = sorted({name.split(".")[0] for name in sys.modules})
found["at first"] = loaded()
assert set(lowrank_comm.__all__) <= set(dir(lowrank_comm))
found["doors"].append(lowrank_comm.projected.ProjectedSGD)
from lowrank_comm import ProjectedAdamW
assert lowrank_comm.ProjectedSGD.__mro__[1] is ProjectedAdamW.__mro__[1]
found["with projected"] = loaded()
found["doors"].append(lowrank_comm.bidirectional.M4)
from lowrank_comm.config import OPTIMIZERS
assert set(lowrank_comm.bidirectional.METHODS) == set(OPTIMIZERS)
methods = {pkgutil.resolve_name(path) for path in OPTIMIZERS.values()}
assert methods == {lowrank_comm.bidirectional.BidirectionalOptimizer}
try:
    lowrank_comm.ProjectedAdam
except AttributeError as error:
    found["unknown"] = str(error)
found["doors"] = [door.__name__ for door in found["doors"]]
print(json.dumps(found))
"""
    return dict(json.loads(python(code, tmp_path_factory.mktemp("elsewhere"), ROOT)))


def test_the_core_imports_no_engine(after_the_import: dict[str, Any]) -> None:
    heavy = {"deepspeed", "transformers", "accelerate", "peft", "rich", "matplotlib", "tokenizers"}
    heavy |= {"datasets", "typer", "yaml"}
    assert not heavy & set(after_the_import["modules"])
    assert {"torch", "lowrank_comm"} <= set(after_the_import["modules"])


def test_the_core_loads_no_extension_until_it_is_asked_for(
    after_the_import: dict[str, Any],
) -> None:
    assert after_the_import["at first"] == []
    assert after_the_import["with projected"] == ["projected"]
    assert after_the_import["unknown"] == "module 'lowrank_comm' has no attribute 'ProjectedAdam'"


def test_the_core_needs_torch_safetensors_and_pydantic_only() -> None:
    """Every top-level module that lowrank_comm imports by itself is of the standard
    library or one of the three it declares. The lab has an extra of its own; nothing
    outside it may import it.
    """
    found: set[str] = set()
    core = ROOT / "lowrank_comm"
    for file in core.rglob("*.py"):
        if core / "lab" in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                where = (node.module or "").split(".")
                if node.level == 0:
                    found.add(where[0])
                if node.level > 0 or where[0] == "lowrank_comm":
                    assert "lab" not in [*where, *(alias.name for alias in node.names)], file
    needed = found - set(sys.stdlib_module_names) - {"lowrank_comm"}
    assert needed == {"pydantic", "safetensors", "torch"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked kinds of files, so that nothing is left behind
    in the checkout; no network.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "lowrank_comm", "integrations"):
        origin = ROOT / name
        if origin.is_dir():
            for file in origin.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts:
                    target = source / file.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        else:
            (source / name).write_bytes(origin.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(out),
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "lowrank_comm/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lowrank_comm"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    expected = {file.relative_to(ROOT).as_posix() for file in (ROOT / "lowrank_comm").rglob("*.py")}
    expected |= {
        f"lowrank_comm/integrations/{file.relative_to(ROOT / 'integrations').as_posix()}"
        for file in (ROOT / "integrations").rglob("*.py")
    }
    expected |= {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "lowrank_comm" / "lab" / "presets").glob("*.yaml")
    }
    assert expected <= set(names)


@pytest.mark.slow
def test_the_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as pip does, away from the checkout: the core trains,
    `lowrank_comm.integrations` is inside the package, and DeepSpeed's adapter can be
    imported.
    """
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    adapter = "import lowrank_comm.integrations.deepspeed as adapter; print(adapter.__file__)"
    has_deepspeed = find_spec("deepspeed") is not None
    printed = python(TRY_IT + adapter * has_deepspeed, tmp_path, site).splitlines()
    inside = site / "lowrank_comm" / "integrations"
    assert str(site / "lowrank_comm" / "__init__.py") in printed
    assert str(inside / "__init__.py") in printed
    assert not has_deepspeed or printed[-1] == str(inside / "deepspeed.py")


def test_doors_are_attributes_of_the_package(after_the_import: dict[str, Any]) -> None:
    """`import lowrank_comm` is enough for `lowrank_comm.checkpoint.save`."""
    assert after_the_import["doors"] == ["save", "Simulation", "ProjectedSGD", "M4"]
