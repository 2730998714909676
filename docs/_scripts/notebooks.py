"""Tutorials: Python files in the percent format, run, and shown as pages and as notebooks."""

import ast
import hashlib
import pathlib
import shutil

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from traitlets.config import Config

_ROOT = pathlib.Path(__file__).parents[2]
# What was run already, by a hash of all that it is made of.
_CACHE = _ROOT / "build" / "tutorials"


def rendered(source: pathlib.Path) -> dict[str, bytes]:
    """The files that a tutorial becomes, by name: a page, its pictures, and the notebook. It is run
    unless it was, as it is, with the package as it is."""
    folder = _CACHE / f"{source.stem}-{_digest(source)}"
    if not folder.exists():
        for old in _CACHE.glob(f"{source.stem}-*"):
            shutil.rmtree(old)
        made = _run(source)
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, content in made.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        unfinished.rename(folder)
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _digest(source: pathlib.Path) -> str:
    package = (_code(file) for file in sorted((_ROOT / "pararnn").rglob("*.py")))
    parts = [source.read_text(), pathlib.Path(__file__).read_text(), *package]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _code(file: pathlib.Path) -> str:
    """What a file does: without comments and texts that stand by themselves, such as docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [part for part in body if not _is_text(part)]  # pyright: ignore
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _run(source: pathlib.Path) -> dict[str, bytes]:
    name = source.stem
    notebook = jupytext.read(source)
    own = Config({"KernelManager": {"transport": "ipc"}})  # no port is opened
    NotebookClient(notebook, timeout=600, kernel_name="python3", config=own).execute()
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": "output", "output_files_dir": f"{name}_files"}
    )
    title, _, rest = body.lstrip().partition("\n")
    links = f"This page is a notebook: [download it]({name}.ipynb)."
    page = f"{title}\n\n{links}\n{rest}".replace("![png](", "![What the cell above draws](")
    files = {f"{name}.md": page.encode(), f"{name}.ipynb": nbformat.writes(notebook).encode()}
    return {**files, **resources["outputs"]}
