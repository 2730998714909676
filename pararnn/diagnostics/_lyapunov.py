"""The largest Lyapunov exponent of a driven recurrence, which decides whether it can be solved in
parallel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._misc import make_ravel, num_steps, struct
from ._arguments import AnyRecurrence, solve_arguments


@dataclasses.dataclass(frozen=True)
class Lyapunov:
    """The result of [`pararnn.lyapunov`][]; printing it interprets the exponent.

    - `exponent`: the estimate of the largest Lyapunov exponent, in nats per step: by how much the
        logarithm of a small difference between two runs with the same inputs grows per step.
    - `worst_window`: the largest mean growth over any window of `window` steps.
    - `window`: the length of these windows, in steps.
    """

    exponent: float
    worst_window: float
    window: int

    def __str__(self) -> str:
        if not np.isfinite(self.exponent):
            meaning = (
                "the state forgets differences at once"
                if self.exponent < 0
                else "the states overflow: no solver can help"
            )
        elif self.exponent > 0.005:
            meaning = (
                "chaotic: no parallel method converges much faster than the sequential run; use "
                "Sequential(), whose backward pass is still a linear recurrence"
            )
        elif self.exponent > -0.05:
            meaning = (
                "close to the edge of stability: expect many iterations with chunk_size=1; use "
                f"chunks of about {_memory(self.exponent)} steps or more"
            )
        else:
            meaning = (
                f"contractive: differences shrink by e in {_memory(self.exponent)} steps. Parallel "
                "methods converge fast, unless the state switches between basins: then use "
                "Speculative()"
            )
        return (
            f"largest Lyapunov exponent {self.exponent:+.3f} per step "
            f"(worst {self.window} steps: {self.worst_window:+.3f}): {meaning}"
        )


def _memory(exponent: float) -> int:
    return max(1, round(1 / max(abs(exponent), 1e-3)))


def lyapunov(
    recurrence: AnyRecurrence, xs: PyTree[Any], init: PyTree[Any] | None = None
) -> Lyapunov:
    """Estimates the largest Lyapunov exponent of a recurrence driven by its inputs.

    One tangent is pushed through the sequential run and normalised at each step (Benettin et al.,
    *Lyapunov characteristic exponents for smooth dynamical systems*, Meccanica 1980). The first
    tenth of the sequence is left out of the mean. Newton's method on the whole sequence converges
    fast where the exponent is negative (Gonzalez et al., *Predictability enables parallelization of
    nonlinear state space models*, 2025).

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][].
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and optionally the initial state. At least one step.

    **Returns:**

    A [`pararnn.Lyapunov`][].
    """
    arguments = solve_arguments(recurrence, xs, init)
    step, us, start = arguments.step, arguments.us, arguments.init
    length = num_steps(us)
    if length == 0:
        raise ValueError("`xs` must have at least one step to estimate an exponent; got 0.")
    ravel, unravel, size, dtype = make_ravel(struct(start))

    def normalised(tangent):
        # By the largest magnitude first, whose square need not be a normal number.
        largest = jnp.max(jnp.abs(tangent), initial=0.0)
        tangent = tangent / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        norm = jnp.sqrt(jnp.sum(jnp.square(tangent)))
        tangent = tangent / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        return tangent, jnp.log(largest) + jnp.log(norm)

    def body(carry, x):
        vector, tangent = carry
        vector, tangent = jax.jvp(lambda v: ravel(step(unravel(v), x)), (vector,), (tangent,))
        tangent, growth = normalised(tangent)
        return (vector, tangent), growth

    tangent, _ = normalised(jax.random.normal(jax.random.key(0), (size,), dtype))
    first = ravel(start), tangent
    growth = np.asarray(jax.jit(lambda us: jax.lax.scan(body, first, us)[1])(us), float)
    growth = np.nan_to_num(growth[length // 10 :], nan=np.inf, posinf=np.inf, neginf=-np.inf)
    window = min(len(growth), 32)
    windows = np.lib.stride_tricks.sliding_window_view(growth, window).mean(axis=1)
    return Lyapunov(float(growth.mean()), float(windows.max()), window)
