"""Do two ways to compute a recurrence agree? Each element is judged by its own scale, in time too.

The states of the sequential run are known here, so a difference can be judged by what it means:

1. It is measured by the largest magnitude that *this element* had within the last sixteenth of the
   sequence. A large neighbour excuses nothing, nor does an outlier long past.
2. Beyond the tolerance it is admitted only if rounding explains it: the sequential run is repeated
   with other roundings, and the difference may be as many times larger than theirs as a solver's
   tolerance is larger than one rounding.
3. Where rounding has to explain something, each returned state must also be the image of the one
   before it, judged in the same two ways: a chaotic system forgets everything but that. Gradients
   are then those of the returned trajectory.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._misc import make_ravel, num_steps, previous_states
from .._norms import agreement_tolerance, default_rtol
from .._recurrence import precise, scan_states
from ._rounding import rounded_anew

_DRAWS = 4
# Shorter memories would take a zero crossing for the scale.
_MIN_WINDOW = 8
GRADIENT_FACTOR = 10


class _Leaf(NamedTuple):
    """What an array is judged by: the scale of each element, and how precise its dtype is; `recent`
    carries magnitudes along in the direction that errors take."""

    expected: np.ndarray
    scale: np.ndarray
    dtype: Any
    recent: Callable[[np.ndarray], np.ndarray]


class Agreement:
    """How far states and gradients are from those of the sequential run.

    **Arguments:**

    - `step`, `xs`, `init`: the recurrence. A batch is a recurrence too: of a vectorised step, with
        the batch axis behind time's.
    - `expected`: the states of the sequential run.
    - `tolerance`: for values, at the precision of the widest leaf of the state; leaves of lower
        precision, and gradients, get more in proportion. `None` is `agreement_tolerance`.

    `where` tells the worst place of the last `value_error` that was beyond the tolerance;
    `value_difference` and `gradient_difference` are the last errors without regard to rounding.
    """

    def __init__(self, step, xs: PyTree, init: PyTree, expected: PyTree, tolerance=None):
        self._step, self._xs, self._init = precise(step), xs, init
        self._length = num_steps(xs)
        self._wide = make_ravel(init)[3]
        self._coarse = max((x.dtype for x in jtu.tree_leaves(init)), key=_eps)
        self.tolerance = agreement_tolerance(self._wide) if tolerance is None else tolerance
        self._leaves = self._of_states(expected)
        self._noise: list[np.ndarray] | None = None
        self._worst: Any = None
        self.where = ""
        self.value_difference = self.gradient_difference = 0.0

    def value_error(self, states: PyTree) -> float:
        """The largest difference of any element of the states at any time: 1 is 100 % of the
        element's own scale. What rounding explains counts as the tolerance at most."""
        error = self.value_difference = self._error(states, self._leaves)
        self.where = self._describe_worst() if error > self.tolerance else ""
        if not error > self.tolerance or not _all_finite(states):
            return error
        if self._noise is None:
            run = eqx.filter_jit(self._other_roundings)
            self._noise = _spread(lambda salt: run(self._xs, self._init, salt), self._leaves)
        error = self._error(states, self._leaves, self._noise)
        if error <= self.tolerance:
            error = max(error, self._defect(states))
        self.where = self._describe_worst() if error > self.tolerance else ""
        return error

    def gradient_error(self, gradient, expected, states, weights) -> float:
        """The same for the derivatives with respect to `(xs, init)`, of the sum of the `states`
        with the cotangents `weights`. Time runs backwards for them."""
        error = self._error(gradient, self._of_gradients(expected), factor=GRADIENT_FACTOR)
        self.gradient_difference = error
        if not error > GRADIENT_FACTOR * self.tolerance or not _all_finite((states, gradient)):
            return error
        before = previous_states(self._init, states)
        pull = eqx.filter_jit(self._pull_back)
        along = self._of_gradients(pull(self._xs, before, weights, None))
        noise = _spread(lambda salt: pull(self._xs, before, weights, salt), along)
        return min(error, self._error(gradient, along, noise, GRADIENT_FACTOR))

    def _error(self, got, leaves, noise=None, factor=1) -> float:
        """In units of the tolerance of the widest dtype, whatever the leaf's own."""
        worst = 0.0
        for i, (a, leaf) in enumerate(zip(map(_wide, jtu.tree_leaves(got)), leaves, strict=True)):
            allowed = agreement_tolerance(leaf.dtype) / agreement_tolerance(self._wide)
            with np.errstate(all="ignore"):
                difference = np.abs(a - leaf.expected)
                errors = difference / (leaf.scale * allowed)
            if noise is not None:
                explained = difference <= noise[i] * (default_rtol(leaf.dtype) / _eps(leaf.dtype))
                errors = np.where(explained, np.minimum(errors, factor * self.tolerance), errors)
            if not errors.size:
                continue
            errors = np.where(np.isfinite(errors), errors, np.inf)
            place = np.unravel_index(np.argmax(errors), errors.shape)
            if errors[place] > worst:
                worst = float(errors[place])
                self._worst = i, tuple(map(int, place)), a[place], leaf.expected[place]
        return worst

    def _describe_worst(self) -> str:
        i, (t, *index), got, expected = self._worst
        path, _ = jtu.tree_leaves_with_path(self._init)[i]
        place = f"states{jtu.keystr(path)}[{', '.join(map(str, (t, *index)))}]"
        return f"{place} is {got:.6g}, not {expected:.6g}"

    def _of_states(self, states) -> list[_Leaf]:
        leaves = []
        for h0, h in zip(jtu.tree_leaves(self._init), jtu.tree_leaves(states), strict=True):
            expected = _wide(h)
            size = np.concatenate([_size(_wide(h0))[None], _size(expected)])
            leaves.append(_Leaf(expected, _floored(_recent(size)[1:], h.dtype), h.dtype, _recent))
        return leaves

    def _of_gradients(self, gradient) -> list[_Leaf]:
        of_xs, of_init = gradient
        leaves = []
        for recent, tree in ((lambda x: _recent(x[::-1])[::-1], of_xs), (lambda x: x, of_init)):
            for g in jtu.tree_leaves(tree):
                expected = _wide(g)
                scale = _floored(recent(_size(expected)), g.dtype)
                dtype = max((g.dtype, self._coarse), key=_eps)
                leaves.append(_Leaf(expected, scale, dtype, recent))
        return leaves

    def _defect(self, states) -> float:
        """The largest difference between a state and the image of the one before it."""

        @eqx.filter_jit
        def images(xs, before, salt):
            return jax.vmap(lambda t, h, x: self._rounded(self._step, salt, t)(h, x))(
                self._times(), before, xs
            )

        before = previous_states(self._init, states)
        leaves = self._of_states(images(self._xs, before, None))
        noise = _spread(lambda salt: images(self._xs, before, salt), leaves)
        return self._error(states, leaves, noise)

    def _other_roundings(self, xs, init, salt):
        def step(state, t_and_x):
            t, x = t_and_x
            return self._rounded(self._step, salt, t)(state, x)

        return scan_states(step, (self._times(), xs), init)

    def _pull_back(self, xs, before, weights, salt):
        """The derivatives with respect to `(xs, init)`, step by step along known states."""

        def pull(state, x, cotangent):
            return eqx.filter_vjp(lambda args: self._step(*args), (state, x))[1](cotangent)[0]

        def body(cotangent, inputs):
            t, state, x, weight = inputs
            total = jtu.tree_map(jnp.add, cotangent, weight)
            return self._rounded(pull, salt, t)(state, x, total)

        start = jtu.tree_map(jnp.zeros_like, self._init)
        inputs = (self._times(), before, xs, weights)
        of_init, of_xs = jax.lax.scan(body, start, inputs, reverse=True)
        return of_xs, of_init

    def _times(self):
        return jnp.arange(self._length, dtype=jnp.uint32)

    def _rounded(self, function, salt, t):
        return function if salt is None else rounded_anew(function, salt + t)


def _spread(draw: Callable[[Array], PyTree], leaves: Sequence[_Leaf]) -> list[np.ndarray]:
    """How far other roundings move each element, now or lately, at most in a few draws."""
    noise = [np.zeros_like(leaf.scale) for leaf in leaves]
    for k in range(_DRAWS):
        # Far apart, as each step adds its number.
        drawn = jtu.tree_leaves(draw(jnp.asarray((k + 1) << 28, jnp.uint32)))
        for i, (a, leaf) in enumerate(zip(map(_wide, drawn), leaves, strict=True)):
            with np.errstate(all="ignore"):
                noise[i] = np.asarray(np.maximum(noise[i], _size(a - leaf.expected)))
    return [leaf.recent(x) for leaf, x in zip(leaves, noise, strict=True)]


def _recent(size: np.ndarray) -> np.ndarray:
    """The largest of the last entries along the leading axis, in two cumulative maxima (van Herk,
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
    """What differs by less than the smallest normal numbers does not differ."""
    info = jnp.finfo(dtype)
    return np.asarray(np.maximum(scale, float(info.tiny) / float(info.eps)), scale.dtype)


def _size(x: Any) -> np.ndarray:
    """Magnitudes; zero for what is not finite, which excuses nothing."""
    size = np.abs(x)
    return np.asarray(np.where(np.isfinite(size), size, 0), size.dtype)


def _wide(x) -> np.ndarray:
    return np.asarray(x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32))


def _all_finite(tree) -> bool:
    return all(np.all(np.isfinite(_wide(x))) for x in jtu.tree_leaves(tree))


def _eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)
