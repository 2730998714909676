"""Choosing a solver from what is known before running anything."""

import math

import jax
from jaxtyping import Array, PyTree

from ._detection import detect_structure, is_affine
from ._misc import num_steps, raveler, time_slice
from ._structure import AbstractStructure, Dense
from .solvers import AbstractSolver, AssociativeScan, Newton, Sequential

# JAX's names of a platform; `gpu` is what its default backend is called on CUDA and ROCm.
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")

# Beyond this many state elements a dense Newton correction costs more than the sweeps that it
# saves.
_MAX_DENSE_SIZE = 128


def select_solver(
    step,
    xs: PyTree[Array],
    init: PyTree[Array],
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
    length = num_steps(xs)
    if structure is None:
        structure = detect_structure(step, init, time_slice(xs))
    _, _, size, _ = raveler(init)
    if length < 64:
        return Sequential(), f"The sequence is short: {length} steps."
    if is_affine(step, init, time_slice(xs)):
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
