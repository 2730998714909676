# %% [markdown]
# # A character model
#
# A small language model of characters, with a nonlinear recurrence in each block. The text is the
# documentation that ships with Python. `make demo` runs a larger one, with options, checkpoints and
# a progress bar.

# %%
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import pararnn as prnn

text = "\n\n".join(topics[name].strip() for name in sorted(topics))
vocabulary = sorted(set(text))
tokens = np.asarray([vocabulary.index(c) for c in text[:200_000]], np.int32)
train, held_out = tokens[:180_000], tokens[180_000:]
print(len(tokens), "characters,", len(vocabulary), "distinct")

# %% [markdown]
# ## The model
#
# An embedding; blocks of norm, recurrence, norm and a gated perceptron, each added to what came in;
# a readout. It is written for one sequence: `jax.vmap` makes batches.


# %%
class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    stack: prnn.Stack
    head: eqx.nn.Linear

    def __init__(self, size, width, *, key):
        keys = jax.random.split(key, 6)
        self.embedding = eqx.nn.Embedding(size, width, key=keys[0])
        blocks = []
        for cell_key, block_key in (keys[1:3], keys[3:5]):
            cell = prnn.DiagonalGRU(width, width, key=cell_key)
            blocks.append(prnn.ResidualBlock(width, prnn.RNN(cell), key=block_key))
        self.stack = prnn.Stack(blocks)
        self.head = eqx.nn.Linear(width, size, key=keys[5])

    def __call__(self, tokens, state=None):
        xs, state = self.stack(jax.vmap(self.embedding)(tokens), state)
        return jax.vmap(self.head)(xs), state

    def step(self, state, token):
        x, state = self.stack.step(state, self.embedding(token))
        return self.head(x), state


model = Model(len(vocabulary), 64, key=jax.random.key(0))
count = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
print(f"{count:,} parameters")

# %% [markdown]
# ## Is it what we think?
#
# Before training, three questions. What would run here, and on a GPU? Does the parallel call give
# the numbers of streaming? Does a block's recurrence agree with the sequential run, under Newton's
# method?

# %%
rnn = model.stack.layers[0].rnn
features = jax.random.normal(jax.random.key(1), (256, 64))
for platform in ("cpu", "gpu"):
    print(platform, "-", type(prnn.select_solver(rnn, features, platform=platform)[0]).__name__)
print(prnn.verify(rnn, features, solver=prnn.Newton()))

logits, _ = eqx.filter_jit(model)(held_out[:20])
step, state, streamed = eqx.filter_jit(model.step), None, []
for token in held_out[:20]:
    y, state = step(state, token)
    streamed.append(y)
print("streaming differs by", f"{jnp.max(jnp.abs(logits - jnp.stack(streamed))):.0e}")

# %% [markdown]
# ## Training
#
# Windows of 129 characters from random places: 128 predictions each. Nothing here is special to
# this package.

# %%
BATCH, LENGTH, STEPS = 16, 128, 250


def loss(model, windows):
    logits, _ = jax.vmap(model)(windows[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]))


optimiser = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 20, STEPS))


@eqx.filter_jit
def update(model, moments, windows):
    value, grads = eqx.filter_value_and_grad(loss)(model, windows)
    updates, moments = optimiser.update(grads, moments, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), moments, value


rng = np.random.default_rng(0)
moments, losses = optimiser.init(eqx.filter(model, eqx.is_array)), []
for _ in range(STEPS):
    begins = rng.integers(0, len(train) - LENGTH, BATCH)
    windows = jnp.asarray(np.stack([train[i : i + LENGTH + 1] for i in begins]))
    model, moments, value = update(model, moments, windows)
    losses.append(float(value) / np.log(2))

held = jnp.asarray(held_out[: 128 * 129].reshape(-1, 129))
print(f"bits per character: {losses[0]:.2f} -> {np.mean(losses[-20:]):.2f} in training")
print(f"{eqx.filter_jit(loss)(model, held) / np.log(2):.2f} on text that it has not seen")
plt.figure(figsize=(5, 2.5))
plt.plot(losses)
plt.xlabel("training step")
plt.ylabel("bits per character")
plt.show()

# %% [markdown]
# ## Writing
#
# One character at a time, by `step`: the state carries all that was read.


# %%
@eqx.filter_jit
def write(model, prompt, key, length=400):
    logits, state = model(prompt)

    def body(carry, key):
        logits, state = carry
        token = jax.random.categorical(key, logits / 0.7)
        return model.step(state, token), token

    return jax.lax.scan(body, (logits[-1], state), jax.random.split(key, length))[1]


prompt = "The statement "
start = jnp.asarray([vocabulary.index(c) for c in prompt])
written = write(model, start, jax.random.key(2))
print(prompt + "".join(vocabulary[i] for i in written))

# %% [markdown]
# ## Another solver, the same weights
#
# What the recurrences are solved by changes no number beyond rounding.

# %%
newton = eqx.tree_at(
    lambda m: [block.rnn for block in m.stack.layers],
    model,
    [prnn.RNN(block.rnn.cell, solver=prnn.Newton()) for block in model.stack.layers],
)
a, b = (eqx.filter_jit(m)(held_out[:500])[0] for m in (model, newton))
print(f"largest difference of logits: {jnp.max(jnp.abs(a - b)):.0e}")
for block in newton.stack.layers:
    features = jax.random.normal(jax.random.key(3), (500, 64))
    print(block.rnn.solve(features).stats)
