"""Write your own cell: detection, verification, training; and what to do when it does not forget.

Run `python -m examples.custom_cell`. The first cell below is contractive, the second tracks a
state: it remembers in which of two basins it is, which defeats ordinary parallel methods.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import pararnn as prnn


class Resonator(prnn.AbstractCell):
    """Pairs of units that rotate by a learned angle and saturate: 2×2 blocks in the Jacobian."""

    angle: Float[Array, " pairs"]
    weight: Float[Array, "inputs 2 pairs"]

    def __init__(self, inputs, pairs, *, key):
        self.angle = jnp.linspace(0.05, 1.0, pairs)
        self.weight = jax.random.normal(key, (inputs, 2, pairs)) / inputs**0.5

    def init_state(self):
        return jnp.zeros((2, self.angle.shape[0]), self.angle.dtype)

    def project(self, xs):
        return jnp.einsum("li,ipq->lpq", xs, self.weight)

    def step(self, state, u):
        x, y = state
        c, s = jnp.cos(self.angle), jnp.sin(self.angle)
        return 0.95 * jnp.tanh(jnp.stack([c * x - s * y, s * x + c * y]) + u)


def latch(state, x):
    """Keeps the sign of its state until an input flips it; it never forgets which sign."""
    return jnp.tanh(3 * state * x)


def train(rnn: prnn.RNN, xs: Array, targets: Array, steps: int) -> tuple[float, float]:
    """Fits a moving average of the inputs; returns the loss before and after."""
    readout = eqx.nn.Linear(2 * rnn.cell.angle.shape[0], 1, key=jax.random.key(2))  # pyright: ignore[reportAttributeAccessIssue]

    def loss(model):
        rnn, readout = model
        states, _ = rnn(xs)
        return jnp.mean((jax.vmap(readout)(states.reshape(xs.shape[0], -1)) - targets) ** 2)

    optimiser = optax.adam(1e-2)
    model = (rnn, readout)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(model, opt_state):
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimiser.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    values = []
    for _ in range(steps):
        model, opt_state, value = update(model, opt_state)
        values.append(float(value))
    return values[0], values[-1]


def never_forgets(length: int) -> None:
    """Solves a latch, which corrections cannot carry across its basins, in two ways."""
    print("\nA cell that never forgets")
    signs = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (length,)), 1.0, -1.0)
    print(f"  {prnn.lyapunov(latch, signs, jnp.ones(()))}")
    for solver in (prnn.Newton(), prnn.Speculative(chunk_size=16, num_candidates=4)):
        solution = prnn.solve(latch, signs, jnp.ones(()), solver=solver)
        stats = solution.stats
        print(
            f"  {type(solver).__name__}: {int(stats.iterations)} iterations, "
            f"{int(stats.sequential_steps)} steps on the critical path instead of {length}, "
            f"finished sequentially: {bool(stats.fallback)}"
        )
    print(
        "  Both are right. `fallback` tells that Newton had to finish sequentially; Speculative\n"
        "  runs every chunk from one candidate per basin and looks up afterwards which was true."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.custom_cell", description=__doc__)
    parser.add_argument("--length", type=int, default=2000, help="time steps (default 2000)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    args = parser.parse_args(argv)

    print("A contractive cell")
    cell = Resonator(3, 8, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (args.length, 3))
    us, init = cell.project(xs), cell.init_state()
    structure = prnn.detect_structure(cell.step, init, us[0])
    kind, tangents = type(structure).__name__, structure.num_seeds(16)
    print(f"  structure found: {kind}, {tangents} tangents per sweep")
    print(f"  {prnn.lyapunov(cell, xs)}")
    print(f"  Newton {prnn.verify(cell, xs, solver=prnn.Newton())}")
    targets = jnp.tanh(jnp.cumsum(xs[:, :1]) - jnp.roll(jnp.cumsum(xs[:, :1]), 8))[:, None]
    before, after = train(prnn.RNN(cell, solver=prnn.Newton()), xs, targets, args.steps)
    print(f"  training in parallel: loss {before:.3f} -> {after:.3f}")

    never_forgets(args.length)


if __name__ == "__main__":
    main()
