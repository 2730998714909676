"""Legendre memory units: a fixed linear memory of the last $θ$ steps."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractCell, check_inputs, check_sizes
from ._parts import affine, at_least_float32, normal, uniform, zero_state

_Memory = Float[Array, "memory_size order"]
_State = tuple[Float[Array, " hidden_size"], Float[Array, " order"]]


class LinearLMU(AbstractCell):
    r"""The Legendre memory unit in its linear form (Chilkuri, Eliasmith, *Parallelizing Legendre
    memory unit training*, ICML 2021). Each of `memory_size` channels $u = E x$ is remembered by
    `order` numbers $m$, the coefficients of Legendre polynomials over the last $θ$ steps:

    $$m_t = \bar A m_{t-1} + \bar B u_t, \qquad y_t = \tanh(W_m m_t + W_x x_t + b),$$

    with the $m$ of all channels in one vector for the output. $\bar A$ and $\bar B$ are not
    trained and not stored: they follow from `order` and `theta`, as the exact discretisation, with
    inputs held over a step of 1, of $\dot m = A m + B u$,

    $$A_{ij} = \frac{2i+1}{θ} \begin{cases} -1 & i < j \\ (-1)^{i-j+1} & i \ge j \end{cases},
    \qquad B_i = \frac{(2i+1) (-1)^i}{θ}.$$

    The step is affine in the state, so one pass solves it exactly. The Jacobian consists of
    `memory_size` blocks of `order × order`, all equal to $\bar A$. The state has shape
    `(memory_size, order)` and at least float32, the output `(hidden_size,)`.
    """

    weight_u: Float[Array, "memory_size input_size"]
    weight_m: Float[Array, "hidden_size memory_size*order"]
    weight_x: Float[Array, "hidden_size input_size"]
    bias: Float[Array, " hidden_size"]
    input_size: int = eqx.field(static=True)
    memory_size: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        order: int,
        theta: int | float,
        *,
        memory_size: int = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and outputs.
        - `order`: how many numbers each channel is remembered by.
        - `theta`: how many steps are remembered, not necessarily a whole number.
        - `memory_size`: the number of channels.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: $E$ uniform in $\pm\sqrt{3/\text{input\_size}}$, $W_m$ and
            $W_x$ normal with variance $2/(\text{inputs} + \text{outputs})$, $b = 0$.
        """
        check_sizes(
            input_size=input_size, hidden_size=hidden_size, order=order, memory_size=memory_size
        )
        _check_theta(theta)
        key_u, key_m, key_x = jax.random.split(key, 3)
        self.weight_u = uniform(key_u, (memory_size, input_size), (3 / input_size) ** 0.5, dtype)
        self.weight_m = _init_kernel(key_m, hidden_size, memory_size * order, dtype)
        self.weight_x = _init_kernel(key_x, hidden_size, input_size, dtype)
        self.bias = jnp.zeros(hidden_size, self.weight_x.dtype)
        self.input_size = input_size
        self.memory_size = memory_size
        self.order = order
        self.theta = float(theta)

    def init_state(self) -> _Memory:
        return zero_state((self.memory_size, self.order), self.weight_u)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$u$ and $W_x x + b$."""
        check_inputs(xs, self.input_size)
        return [at_least_float32(xs @ self.weight_u.T), affine(self.weight_x, self.bias, xs)]

    def step(self, state: _Memory, u: list[Float[Array, "..."]]) -> _Memory:
        channels, *_ = u
        return _remember(state, channels, self.theta)

    def readout(
        self,
        states: Float[Array, "L memory_size order"],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L hidden_size"]:
        _, skip = us
        memory = states.reshape(len(states), self.memory_size * self.order)
        return jnp.tanh(memory @ at_least_float32(self.weight_m).T + at_least_float32(skip))


class LMU(AbstractCell):
    r"""The Legendre memory unit (Voelker, Kajić, Eliasmith, *Legendre memory units: continuous-time
    representation in recurrent neural networks*, NeurIPS 2019): the memory of
    [`pararnn.LinearLMU`][], of one channel $u$, coupled to a nonlinear network,

    $$u_t = e_x^\top x_t + e_h^\top h_{t-1} + e_m^\top m_{t-1}, \quad
    m_t = \bar A m_{t-1} + \bar B u_t, \quad h_t = \tanh(W_x x_t + W_h h_{t-1} + W_m m_t).$$

    $\bar A$ and $\bar B$ are not trained and not stored. The Jacobian is dense. The state is
    `(h, m)`, of shapes `(hidden_size,)` and `(order,)` and of at least float32; the output is $h$.
    """

    encoder_x: Float[Array, " input_size"]
    encoder_h: Float[Array, " hidden_size"]
    encoder_m: Float[Array, " order"]
    weight_x: Float[Array, "hidden_size input_size"]
    weight_h: Float[Array, "hidden_size hidden_size"]
    weight_m: Float[Array, "hidden_size order"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        order: int,
        theta: int | float,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and of $h$.
        - `order`: the size of the memory.
        - `theta`: how many steps it spans, not necessarily a whole number.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: $e_x$ and $e_h$ uniform in $\pm\sqrt{3/n}$ with $n$ their size,
            $e_m = 0$, and matrices normal with variance $2/(\text{inputs} + \text{outputs})$.
        """
        check_sizes(input_size=input_size, hidden_size=hidden_size, order=order)
        _check_theta(theta)
        keys = jax.random.split(key, 5)
        self.encoder_x = uniform(keys[0], (input_size,), (3 / input_size) ** 0.5, dtype)
        self.encoder_h = uniform(keys[1], (hidden_size,), (3 / hidden_size) ** 0.5, dtype)
        self.encoder_m = jnp.zeros(order, self.encoder_x.dtype)
        self.weight_x = _init_kernel(keys[2], hidden_size, input_size, dtype)
        self.weight_h = _init_kernel(keys[3], hidden_size, hidden_size, dtype)
        self.weight_m = _init_kernel(keys[4], hidden_size, order, dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.order = order
        self.theta = float(theta)

    def init_state(self) -> _State:
        like = self.weight_h
        return zero_state(self.hidden_size, like), zero_state(self.order, like)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L ..."]]:
        """$e_x^\\top x$ and $W_x x$."""
        check_inputs(xs, self.input_size)
        return [at_least_float32(xs @ self.encoder_x), at_least_float32(xs @ self.weight_x.T)]

    def step(self, state: _State, u: list[Float[Array, "..."]]) -> _State:
        (h, m), (channel, of_x) = state, u
        of_h, of_m = map(at_least_float32, (self.encoder_h, self.encoder_m))
        channel = channel + of_h @ h + of_m @ m
        (m,) = _remember(jnp.expand_dims(m, 0), jnp.expand_dims(channel, 0), self.theta)
        of_h, of_m = map(at_least_float32, (self.weight_h, self.weight_m))
        return jnp.tanh(of_x + of_h @ h + of_m @ m), m

    def readout(
        self,
        states: tuple[Float[Array, "L hidden_size"], Float[Array, "L order"]],
        us: list[Float[Array, "L ..."]],
    ) -> Float[Array, "L hidden_size"]:
        return states[0]


# --- the memory -------------------------------------------------------------------------------


def _check_theta(theta: Any) -> None:
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise TypeError(f"`theta` must be a Python number; got {theta!r}.")
    if not 0 < theta < math.inf:
        raise ValueError(f"`theta` must be positive and finite; got {theta}.")


def _init_kernel(key: PRNGKeyArray, outputs: int, inputs: int, dtype: Any) -> Array:
    return normal(key, (outputs, inputs), (2 / (inputs + outputs)) ** 0.5, dtype)


@functools.lru_cache(maxsize=32)
def _discretised(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    r"""$\bar A$ and $\bar B$ in float64. With $u$ held constant, $(m, u)$ is itself a linear
    system, whose exponential holds both; no inverse of $A$ is needed."""
    i, j = np.indices((order, order))
    system = np.zeros((order + 1, order + 1))
    system[:-1, :-1] = np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    system[:-1, -1] = (-1.0) ** np.arange(order)
    system[:-1] *= (2 * np.arange(order)[:, None] + 1) / theta
    exponential = scipy.linalg.expm(system)
    exponential.setflags(write=False)  # all callers share it
    return exponential[:-1, :-1], exponential[:-1, -1]


def _remember(memory: _Memory, u: Float[Array, " memory_size"], theta: float) -> _Memory:
    r"""$\bar A m + \bar B u$ for each channel."""
    a, b = (jnp.asarray(x, memory.dtype) for x in _discretised(memory.shape[1], theta))
    return memory @ a.T + jnp.expand_dims(u, 1) * jnp.expand_dims(b, 0)
