"""Choosing what runs from what is known before running anything; refusing what cannot be right."""

import dataclasses
import math
from typing import Any

import jax
from jaxtyping import Array, PyTree

from ._adjoint import ClippedAdjoint, select_adjoint
from ._algebra import AbstractAlgebra
from ._detection import detect_structure, is_affine
from ._devices import typed_slice
from ._misc import num_steps, raveler
from ._structure import AbstractStructure, Dense
from ._traits import lacks_derivative, listed, shared_axes
from .solvers import AbstractSolver, AssociativeScan, Newton, Sequential

# JAX's names of a platform; `gpu` is what its default backend is called on CUDA and ROCm.
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")

# Beyond this many state elements a dense Newton correction costs more than the sweeps that it
# saves.
_MAX_DENSE_SIZE = 128


def with_algebra(
    solver: AbstractSolver | None, algebra: AbstractAlgebra | None, platform: str | None = None
) -> AbstractSolver | None:
    """The solver of a cell with this algebra: one associative scan, unless another was asked for.
    On a CPU, no solver stays the choice of `solve`."""
    if algebra is None:
        return solver
    if solver is None and (jax.default_backend() if platform is None else platform) != "cpu":
        return AssociativeScan(algebra=algebra)
    if isinstance(solver, AssociativeScan) and solver.algebra is None:
        return dataclasses.replace(solver, algebra=algebra)
    return solver


def select_solver(
    step,
    xs: PyTree[Any],
    init: PyTree[Any],
    *,
    structure: AbstractStructure | None = None,
    platform: str | None = None,
) -> tuple[AbstractSolver, str]:
    """The solver that `solve(..., solver=None)` would use, and why.

    **Arguments:**

    - `step`, `xs`, `init`: as for [`pararnn.solve`][]. Only shapes and dtypes matter.
    - `structure`: the Jacobian's structure, if it is known; it is detected otherwise.
    - `platform`: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`; `None` is
        `jax.default_backend()`.

    **Returns:**

    `(solver, reason)`.
    """
    if platform is None:
        platform = jax.default_backend()
    if not isinstance(platform, str):
        raise TypeError(f"`platform` must be a string or None; got {platform!r}.")
    if platform not in (*_PLATFORMS, jax.default_backend()):
        raise ValueError(f"`platform` must be one of {_PLATFORMS} or None; got {platform!r}.")
    if platform == "cpu":
        return Sequential(), (
            "On a CPU, one pass of `lax.scan` is near the machine's limit; parallel sweeps do the "
            "same work several times. The backward pass has its own choice (`adjoint`)."
        )
    length, x = num_steps(xs), typed_slice(xs)
    axes = shared_axes(step, init, x)
    if axes:
        return Sequential(), (
            f"The step exchanges values along {listed(axes)}: the sequences of a batch are one "
            "coupled recurrence, and must go through their steps together."
        )
    if lacks_derivative(step, init, x):
        return Sequential(), (
            "The step has no derivative in forward mode (a `jax.custom_vjp`, a callback, or a "
            "primitive without a rule), which Newton's method needs. If the recurrence forgets its "
            "state, Jacobi() solves it in parallel without one."
        )
    if structure is None:
        structure = detect_structure(step, init, x)
    _, _, size, _ = raveler(init)
    if length < 64:
        return Sequential(), f"The sequence is short: {length} steps."
    if is_affine(step, init, x):
        return AssociativeScan(), (
            "The step is affine in the state: one associative scan solves it without iterating."
        )
    if isinstance(structure, Dense) and size > _MAX_DENSE_SIZE:
        return Sequential(), (
            f"The Jacobian is dense with {size} state elements: each step is a matrix product that "
            "keeps the device busy, and chunk Jacobians would cost that many times more."
        )
    solver = Newton()
    chunk_size = solver.default_chunk_size(structure, length, size)
    kind = type(structure).__name__
    return solver, (
        f"{platform}: the Jacobian is {kind} with {structure.num_seeds(size)} tangents per sweep; "
        f"Newton over {math.ceil(length / chunk_size)} chunks of {chunk_size} steps."
    )


def choose(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
    solver: AbstractSolver | None,
    adjoint: AbstractSolver | ClippedAdjoint | None,
    structure: AbstractStructure | None,
) -> tuple[AbstractSolver, AbstractSolver | ClippedAdjoint]:
    """What stands for `None`, or for what such a step needs something else for.

    Raises a `ValueError` for a step that exchanges values with other sequences and anything but
    one step after another: under `jax.vmap`, loops that turn a different number of times for each
    sequence let one that is done meet the others at any of its steps; and the derivative's
    recurrence is not one for each sequence.
    """
    x = typed_slice(xs)
    axes = shared_axes(step, init, x)
    if axes:
        for name, value in (("solver", solver), ("adjoint", adjoint)):
            if not (value is None or isinstance(value, Sequential)):
                raise ValueError(
                    f"`{name}={type(value).__name__}(…)` treats each sequence by itself, but "
                    f"`step` exchanges values along {listed(axes)}: use `{name}=None` or "
                    f"`{name}=pararnn.Sequential()`. To solve such a recurrence in parallel, make "
                    "the batch an axis of the state, and reduce over it."
                )
        return Sequential(), Sequential()
    if solver is None:
        solver, _ = select_solver(step, xs, init, structure=structure)
    chosen = select_adjoint(jax.default_backend()) if adjoint is None else adjoint
    in_both_modes = not isinstance(chosen, Sequential | ClippedAdjoint)
    if in_both_modes and lacks_derivative(step, init, x, of_all=True):
        # There is no map from tangents to tangents to solve with and to transpose; but what flows
        # back can be solved for.
        if isinstance(chosen, AssociativeScan):
            chosen = Newton(chunk_size=1, linear_method=chosen.linear_method)
        chosen = Sequential() if adjoint is None else ClippedAdjoint(math.inf, chosen)
    return solver, chosen
