"""Measures of agreement between two ways to compute the same arrays."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._misc import make_ravel, num_steps, previous_states
from .._norms import default_rtol
from .._recurrence import precise, scan_states
from ._rounding import rounded_anew

GRADIENT_FACTOR = 10
_DRAWS = 4
# A shorter window would take a zero crossing for the scale.
_MIN_WINDOW = 8


def agreement_tolerance(dtype: Any) -> float:
    """The relative error up to which two solutions of a recurrence agree."""
    return {"float32": 1e-5, "float64": 1e-10}.get(jnp.dtype(dtype).name, 10 * default_rtol(dtype))


def relative_error(got: PyTree[Array], expected: PyTree[Array]) -> float:
    """The largest difference of any leaf, relative to that leaf's largest magnitude; `inf` if any
    difference is not finite."""
    worst = 0.0
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        a, b = _wide(a), _wide(b)
        with np.errstate(all="ignore"):
            scale = float(np.max(np.abs(b), initial=0.0)) or 1.0
            error = float(np.max(np.abs(a - b), initial=0.0)) / scale
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def differing_rows(
    got: PyTree[Array],
    expected: PyTree[Array],
    tolerance: Callable[[Any], float],
    trajectory: PyTree[Array] | None = None,
) -> np.ndarray:
    """A flag per row: whether an element differs by more than `tolerance(dtype)` times its scale.

    The scale of an element is its largest magnitude in any row of `trajectory` (`None`:
    `expected`), and at least a thousandth of that of its array, for elements that are the rounding
    of larger ones. NaN equals NaN, and integers must be equal.
    """
    leaves, whole = jtu.tree_leaves(expected), expected if trajectory is None else trajectory
    flags = np.zeros(len(leaves[0]), bool)
    for a, b, every in zip(jtu.tree_leaves(got), leaves, jtu.tree_leaves(whole), strict=True):
        if jnp.issubdtype(b.dtype, jnp.inexact):
            allowed, (a, b), size = tolerance(b.dtype), map(_wide, (a, b)), _size(_wide(every))
            scale = np.maximum(np.max(size, axis=0), 1e-3 * np.max(size, initial=0.0))
            with np.errstate(all="ignore"):
                near = (np.abs(a - b) <= allowed * scale) | (a == b) | (np.isnan(a) & np.isnan(b))
        else:
            near = np.asarray(a) == np.asarray(b)
        flags |= np.any(~near.reshape(len(near), -1), axis=1)
    return flags


class Error(NamedTuple):
    """An error as [`pararnn.diagnostics.Agreement`][] measures it.

    - `error`: the largest relative difference; differences that rounding explains count as the
        tolerance at most.
    - `difference`: the same without regard to rounding.
    - `where`: the worst element, if the error is beyond the tolerance; empty otherwise.
    """

    error: float
    difference: float
    where: str = ""


class _Leaf(NamedTuple):
    """An expected array, the scale of each element, the dtype whose precision counts, and the
    running maximum of magnitudes in the direction in which errors propagate."""

    expected: np.ndarray
    scale: np.ndarray
    dtype: Any
    recent: Callable[[np.ndarray], np.ndarray]


class Agreement:
    """Compares states and gradients with those of the sequential run, element by element.

    1. A difference is relative to the largest magnitude of *the same element* within the last
       sixteenth of the sequence: neither a large neighbour nor an early outlier hides it.
    2. Beyond the tolerance a difference is admitted only if rounding explains it: the sequential
       run is repeated with other roundings, and the difference may exceed theirs by the factor by
       which a solver's tolerance exceeds one rounding.
    3. Where rounding has to explain a difference, each returned state must also be the image of the
       one before it, judged in the same two ways: then it is a trajectory of the recurrence, which
       is all that a chaotic system determines. Gradients are those of the returned trajectory.

    **Arguments:**

    - `step`, `xs`, `init`: the recurrence. For a batch, the vectorised step, with the batch axis
        behind the time axis.
    - `expected`: the states of the sequential run.
    - `tolerance`: of values, for the widest dtype of the state. Leaves of lower precision get more
        in proportion, gradients ten times as much. `None`: 1e-5 in float32, 1e-10 in float64.
    """

    def __init__(self, step, xs: PyTree, init: PyTree, expected: PyTree, tolerance=None):
        self._step, self._xs, self._init = precise(step), xs, init
        self._times = jnp.arange(num_steps(xs), dtype=jnp.uint32)
        self._wide = make_ravel(init)[3]
        self._coarse = max((x.dtype for x in jtu.tree_leaves(init)), key=_eps)
        self.tolerance = agreement_tolerance(self._wide) if tolerance is None else tolerance
        self._leaves = self._of_states(expected)
        self._noise: list[np.ndarray] | None = None

    def value_error(self, states: PyTree) -> Error:
        """The error of the states."""
        error = difference, worst = self._largest(states, self._leaves)
        if difference > self.tolerance and _all_finite(states):
            if self._noise is None:
                run = eqx.filter_jit(self._run)
                self._noise = _spread(lambda salt: run(self._xs, self._init, salt), self._leaves)
            error = self._largest(states, self._leaves, self._noise)
            if error[0] <= self.tolerance:
                error = max(error, self._defect(states), key=lambda e: e[0])
        error, worst = error
        return Error(error, difference, self._describe(worst) if error > self.tolerance else "")

    def gradient_error(self, gradient, expected, states, weights) -> Error:
        """The error of the derivatives of the sum of `states` with the cotangents `weights`, with
        respect to `(xs, init)`."""
        difference, _ = self._largest(gradient, self._of_gradients(expected), None, GRADIENT_FACTOR)
        if not difference > GRADIENT_FACTOR * self.tolerance or not _all_finite((states, gradient)):
            return Error(difference, difference)
        before = previous_states(self._init, states)
        pull = eqx.filter_jit(self._pull_back)
        along = self._of_gradients(pull(self._xs, before, weights, None))
        noise = _spread(lambda salt: pull(self._xs, before, weights, salt), along)
        error, _ = self._largest(gradient, along, noise, GRADIENT_FACTOR)
        return Error(min(error, difference), difference)

    def _largest(self, got, leaves, noise=None, factor=1) -> tuple[float, Any]:
        """The largest error, in units of the tolerance of the widest dtype, and where it is."""
        largest, worst = 0.0, None
        for i, (a, leaf) in enumerate(zip(map(_wide, jtu.tree_leaves(got)), leaves, strict=True)):
            allowed = agreement_tolerance(leaf.dtype) / agreement_tolerance(self._wide)
            with np.errstate(all="ignore"):
                difference = np.abs(a - leaf.expected)
                errors = difference / (leaf.scale * allowed)
            if noise is not None:
                explained = difference <= noise[i] * (default_rtol(leaf.dtype) / _eps(leaf.dtype))
                errors = np.where(explained, np.minimum(errors, factor * self.tolerance), errors)
            errors = np.where(np.isfinite(errors), errors, np.inf)
            if np.max(errors, initial=0.0) > largest:
                index = np.unravel_index(np.argmax(errors), errors.shape)
                largest = float(errors[index])
                worst = i, tuple(map(int, index)), a[index], leaf.expected[index]
        return largest, worst

    def _describe(self, worst) -> str:
        i, index, got, expected = worst
        path, _ = jtu.tree_leaves_with_path(self._init)[i]
        element = f"states{jtu.keystr(path)}[{', '.join(map(str, index))}]"
        return f"{element} is {got:.6g}, not {expected:.6g}"

    def _of_states(self, states) -> list[_Leaf]:
        leaves = []
        for h0, h in zip(jtu.tree_leaves(self._init), jtu.tree_leaves(states), strict=True):
            expected = _wide(h)
            size = np.concatenate([_size(_wide(h0))[None], _size(expected)])
            leaves.append(_Leaf(expected, _floored(_recent(size)[1:], h.dtype), h.dtype, _recent))
        return leaves

    def _of_gradients(self, gradient) -> list[_Leaf]:
        # Cotangents, and their errors, propagate backwards in time.
        backwards = (lambda x: _recent(x[::-1])[::-1]), (lambda x: x)
        leaves = []
        for recent, tree in zip(backwards, gradient, strict=True):
            for g in jtu.tree_leaves(tree):
                expected, dtype = _wide(g), max((g.dtype, self._coarse), key=_eps)
                scale = _floored(recent(_size(expected)), g.dtype)
                leaves.append(_Leaf(expected, scale, dtype, recent))
        return leaves

    def _defect(self, states) -> tuple[float, Any]:
        """The largest difference between a state and the image of the one before it."""

        @eqx.filter_jit
        def images(salt):
            before = previous_states(self._init, states)
            return jax.vmap(lambda t, h, x: _rounded(self._step, salt, t)(h, x))(
                self._times, before, self._xs
            )

        leaves = self._of_states(images(None))
        return self._largest(states, leaves, _spread(images, leaves))

    def _run(self, xs, init, salt):
        """The sequential run with other roundings."""

        def step(state, inputs):
            t, x = inputs
            return _rounded(self._step, salt, t)(state, x)

        return scan_states(step, (self._times, xs), init)

    def _pull_back(self, xs, before, weights, salt):
        """The derivatives with respect to `(xs, init)`, step by step along given states."""

        def pull(state, x, cotangent):
            return eqx.filter_vjp(lambda args: self._step(*args), (state, x))[1](cotangent)[0]

        def body(cotangent, inputs):
            t, state, x, weight = inputs
            total = jtu.tree_map(jnp.add, cotangent, weight)
            return _rounded(pull, salt, t)(state, x, total)

        start = jtu.tree_map(jnp.zeros_like, self._init)
        inputs = (self._times, before, xs, weights)
        of_init, of_xs = jax.lax.scan(body, start, inputs, reverse=True)
        return of_xs, of_init


def _rounded(function, salt, t):
    return function if salt is None else rounded_anew(function, salt + t)


def _spread(draw: Callable[[Array], PyTree], leaves: Sequence[_Leaf]) -> list[np.ndarray]:
    """The largest change of each element, now or recently, in a few runs with other roundings."""
    noise = [np.zeros_like(leaf.scale) for leaf in leaves]
    for k in range(_DRAWS):
        # The salts are far apart, because each step adds its number.
        drawn = jtu.tree_leaves(draw(jnp.asarray((k + 1) << 28, jnp.uint32)))
        for i, (a, leaf) in enumerate(zip(map(_wide, drawn), leaves, strict=True)):
            with np.errstate(all="ignore"):
                noise[i] = np.asarray(np.maximum(noise[i], _size(a - leaf.expected)))
    return [leaf.recent(x) for leaf, x in zip(leaves, noise, strict=True)]


def _recent(size: np.ndarray) -> np.ndarray:
    """The running maximum over a window along the leading axis, by two cumulative maxima (van Herk,
    1992)."""
    length = len(size)
    window = min(length, max(_MIN_WINDOW, length // 16))
    if window == 0:
        return size
    padded = np.concatenate([size, np.zeros((-length % window, *size.shape[1:]), size.dtype)])
    blocks = padded.reshape(-1, window, *size.shape[1:])
    upto = np.maximum.accumulate(blocks, axis=1).reshape(padded.shape)[:length]
    since = np.maximum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].reshape(padded.shape)
    upto[window - 1 :] = np.maximum(upto[window - 1 :], since[: length - window + 1])
    return upto


def _floored(scale: np.ndarray, dtype) -> np.ndarray:
    """Differences below the smallest normal numbers do not count."""
    info = jnp.finfo(dtype)
    return np.asarray(np.maximum(scale, float(info.tiny) / float(info.eps)), scale.dtype)


def _size(x: Any) -> np.ndarray:
    """Magnitudes, zero where they are not finite."""
    size = np.abs(x)
    return np.asarray(np.where(np.isfinite(size), size, 0), size.dtype)


def _wide(x) -> np.ndarray:
    return np.asarray(x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32))


def _all_finite(tree) -> bool:
    return all(np.all(np.isfinite(_wide(x))) for x in jtu.tree_leaves(tree))


def _eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)
