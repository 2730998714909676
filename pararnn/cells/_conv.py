"""Cells whose inputs, states and outputs are images: a convolution in the place of each product."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._base import AbstractCell, check_sizes
from ._parts import at_least_float32, normal, uniform, zero_state
from ._vector import lstm_update
from ._zero_order_hold import complex_zero_state, gain, init_log_step, init_rates, multiplier

_Images = Float[Array, "L input_channels height width"]
_Outputs = Float[Array, "L output_channels height width"]
_LSTMState = tuple[
    Float[Array, "hidden_channels height width"], Float[Array, "hidden_channels height width"]
]
_S5State = Complex[Array, "hidden_channels height width"]


class ConvLSTM(AbstractCell):
    r"""Long short-term memory of images (Shi et al., *Convolutional LSTM network: a machine
    learning approach for precipitation nowcasting*, NeurIPS 2015): [`pararnn.LSTM`][] with
    convolutions for the products with matrices,

    $$i, f, o = σ(u + W * h), \quad g = \tanh(u_g + W_g * h), \quad c' = f ⊙ c + i ⊙ g, \quad
    h' = o ⊙ \tanh(c'),$$

    with $u = W_x * x + b$ and one number of $b$ for each channel. Beyond the edges of an image are
    zeros. The peepholes of the paper, from $c$ to the gates, are left out.

    Inputs have shape `(L, input_channels, height, width)`. The state is $(c, h)$, the output $h$,
    each of shape `(hidden_channels, height, width)`. With a `kernel_size` of 1 the Jacobian
    consists of a block for each pixel. With a larger one it is banded, which is treated as dense:
    for images of more than a few hundred numbers choose a method without Jacobians, as
    [`pararnn.Jacobi`][] or [`pararnn.Sequential`][]. Parameters are stacked in the order
    $i, f, g, o$.
    """

    weight_x: Float[Array, "4*hidden_channels input_channels kernel_size kernel_size"]
    weight_h: Float[Array, "4*hidden_channels hidden_channels kernel_size kernel_size"]
    bias: Float[Array, " 4*hidden_channels"]
    input_channels: int = eqx.field(static=True)
    hidden_channels: int = eqx.field(static=True)
    image_shape: tuple[int, int] = eqx.field(static=True)
    kernel_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        image_shape: tuple[int, int],
        kernel_size: int = 3,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_channels`, `hidden_channels`: the numbers of channels of inputs and outputs.
        - `image_shape`: the height and the width of images.
        - `kernel_size`: the height and the width of all filters.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: filters uniform in $\pm 1/\sqrt{n}$ with $n$ the number of
            numbers that an output sees, the biases with that of the filters of $h$.
        """
        check_sizes(
            input_channels=input_channels, hidden_channels=hidden_channels, kernel_size=kernel_size
        )
        self.image_shape = _checked_shape(image_shape)
        keys = jax.random.split(key, 3)
        rows, area = 4 * hidden_channels, kernel_size**2
        self.weight_x = _init_filters(keys[0], rows, input_channels, kernel_size, dtype)
        self.weight_h = _init_filters(keys[1], rows, hidden_channels, kernel_size, dtype)
        self.bias = uniform(keys[2], (rows,), (hidden_channels * area) ** -0.5, dtype)
        self.input_channels = input_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size

    def init_state(self) -> _LSTMState:
        zero = zero_state((self.hidden_channels, *self.image_shape), self.weight_h)
        return zero, zero

    def project(self, xs: _Images) -> list[_Outputs]:
        _check_images(xs, self.input_channels, self.image_shape)
        us = convolve(self.weight_x, xs) + jnp.expand_dims(self.bias, (0, 2, 3))
        return jnp.split(us, 4, axis=1)

    def step(
        self, state: _LSTMState, u: list[Float[Array, "hidden_channels height width"]]
    ) -> _LSTMState:
        c, h = state
        hs = jnp.split(convolve(at_least_float32(self.weight_h), h), 4)
        return lstm_update(c, u, hs)

    def readout(self, states: Any, us: Any) -> _Outputs:
        _, h = states
        return h


class ConvS5(AbstractCell):
    r"""A diagonal state-space model of images (Smith et al., *Convolutional state space models for
    long-range spatiotemporal modeling*, NeurIPS 2023): [`pararnn.S5`][] with convolutions into and
    out of the state, whose transition acts on each pixel by itself,

    $$h_t = \bar Λ ⊙ h_{t-1} + \bar B * x_t, \qquad y_t = 2\,\mathrm{Re}(C * h_t) + D x_t, \qquad
    \bar Λ = e^{ΛΔ}, \quad \bar B = Λ^{-1} (\bar Λ - 1) B, \quad Λ = -e^ν + iω.$$

    Each channel of the state has its own $Λ$ and $Δ$; $D$ mixes channels, not pixels. Beyond the
    edges of an image are zeros.

    Inputs have shape `(L, input_channels, height, width)`, outputs
    `(L, output_channels, height, width)`. The step is affine in the state, so one pass solves it
    exactly. The Jacobian consists of 2×2 blocks, the real and the imaginary part of each number of
    the state, which has shape `(hidden_channels, height, width)` and is complex, complex64 unless
    the parameters are float64. Complex filters are stored as real and imaginary part along a
    leading axis.
    """

    weight_x: Float[Array, "2 hidden_channels input_channels kernel_size kernel_size"]
    weight_o: Float[Array, "2 output_channels hidden_channels kernel_size kernel_size"]
    skip: Float[Array, "output_channels input_channels"]
    nu: Float[Array, " hidden_channels"]
    omega: Float[Array, " hidden_channels"]
    log_step: Float[Array, " hidden_channels"]
    input_channels: int = eqx.field(static=True)
    hidden_channels: int = eqx.field(static=True)
    image_shape: tuple[int, int] = eqx.field(static=True)
    kernel_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        image_shape: tuple[int, int],
        output_channels: int | None = None,
        *,
        kernel_size: int = 3,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_channels`: the number of channels of inputs.
        - `hidden_channels`: the number of complex channels of the state, each of which stands for a
            conjugate pair.
        - `image_shape`: the height and the width of images.
        - `output_channels`: the number of channels of outputs; `None` is `input_channels`.
        - `kernel_size`: the height and the width of the filters into and out of the state.
        - `dtype`: of the parameters, which are real.
        - `key`: for the parameters: $Λ$ and $Δ$ as in [`pararnn.S5`][], $B$, $C$ and $D$ normal,
            $N(0, 1/n)$ in all for each output with $n$ the number of numbers that it sees.
        """
        output_channels = input_channels if output_channels is None else output_channels
        check_sizes(
            input_channels=input_channels,
            hidden_channels=hidden_channels,
            output_channels=output_channels,
            kernel_size=kernel_size,
        )
        self.image_shape = _checked_shape(image_shape)
        key_x, key_o, key_d, key_s = jax.random.split(key, 4)
        kernel = (kernel_size, kernel_size)
        scale = (2 * input_channels * kernel_size**2) ** -0.5
        shape = (2, hidden_channels, input_channels, *kernel)
        self.weight_x = normal(key_x, shape, scale, dtype)
        scale = (2 * hidden_channels * kernel_size**2) ** -0.5
        shape = (2, output_channels, hidden_channels, *kernel)
        self.weight_o = normal(key_o, shape, scale, dtype)
        shape = (output_channels, input_channels)
        self.skip = normal(key_d, shape, input_channels**-0.5, dtype)
        self.nu, self.omega = init_rates((hidden_channels,), self.skip.dtype)
        self.log_step = init_log_step(key_s, hidden_channels, self.skip.dtype)
        self.input_channels = input_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size

    def init_state(self) -> _S5State:
        return complex_zero_state((self.hidden_channels, *self.image_shape), self.nu)

    def project(self, xs: _Images) -> list[Array]:
        r"""$\bar B * x$ and $D x$."""
        _check_images(xs, self.input_channels, self.image_shape)
        scale = jnp.expand_dims(gain(self.nu, self.omega, self.log_step), (0, 2, 3))
        real, imag = (at_least_float32(convolve(part, xs)) for part in self.weight_x)
        return [scale * jax.lax.complex(real, imag), jnp.einsum("oi,lihw->lohw", self.skip, xs)]

    def step(self, state: _S5State, u: list[Array]) -> _S5State:
        kept = multiplier(self.nu, self.omega, self.log_step)
        driven, *_ = u
        return jnp.expand_dims(kept, (1, 2)) * state + driven

    def readout(
        self, states: Complex[Array, "L hidden_channels height width"], us: list[Array]
    ) -> _Outputs:
        _, skip = us
        real, imag = at_least_float32(self.weight_o)
        y = convolve(real, states.real) - convolve(imag, states.imag)
        return 2 * y + at_least_float32(skip)


# --- images -----------------------------------------------------------------------------------


def convolve(
    weight: Float[Array, "outputs inputs kernel_height kernel_width"],
    images: Float[Array, "*axes inputs height width"],
) -> Float[Array, "*axes outputs height width"]:
    """A convolution as networks have it (the filter is not turned round) that keeps the size of
    images, with zeros beyond their edges."""
    height, width = images.shape[-2:]
    # One product of matrices: XLA's own convolution in a loop was 30 times slower on a CPU, its
    # derivative too; and of this the structure of a Jacobian is found.
    edges = [((size - 1) // 2, size // 2) for size in weight.shape[2:]]
    padded = jnp.pad(images, [(0, 0)] * (images.ndim - 2) + edges)
    offsets = [(i, j) for i in range(weight.shape[2]) for j in range(weight.shape[3])]
    seen = [padded[..., i : i + height, j : j + width] for i, j in offsets]
    flat = weight.reshape(*weight.shape[:2], len(offsets))
    return jnp.einsum("oik,...ikhw->...ohw", flat, jnp.stack(seen, axis=-3))


def _init_filters(
    key: PRNGKeyArray, outputs: int, inputs: int, kernel_size: int, dtype: Any
) -> Float[Array, "outputs inputs kernel_size kernel_size"]:
    shape = (outputs, inputs, kernel_size, kernel_size)
    return uniform(key, shape, (inputs * kernel_size**2) ** -0.5, dtype)


def _checked_shape(image_shape: Any) -> tuple[int, int]:
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 2:
        raise ValueError(f"`image_shape` must be (height, width); got {image_shape!r}.")
    height, width = image_shape
    check_sizes(height=height, width=width)
    return height, width


def _check_images(xs: Any, channels: int, image_shape: tuple[int, int]) -> None:
    """Raises unless `xs` is a sequence of images of the right shape."""
    expected, shape = (channels, *image_shape), jnp.shape(xs)
    if len(shape) != 4 or shape[1:] != expected:
        hint = ""
        if len(shape) == 5:
            hint = " For a batch of sequences use `jax.vmap`, as in `jax.vmap(rnn)(xs)`."
        elif len(shape) == 4 and shape[1:] == (*image_shape, channels):
            hint = " Channels come first: `jnp.moveaxis(xs, -1, 1)`."
        raise ValueError(
            f"`xs` must have shape (L, channels, height, width) = (L, {channels}, "
            f"{image_shape[0]}, {image_shape[1]}); got {shape}.{hint}"
        )
