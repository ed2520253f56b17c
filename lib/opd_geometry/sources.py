"""Which notebook and which library a chapter was executed from, as two hashes.

``opd-geometry chapters`` puts both into the metadata of what it executes. A chapter is
stale when either has changed since, or is not there: its numbers may be those of other
code. Two things count, and only these:

- the notebook: type and source of its cells, not their outputs, nor the cell that
  papermill injects;
- the library: the code of each module that the notebook imports, by itself or through
  other modules, imports inside functions included. Comments, docstrings and layout are
  no code. So neither a reworded docstring nor a module that no chapter reaches (the
  commands, the checks of the site) makes a chapter stale.

Data is not hashed: that a notebook still prints what the committed measurements give is
what ``pytest --nbval`` checks.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
STAMP = "opd_geometry"  # the key in a notebook's metadata
INJECTED = "injected-parameters"  # papermill's tag of the cell that it adds


def stamp(notebook: Path, package: Path = PACKAGE) -> dict[str, str]:
    """What a chapter remembers of its sources.

    Args:
        notebook: as committed, executed or not.
        package: folder of the library.

    Returns:
        ``notebook_sha256`` and ``library_sha256``, in hexadecimal digits.

    Raises:
        ValueError: no notebook there, or a cell or a module that is no Python.
    """
    cells = _cells(notebook)
    code = [source for kind, source in cells if kind == "code"]
    imported = {name for x in code for name in _imports(_parsed(x, notebook))}
    return {
        "notebook_sha256": _digest(json.dumps(cells)),
        "library_sha256": library_digest(imported, package),
    }


def stale_chapters(root: Path, package: Path = PACKAGE) -> list[str]:
    """The executed chapters that belong to other notebooks, or to another library.

    Args:
        root: checkout with ``notebooks/`` and ``book/chapters/``.
        package: folder of the library.

    Returns:
        One line each: which, executed from what else, what to do. Empty if all is well.
    """
    chapters = sorted((root / "book" / "chapters").glob("*.ipynb"))
    return [line for chapter in chapters if (line := _stale(root, chapter, package))]


def _stale(root: Path, chapter: Path, package: Path) -> str:
    """Why a chapter is stale, in a line; empty if it is not."""
    place, notebook = chapter.relative_to(root), root / "notebooks" / chapter.name
    if not notebook.is_file():
        return f"{place} has no notebook in notebooks/: remove the chapter"
    now, then = stamp(notebook, package), _read(chapter)["metadata"].get(STAMP, {})
    names = {"notebook_sha256": "notebook", "library_sha256": "library"}
    other = [name for key, name in names.items() if then.get(key) != now[key]]
    if not other:
        return ""
    said = f"from another {' and '.join(other)}" if then else "from unknown sources"
    return f"{place} was executed {said}: run opd-geometry chapters {chapter.stem}"


def library_digest(names: Iterable[str], package: Path = PACKAGE) -> str:
    """A hash of the code of modules and of all that they import from the library.

    Args:
        names: of the library, with dots, such as ``opd_geometry.experiments.measure``;
            others, and names inside modules, are passed over.
        package: folder of the library.
    """
    found: dict[str, str] = {}
    waiting = {package.name, *names}
    while waiting:
        name = waiting.pop()
        path = _module_path(name, package)
        if name in found or path is None:
            continue
        found[name], imported = _code(path.read_text(encoding="utf8"), path, name)
        waiting |= {name.rpartition(".")[0], *imported}
    return _digest("".join(f"{name} {found[name]}\n" for name in sorted(found)))


@lru_cache
def _code(source: str, path: Path, name: str) -> tuple[str, frozenset[str]]:
    """A module's code without docstrings and layout, and the names that it imports."""
    tree = _parsed(source, path)
    inside = name if path.stem == "__init__" else name.rpartition(".")[0]
    imported = frozenset(_imports(tree, inside))
    return _dumped(_without_docstrings(tree)), imported


def _module_path(name: str, package: Path) -> Path | None:
    """The file of a module or package of the library; None for any other name."""
    top, *below = name.split(".")
    if top != package.name:
        return None
    path = package.joinpath(*below)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path if path.is_file() else None


def _imports(tree: ast.Module, inside: str | None = None) -> Iterator[str]:
    """Names that code imports, and those that it takes out of them.

    Args:
        tree: the code.
        inside: its package, where relative imports begin; None for a notebook.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), inside)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _dumped(value: Any) -> str:
    """``ast.dump`` without empty fields, of which each release of Python has others.

    >>> _dumped(ast.parse("x = f(1)  # one").body[0].value)
    "Call(func=Name(id='f', ctx=Load()), args=[Constant(value=1)])"
    """
    if isinstance(value, ast.AST):
        kept = [(name, x) for name, x in ast.iter_fields(value) if x not in (None, [])]
        fields = ", ".join(f"{name}={_dumped(x)}" for name, x in kept)
        return f"{type(value).__name__}({fields})"
    if isinstance(value, list):
        return f"[{', '.join(map(_dumped, value))}]"
    return repr(value)


def _cells(notebook: Path) -> list[tuple[str, str]]:
    """Type and source of a notebook's own cells."""
    return [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in _read(notebook)["cells"]
        if INJECTED not in cell["metadata"].get("tags", [])
    ]


def _read(path: Path) -> dict[str, Any]:
    """A notebook file, with cells and metadata."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        return {"cells": content["cells"], "metadata": content["metadata"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no notebook: expected cells and metadata; take it from version "
            "control, or write it again"
        ) from error


def _parsed(source: str, place: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(
            f"{place} holds no Python in line {error.lineno}: {error.msg}; expected a "
            "notebook or module that runs"
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
