"""A hash of the sources that a result depends on, so that a published figure can say
whether it was measured on the sources that lie beside it.

From a file on, import statements are followed to every file of this library and to
those beside the first one, wherever in a file they stand, but for those that are for
type checkers only. A name that a package hands on (`from lowrank_comm import PowerSGD`)
leads to the module that defines it, not to all that the package imports. Comments,
docstrings and blank lines do not count, nor does the library's version: they change no
result.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
# whose files are followed; of an installed library, there is the first only
FOLLOWED = ("lowrank_comm", "benchmarks", "tests")
VERSION = PACKAGE / "version.py"
NOT_NOTED = "not noted"
"""In the place of a hash, where a result was made before hashes were noted."""


def sources_hash(*files: Path) -> str:
    """Return 16 hexadecimal digits of the sha256 of the files, and of all that they
    import of this library.

    Example:
        >>> from pathlib import Path
        >>> import lowrank_comm.compressors.powersgd as module
        >>> len(sources_hash(Path(module.__file__)))
        16
    """
    digest = hashlib.sha256()
    for path in sources_of(*files):
        digest.update(f"{_called(path)}\n{_code(path)}\n".encode())
    return digest.hexdigest()[:16]


def sources_of(*files: Path) -> list[Path]:
    """Return the files, and all that they import of this library, by name."""
    found: set[Path] = set()
    todo = [path.resolve() for path in files]
    beside = {path.parent for path in todo}
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(path, frozenset(beside))
    return sorted(found - {VERSION}, key=_called)


def _called(path: Path) -> str:
    """Return the file's path in the checkout, or beside the installed package."""
    root = PACKAGE.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


@functools.cache
def _imported(path: Path, beside: frozenset[Path]) -> list[Path]:
    """Return the files that a file's own statements import."""
    found: list[Path] = []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += filter(None, (_file(alias.name, beside) for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found += _definition(node.module, alias.name, beside)
    return found


def _definition(module: str, name: str, beside: frozenset[Path]) -> list[Path]:
    """Return the file from which a module's name comes."""
    submodule, path = _file(f"{module}.{name}", beside), _file(module, beside)
    if submodule is not None:
        return [submodule]
    if path is not None and path.name == "__init__.py":
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _definition(node.module, alias.name, beside)
    return [] if path is None else [path]


def _file(module: str, beside: frozenset[Path]) -> Path | None:
    """Return the file of a module of this library, or of one beside the first files."""
    parts = module.split(".")
    places = [folder.joinpath(*parts) for folder in sorted(beside)]
    if parts[0] in FOLLOWED:
        places.append(PACKAGE.parent.joinpath(*parts))
    if parts[:2] == ["lowrank_comm", "integrations"]:
        # in a checkout this folder lies beside the package
        places.append(PACKAGE.parent.joinpath(*parts[1:]))
    for place in places:
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _statements(node)


@functools.cache
def _code(path: Path) -> str:
    """Return a file's text without comments, docstrings and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        # a string that stands alone: a docstring, or an attribute's description
        match node:
            case ast.Expr(ast.Constant(str()), lineno=first, end_lineno=int(last)):
                lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
