"""The rooms of the package, and which way imports run between them."""

import ast
import pathlib
import re
import typing

import pytest

import pararnn

PACKAGE = pathlib.Path(pararnn.__file__).parent
# Top first: a file imports only from rooms above its own, or from its own folder.
ROOMS = [
    "jaxprs",
    "_misc",
    "_tracing",
    "_one_device",
    "_norms",
    "_platform",
    "_validate",
    "_batch",
    "kernels",
    "_step_properties",
    "structures",
    "_algebra",
    "scans",
    "sweeps",
    "sharding",
    "_shards",
    "_recurrence",
    "_solution",
    "_program_cache",
    "cells",
    "solvers",
    "_checked_solve",
    "adjoints",
    "_checks",
    "_select",
    "_packing",
    "_solve",
    "layers",
    "diagnostics",
    "__init__",
]
# No room is above these for the other, although one must come first in the list.
STRANGERS = {"cells", "solvers"}
FOLDERS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())
MAX_LINES = 400

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def at(file: pathlib.Path, node: ast.AST | None = None) -> str:
    """Where an offender stands."""
    line = "" if node is None else f":{node.lineno}"  # pyright: ignore[reportAttributeAccessIssue]
    return f"{file.relative_to(PACKAGE)}{line}"


def room(file: pathlib.Path) -> str:
    """The folder directly below the package, or the file itself."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def own_imports(file: pathlib.Path) -> list[pathlib.Path]:
    """The files of the package that a file imports, at any depth of its syntax tree."""
    found = []
    for node in ast.walk(TREES[file]):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = file.parents[node.level - 1]
        target = base.joinpath(*(node.module or "").split(".")) if node.module else base
        for alias in node.names:
            candidates = (
                target / f"{alias.name}.py",
                target / alias.name / "__init__.py",
                target.with_suffix(".py"),
                target / "__init__.py",
            )
            found.append(next(file for file in candidates if file.exists()))
    return found


IMPORTS = {file: own_imports(file) for file in FILES}


def test_the_rooms_are_described():
    """In the table of CONTRIBUTING.md, in the same order."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Rooms") : text.index("## Style")]
    columns = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = [name for cell in columns for name in re.findall(r"`(\w+)(?:\.py|/)`", cell)]
    assert [*named, "__init__"] == ROOMS


def test_imports_run_downwards():
    assert {room(file) for file in FILES} <= set(ROOMS), "add to the list of rooms"
    upwards = [
        f"{at(file)} imports {at(target)}"
        for file, targets in IMPORTS.items()
        for target in targets
        if (own := room(file)) != (other := room(target))
        and (ROOMS.index(other) > ROOMS.index(own) or {own, other} == STRANGERS)
    ]
    assert not upwards


def test_no_circles_inside_a_folder():
    waiting = {
        file: {target for target in targets if target.parent == file.parent != PACKAGE}
        for file, targets in IMPORTS.items()
    }
    while ready := [file for file, targets in waiting.items() if not targets & waiting.keys()]:
        for file in ready:
            del waiting[file]
    assert not list(map(at, waiting))


def test_files():
    """Short and private: public names are re-exported."""
    wrong = [
        at(file)
        for file in FILES
        if len(file.read_text().splitlines()) > MAX_LINES
        or file.name in ("utils.py", "_utils.py", "helpers.py")
        or not file.name.startswith("_")
    ]
    assert not wrong


def is_misplaced(node: ast.AST) -> bool:
    """A delayed import of our own, one by absolute name, or a private module of JAX. (What another
    package may lack, a plotting library, is imported where it is used.)"""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            return any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(node))
        case ast.Import(names=names):
            return any(
                "_src" in name.name or name.name.split(".")[0] == "pararnn" for name in names
            )
        case ast.ImportFrom(module=module, level=level):
            parts = (module or "").split(".")
            return "_src" in parts or (level == 0 and parts[0] == "pararnn")
        case ast.Attribute(attr=name):
            return name == "_src"
    return False


def test_imports_stand_at_the_top_and_are_relative():
    wrong = [
        at(f, node) for f, tree in TREES.items() for node in ast.walk(tree) if is_misplaced(node)
    ]
    assert not wrong


def public_names(file: pathlib.Path) -> set[str]:
    """The functions and classes that a file defines, without an underscore."""
    body = (n for n in TREES[file].body if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
    return {node.name for node in body if not node.name.startswith("_")}


def reexports(file: pathlib.Path) -> dict[str, str]:
    """`{name: name it is given}` of the relative imports of an `__init__.py`."""
    pairs = {}
    for node in TREES[file].body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                pairs[alias.name] = alias.asname
    return pairs


def test_reexports_are_redundant():
    """`from ._x import y as y` is what type checkers take for public; no more stands there."""
    files = [PACKAGE / folder / "__init__.py" for folder in ["", *FOLDERS]]
    assert not [
        f"{at(file)}: write `{name} as {name}`"
        for file in files
        for name, given in reexports(file).items()
        if name != given
    ]
    assert not [
        at(file, node)
        for file in files
        for node in TREES[file].body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    ]


@pytest.mark.parametrize("folder", sorted(STRANGERS))
def test_families_are_exported_by_the_package(folder):
    """Each cell and each solver is to be had as `pararnn.Name`; what is abstract too."""
    inner = reexports(PACKAGE / folder / "__init__.py")
    outer = reexports(PACKAGE / "__init__.py")
    base = {"cells": "AbstractCell", "solvers": "AbstractSolver"}[folder]
    for name in inner:
        value = getattr(getattr(pararnn, folder), name)
        if isinstance(value, type) and issubclass(value, getattr(pararnn, base)):
            if name.startswith("Abstract") and name != base:
                continue
            assert name in outer, f"{name} is missing in pararnn/__init__.py"


@pytest.mark.parametrize("folder", sorted(STRANGERS))
def test_every_family_is_exported_by_its_folder(folder):
    inner = reexports(PACKAGE / folder / "__init__.py")
    base = {"cells": "AbstractCell", "solvers": "AbstractSolver"}[folder]
    for file in (PACKAGE / folder).glob("_*.py"):
        for node in TREES[file].body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            bases = {b.id for b in node.bases if isinstance(b, ast.Name)}
            if base in bases or any(b.startswith("Abstract") and b in inner for b in bases):
                assert node.name in inner, f"{node.name} is missing in {folder}/__init__.py"


def test_entry_points_are_exported():
    outer = reexports(PACKAGE / "__init__.py")
    for name in (
        "_solve",
        "_solution",
        "layers/_rnn",
        "layers/_torch",
        "diagnostics/_lyapunov",
        "diagnostics/_choose",
        "diagnostics/_verify",
        "diagnostics/_benchmark",
        "diagnostics/_measurements",
    ):
        file = PACKAGE / f"{name}.py"
        missing = public_names(file) - set(outer)
        assert not missing, f"{missing} of {file.name}"
    assert (PACKAGE / "py.typed").exists()
    for name in outer:
        assert hasattr(pararnn, name)


def test_one_place_asks_for_the_platform():
    asking = [
        file.name
        for file in FILES
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Attribute) and node.attr == "default_backend"
    ]
    assert asking == ["_platform.py"]


def test_nobody_asks_which_solver_or_structure_it_is():
    """They have methods. (Whether a value is one at all is asked where users pass it.)"""
    concrete = {
        name
        for module in (pararnn.solvers, pararnn.structures, pararnn.adjoints, pararnn.scans)
        for name, value in vars(module).items()
        if isinstance(value, type) and not name.startswith("Abstract")
    }
    for file in FILES:
        for node in ast.walk(TREES[file]):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                # Speculative refuses itself as the corrector of another.
                allowed = {"Speculative"} if file.name == "_speculative.py" else set()
                assert not asked & concrete - allowed, f"{file.name}:{node.lineno}: {asked}"


def classes() -> list[type]:
    modules = [pararnn, *(getattr(pararnn, folder) for folder in FOLDERS)]
    found = {v for m in modules for v in vars(m).values() if isinstance(v, type)}
    return sorted(
        (c for c in found if c.__module__.startswith("pararnn")), key=lambda c: c.__name__
    )


def test_classes_are_abstract_or_final():
    """A class that others are derived from begins with `Abstract`."""
    for cls in classes():
        for base in cls.__mro__[1:]:
            if base.__module__.startswith("pararnn"):
                assert base.__name__.startswith(("Abstract", "_Abstract")), (cls, base)


def test_public_names_have_docstrings():
    for module in (pararnn, *(getattr(pararnn, folder) for folder in FOLDERS)):
        for name in reexports(pathlib.Path(module.__file__)):
            value = getattr(module, name)
            if typing.get_origin(value) is None:  # not an alias of a type
                assert (value.__doc__ or "").strip(), name
