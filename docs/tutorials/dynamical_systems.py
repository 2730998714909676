# %% [markdown]
# # Dynamical systems: a chaotic one, learned
#
# A piecewise-linear network learns the Lorenz system from a trajectory of it. On the way: *teacher
# forcing*, without which chaos makes gradients explode; the *Lyapunov exponent*, of the system and
# of the network; and where parallel methods stop, and why.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import pararnn as prnn

# %% [markdown]
# ## The system
#
# Lorenz's equations of 1963, by Runge and Kutta's fourth-order method, 0.02 time units per step.
# This is a recurrence like any other, without inputs: its `xs` are only there to be counted.

# %%
DT = 0.02


def lorenz(state, _):
    def slope(state):
        x, y, z = state
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    a = slope(state)
    b = slope(state + DT / 2 * a)
    c = slope(state + DT / 2 * b)
    d = slope(state + DT * c)
    return state + DT / 6 * (a + 2 * b + 2 * c + d)


first = jnp.array([1.0, 1.0, 20.0])
states = prnn.solve(lorenz, jnp.arange(12_000), first, solver=prnn.Sequential()).states[2000:]
print(prnn.lyapunov(lorenz, jnp.arange(10_000), states[0]))

# %% [markdown]
# The exponent is per step; per time unit it is about 0.9, as the literature has it. Two runs that
# differ by rounding differ by everything after some 20 time units: a state cannot be predicted for
# longer than that, and no method finds it in parallel. That is not a matter of the method. Whatever
# corrects all steps at once works by linear predictions, which would have to hold over the whole
# sequence, and here a linear prediction is off by a factor of e after 55 steps.

# %%
exponent = prnn.lyapunov(lorenz, jnp.arange(10_000), states[0]).exponent / DT
print(f"{exponent:.2f} per time unit")
scale = jnp.std(states, axis=0)
data = (states - jnp.mean(states, axis=0)) / scale

# %% [markdown]
# ## A network, forced by the data
#
# The network's first three units are the observed quantities; the others are free. If it ran by
# itself through a training sequence, its error would grow as fast as the system's own, and its
# gradient with it. So at every `interval`-th step the observed units are set to the data: *sparse
# teacher forcing* (Mikhaeil et al., *On the difficulty of learning chaotic dynamics with RNNs*,
# NeurIPS 2022). In this package, that is a step with an input: the value, and whether it counts.


# %%
class Forced(prnn.AbstractCell):
    cell: prnn.PiecewiseLinearRNN

    def __init__(self, size, *, key):
        self.cell = prnn.PiecewiseLinearRNN(1, size, key=key)

    def init_state(self):
        return self.cell.init_state()

    def project(self, xs):
        return xs

    def step(self, state, u):
        value, forced = u
        state = jnp.where(forced, state.at[:3].set(value), state)
        return self.cell.step(state, self.cell.bias)


def inputs(window, interval):
    """All steps but the last; what they should end in are all but the first."""
    return window[:-1], jnp.arange(len(window) - 1) % interval == 0


model = Forced(60, key=jax.random.key(0))
window = data[:2001]
for interval in (1, 10, 30, 100, 2000):
    found = prnn.lyapunov(model, inputs(window, interval))
    print(f"forced every {interval:4} steps: exponent {found.exponent:+.3f}")

# %% [markdown]
# ## Training
#
# Sequences of 100 steps, forced at every fifth: a tenth of the time in which an error grows by a
# factor of e, and long enough to see where it leads. Nothing in it is special to this package but
# the first line of `one`.

# %%
LENGTH, BATCH, INTERVAL, STEPS = 100, 16, 5, 4000


def loss(model, windows):
    def one(window):
        predicted, _ = prnn.RNN(model)(inputs(window, INTERVAL))
        return jnp.mean((predicted[:, :3] - window[1:]) ** 2)

    return jnp.mean(jax.vmap(one)(windows))


optimiser = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)),
)


@eqx.filter_jit
def update(model, moments, key):
    begins = jax.random.randint(key, (BATCH,), 0, len(data) - LENGTH - 1)
    windows = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(data, i, LENGTH + 1))(begins)
    value, grads = eqx.filter_value_and_grad(loss)(model, windows)
    updates, moments = optimiser.update(grads, moments)
    return eqx.apply_updates(model, updates), moments, value


moments, losses = optimiser.init(eqx.filter(model, eqx.is_inexact_array)), []
for key in jax.random.split(jax.random.key(1), STEPS):
    model, moments, value = update(model, moments, key)
    losses.append(float(value))
print(f"loss {losses[0]:.3f} -> {sum(losses[-50:]) / 50:.5f}")

# %% [markdown]
# ## What it has learned
#
# Let it run by itself: forced for a while, and then never again.

# %%
free = 4000
forced = jnp.arange(free) < 100
values = data[:free]
ys, _ = prnn.RNN(model, solver=prnn.Sequential())((values, forced))

figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(xlabel="training step", ylabel="loss")
for axis, curve, title in ((axes[1], data[:free], "Lorenz"), (axes[2], ys[100:], "the network")):
    axis.plot(curve[:, 0], curve[:, 2], lw=0.4)
    axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3))
plt.show()

# %%
never = jnp.zeros((free, 3)), jnp.zeros(free, bool)
learned = prnn.lyapunov(model, never, ys[-1]).exponent / DT
print(f"exponent per time unit: {exponent:.2f} of the system, {learned:.2f} of the network")

# %% [markdown]
# A shape that looks alike is a weak test; an exponent that agrees is a stronger one. It depends on
# luck, too: with other lengths, intervals and sizes we found exponents between 0.5 and 1.1, and
# with forcing at every 15th step and fewer training steps a network that was not chaotic at all.

# %% [markdown]
# ## Where parallel methods stop
#
# With forcing, the trained network forgets what was before the last few values, and Newton's method
# needs few iterations. The rarer the forcing, the more; by itself it is chaotic, and what is called
# an iteration makes one chunk right after another.

# %%
print("forced every | exponent | iterations | steps one after another, of 2000")
for interval in (5, 15, 30, 60, 120, 2000):
    us = inputs(window, interval)
    stats = prnn.RNN(model, solver=prnn.Newton(chunk_size=20)).solve(us).stats
    found, path = prnn.lyapunov(model, us).exponent, min(int(stats.sequential_steps), 2000)
    print(f"{interval:12} | {found:+8.3f} | {stats.iterations:10} | {path:5}")

# %% [markdown]
# Training needs forcing for the sake of its gradients anyway, and what is forced often enough can
# be solved in parallel: the condition is the same, that differences do not grow. What a chaotic
# system does by itself, to look at or to measure its exponent, is one step after another:
# `Sequential`.
