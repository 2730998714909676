import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._algebra import AbstractAlgebra
from ._base import AbstractCell, check_inputs, check_sizes
from ._parts import affine, at_least_float32, init_linear, uniform, zero_state
from ._vector import Vector, Vectors

_Clamp = tuple[Float[Array, " size"], Float[Array, " size"]]

# Ties go to the later argument. `jnp.minimum` would halve the derivative there, and giving them to
# the earlier one would not be associative: take h = r < s and the clamps (∞, s), then (r, -∞). Step
# by step, h becomes s, and s becomes r: the derivative is r's. Composed, h and r tie, and it would
# be h's. NaNs are kept.


def _min(later: Array, earlier: Array) -> Array:
    return jnp.where((earlier < later) | jnp.isnan(earlier), earlier, later)


def _max(later: Array, earlier: Array) -> Array:
    return jnp.where((earlier > later) | jnp.isnan(earlier), earlier, later)


@dataclasses.dataclass(frozen=True)
class ClampAlgebra(AbstractAlgebra):
    r"""The maps $h \mapsto \max(\min(r, h), s)$, elementwise; the result is $s$ where $s > r$.

    An element is the pair $(r, s)$. Composition is exact, as it only selects:

    $$(r_2, s_2) ∘ (r_1, s_1) = (\min(r_2, r_1),\; \max(\min(r_2, s_1), s_2)),$$

    with the identity $(∞, -∞)$. Each result equals one argument and has derivative 1 with respect
    to it, 0 with respect to the others. At a tie that is the argument that came last in time: a
    bound wins over the state and over earlier bounds, the lower bound over the upper.
    """

    def element(self, u: Any) -> _Clamp:
        """The first two entries of `u` are the bounds $r$ and $s$."""
        upper, lower, *_ = u
        return upper, lower

    def constant(self, state: Float[Array, " size"]) -> _Clamp:
        return state, state

    def compose(self, later: _Clamp, earlier: _Clamp) -> _Clamp:
        (r2, s2), (r1, s1) = later, earlier
        return _min(r2, r1), _max(s2, _min(r2, s1))

    def apply(self, element: _Clamp, state: Float[Array, " size"]) -> Float[Array, " size"]:
        upper, lower = element
        return _max(lower, _min(upper, state))


class MinMax(AbstractCell):
    r"""A neuron that clamps its state between two bounds that the input sets (*MinMax Recurrent
    Neural Cascades*, 2026):

    $$h' = \max(\min(r, h), s), \quad r = W_r x + b_r, \quad s = W_s x + b_s, \qquad
    y = W_o (h' ⊙ σ(W_g x)).$$

    The upper bound $r$ forgets, the lower bound $s$ writes; where $s > r$ the result is $s$. The
    steps compose to clamps again ([`pararnn.ClampAlgebra`][], also for the derivative at ties), so
    one associative scan is exact. Every state equals a bound or the state before, and every
    derivative is 0 or 1: over any length, nothing vanishes or explodes.

    The Jacobian is diagonal. The state has shape `(hidden_size,)`, the output `(output_size,)`. A
    clamp is monotone in the state, so it latches but does not permute: parity and other group-like
    tasks are out of its reach.
    """

    algebra: ClassVar[AbstractAlgebra | None] = ClampAlgebra()

    weight_r: Float[Array, "hidden_size input_size"]
    weight_s: Float[Array, "hidden_size input_size"]
    weight_g: Float[Array, "hidden_size input_size"]
    weight_o: Float[Array, "output_size hidden_size"]
    bias_r: Float[Array, " hidden_size"]
    bias_s: Float[Array, " hidden_size"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: the numbers of features of inputs and states.
        - `output_size`: the number of features of outputs; `None` is `hidden_size`.
        - `dtype`: of the parameters; the state has at least float32.
        - `key`: for the parameters: $W_s, W_g$ uniform in $\pm 1/\sqrt{\text{input\_size}}$, $W_o$
            in $\pm 1/\sqrt{\text{hidden\_size}}$, $W_r$ in a tenth of the range of $W_s$, $b_s$ in
            $(0, 1)$, and $b_r = 1$. With $s < 0 < r$ throughout, a state that starts at 0 would
            stay there, and with $s > r$ it would forget at every step; in both cases nothing
            learns. This way every unit writes, and most keep what they hold.
        """
        output_size = hidden_size if output_size is None else output_size
        check_sizes(input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        key_r, key_s, key_g, key_o, key_b = jax.random.split(key, 5)
        limit = input_size**-0.5 / 10
        self.weight_r = uniform(key_r, (hidden_size, input_size), limit, dtype)
        self.weight_s = init_linear(key_s, hidden_size, input_size, dtype)
        self.weight_g = init_linear(key_g, hidden_size, input_size, dtype)
        self.weight_o = init_linear(key_o, output_size, hidden_size, dtype)
        self.bias_r = jnp.ones(hidden_size, self.weight_r.dtype)
        self.bias_s = jnp.abs(uniform(key_b, (hidden_size,), 1.0, dtype))
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Vector:
        return zero_state(self.hidden_size, self.weight_s)

    def project(self, xs: Float[Array, "L input_size"]) -> list[Vectors]:
        """The bounds $r$ and $s$ and the output gate $σ(W_g x)$."""
        check_inputs(xs, self.input_size)
        r = affine(self.weight_r, self.bias_r, xs)
        s = affine(self.weight_s, self.bias_s, xs)
        # The bounds become the states, hence their dtype.
        return [at_least_float32(r), at_least_float32(s), jax.nn.sigmoid(xs @ self.weight_g.T)]

    def step(self, state: Vector, u: list[Vector]) -> Vector:
        r, s, _ = u
        return _max(s, _min(r, state))

    def readout(self, states: Vectors, us: list[Vectors]) -> Float[Array, "L output_size"]:
        _, _, gate = us
        return (states * at_least_float32(gate)) @ at_least_float32(self.weight_o).T
