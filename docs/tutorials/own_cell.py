# %% [markdown]
# # A cell of your own, from the idea to the benchmark
#
# The idea: units that *tire*. Each leaks, saturates, and is held back by a tiredness that grows
# while the unit is active and fades afterwards, as in models of spiking neurons. We know
# of no kernel for this cell, and of no paper that says whether it can be run in parallel. We ask,
# step by step.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import pararnn as prnn

# %% [markdown]
# ## 1. A step
#
# A pure function of a state and an input. The state is a pair: activity `v` and tiredness `a`.


# %%
def step(state, x):
    v, a = state
    return 0.8 * jnp.tanh(v) + x - a, 0.95 * a + 0.1 * jax.nn.sigmoid(4 * (v - 1))


xs = 0.8 * jax.random.normal(jax.random.key(0), (1000, 6))
zero = (jnp.zeros(6), jnp.zeros(6))
solution = prnn.solve(step, xs, zero, solver=prnn.Newton())
print(solution)

# %% [markdown]
# ## 2. What does its Jacobian look like?
#
# A unit acts on itself and on its own tiredness, and on no other: blocks of two. So a sweep of
# Newton's method pushes two tangents, however many units there are.

# %%
print(prnn.detect_structure(step, zero, xs[0]))

# %% [markdown]
# ## 3. Does it forget? Is it right?
#
# `lyapunov` says how fast, `verify` compares values and gradients with the sequential run.

# %%
print(prnn.lyapunov(step, xs, zero))
print(prnn.verify(step, xs, zero, solver=prnn.Newton()))

# %% [markdown]
# ## 4. A cell
#
# Now with parameters. What does not depend on the state, the product with the inputs, goes into
# `project`, which sees all steps at once. What others need is the activity alone: `readout`. Time
# constants are kept between 0 and 1 by a sigmoid.


# %%
class Tiring(prnn.AbstractCell):
    weight: jax.Array  # (units, inputs)
    leak: jax.Array  # (units,)
    fade: jax.Array  # (units,)
    gain: jax.Array  # (units,)

    def __init__(self, inputs, units, *, key):
        self.weight = jax.random.normal(key, (units, inputs)) / inputs**0.5
        self.leak = jnp.linspace(0.0, 3.0, units)
        self.fade = jnp.linspace(1.0, 4.0, units)
        self.gain = jnp.full(units, 0.1)

    def init_state(self):
        return jnp.zeros_like(self.leak), jnp.zeros_like(self.leak)

    def project(self, xs):
        return xs @ self.weight.T

    def step(self, state, u):
        v, a = state
        tired = jax.nn.sigmoid(self.fade) * a + self.gain * jax.nn.sigmoid(4 * (v - 1))
        return jax.nn.sigmoid(self.leak) * jnp.tanh(v) + u - a, tired

    def readout(self, states, us):
        return states[0]


cell = Tiring(6, 16, key=jax.random.key(1))
print(prnn.verify(cell, xs, solver=prnn.Newton()))

# %% [markdown]
# `verify` has looked at more now: whether `project` and `readout` treat each step by itself, so
# that streaming gives the same numbers. One test that it cannot make is whether the formulas are
# those that we had in mind. Write them once more, plainly:

# %%
w, leak, fade, gain = (np.asarray(p) for p in (cell.weight, cell.leak, cell.fade, cell.gain))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


v, a, expected = np.zeros(16), np.zeros(16), []
for x in np.asarray(xs):
    v, a = (
        sigmoid(leak) * np.tanh(v) + w @ x - a,
        sigmoid(fade) * a + gain * sigmoid(4 * (v - 1)),
    )
    expected.append(v)
ys, final = prnn.RNN(cell)(xs)
print(f"largest difference {np.max(np.abs(ys - np.stack(expected))):.1e}")

# %% [markdown]
# ## 5. Training
#
# A task that needs a memory: the mean of the first feature over the last 16 steps. The layer is an
# Equinox module, so everything around it is as usual.

# %%
window = jnp.convolve(xs[:, 0], jnp.ones(16) / 16)[:1000]


def loss(model):
    rnn, readout = model
    ys, _ = rnn(xs)
    return jnp.mean((jax.vmap(readout)(ys)[:, 0] - window) ** 2)


model = prnn.RNN(cell), eqx.nn.Linear(16, 1, key=jax.random.key(2))
optimiser = optax.adam(2e-2)
moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def update(model, moments):
    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, moments = optimiser.update(grads, moments)
    return eqx.apply_updates(model, updates), moments, value


losses = []
for _ in range(150):
    model, moments, value = update(model, moments)
    losses.append(float(value))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; variance {jnp.var(window):.4f}")
plt.figure(figsize=(5, 2.5))
plt.semilogy(losses)
plt.xlabel("training step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# Does the trained cell still forget? Training may have changed that, so ask again.

# %%
trained = model[0]
print(prnn.lyapunov(trained, xs))
for solver in (prnn.Newton(), prnn.Newton(chunk_size=32), prnn.Jacobi(chunk_size=64)):
    stats = prnn.RNN(trained.cell, solver=solver).solve(xs).stats
    print(type(solver).__name__, solver.chunk_size, stats)

# %% [markdown]
# ## 6. The benchmark
#
# Times, memory and errors on this machine, against the plain scan. On a CPU expect the scan to win
# the forward pass, and the default to win forward and gradient; a GPU is another matter, and so is
# your machine.

# %%
candidates = [prnn.Sequential(), prnn.Newton(), prnn.Jacobi(chunk_size=128)]
print(prnn.benchmark(trained, xs, solvers=candidates, progress=False))

# %% [markdown]
# ## What next
#
# A `tests/test_tiring.py` with the NumPy formulas above; `python -m examples.tasks` with a cell of
# your own; if a structure is always the same, declare it, and `verify` checks that it holds. The
# cells of the package are written in the same way, one file each.
