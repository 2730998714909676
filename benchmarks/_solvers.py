"""Solvers by name, as the command lines and the result files write them."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import pararnn as prnn
from pararnn.diagnostics import select_adjoint, select_solver

NO_KERNELS = "-kernels"
SCAN, CHOICE = "lax.scan", "choice"  # in the records of a GPU
_SWITCH = "PARARNN_KERNELS"


def parse_solver(text: str) -> prnn.AbstractSolver | None:
    """`default` → None, `Newton` → `Newton()`, `Newton(64)` → `Newton(chunk_size=64)`."""
    if text == "default":
        return None
    match = re.fullmatch(r"(\w+)(?:\((\d+)\))?", text)
    solver = getattr(prnn.solvers, match[1], None) if match else None
    if match is None or not isinstance(solver, type) or not issubclass(solver, prnn.AbstractSolver):
        raise ValueError(f"`solvers` must be like default, Jacobi or Newton(64); got {text!r}.")
    options: dict[str, Any] = {"chunk_size": int(match[2])} if match[2] else {}
    return solver(**options)


def settings(text: str, cell: prnn.AbstractCell, xs: Any, platform: str | None = None) -> Any:
    """The solver and the adjoint of a name, with all options resolved for a platform.

    `default` is the package's choice there. Others are read by `parse_solver`, and solve the
    recurrence of the derivative too. With `-kernels` behind it, generated kernels are disabled.
    """
    solver = parse_solver(text.removesuffix(NO_KERNELS))
    layer = prnn.RNN(cell, solver=solver, adjoint=solver)
    with _kernels(not text.endswith(NO_KERNELS)):
        return tuple(
            select(layer, xs, platform=platform)[0] for select in (select_solver, select_adjoint)
        )


@contextlib.contextmanager
def _kernels(on: bool) -> Iterator[None]:
    """Enables or disables kernels for all settings that are resolved within the block."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = str(int(on))
    try:
        yield
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before
