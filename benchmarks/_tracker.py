"""Small GRUs that are trained to solve word problems of finite groups.

A word is a sequence of generators of a group; the task is to name, after every letter, the product
of the letters so far. A network that solves it tracks a state that it may never forget, so its
recurrence contracts only inside the basin of the current state.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import pararnn as prnn
from examples.tasks import Group, make_group, word_problem

HIDDEN_SIZES = {"Z2": 64, "S3": 64, "A5": 128}
LENGTHS, BATCH = (4, 16), 128
RATE = 3e-3  # of Adam
# Standard deviation of the noise that is added to each state in training: it makes the contraction
# inside the basins stronger.
NOISE = 0.3
FINAL_STEPS, MAX_STEPS, ATTEMPTS = 600, 6000, 3
_BLOCK = 50  # training steps per compiled call
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


class Tracker(eqx.Module):
    """A GRU over one-hot letters with a linear readout of the group's elements."""

    cell: prnn.GRU
    readout: eqx.nn.Linear

    def __init__(self, group: Group, hidden_size: int, *, key: PRNGKeyArray):
        key_cell, key_readout = jax.random.split(key)
        self.cell = prnn.GRU(len(group.generators), hidden_size, key=key_cell)
        self.readout = eqx.nn.Linear(hidden_size, len(group.elements), key=key_readout)

    def inputs(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape generators"]:
        """The letters as the cell reads them."""
        return jax.nn.one_hot(tokens, self.cell.input_size)

    def logits(self, states: Float[Array, "L batch size"]) -> Float[Array, "L batch elements"]:
        """The readout of states."""
        return jax.vmap(jax.vmap(self.readout))(states)

    def states(
        self,
        tokens: Int[Array, "batch L"],
        start: Float[Array, "batch size"],
        noise: Float[Array, "L batch size"],
    ) -> Float[Array, "L batch size"]:
        """All states of all words from `start`, with `noise` added after each step."""
        us = jax.vmap(self.cell.project)(self.inputs(tokens.T))

        def step(state, inputs):
            u, e = inputs
            state = jax.vmap(self.cell.step)(state, u) + e
            return state, state

        return jax.lax.scan(step, start, (us, noise))[1]


def _initial(tracker: Tracker, batch: int) -> Float[Array, "batch size"]:
    return jnp.tile(tracker.cell.init_state(), (batch, 1))


@eqx.filter_jit
def accuracy(tracker: Tracker, group: str, length: int, batch: int, key: PRNGKeyArray):
    """The fraction of letters of random words that are labelled correctly."""
    tokens, labels = word_problem(group, length, batch, key)
    start = _initial(tracker, batch)
    states = tracker.states(tokens, start, jnp.zeros((length, *start.shape)))
    return jnp.mean(jnp.argmax(tracker.logits(states), -1) == labels.T)


@eqx.filter_jit
def _train_steps(tracker, moments, key, rates, group, length):
    """One training step for each of `rates`, then the mean accuracy of the last ten.

    A word whose last answer is right continues in the next step, without a gradient through the
    joint, so that the late states of long words are trained at the cost of short ones. The others,
    and always an eighth of the batch, start anew.
    """

    def loss_fn(tracker, state, product, key):
        key_word, key_noise = jax.random.split(key)
        tokens, labels = word_problem(group, length, BATCH, key_word, product)
        noise = NOISE * jax.random.normal(key_noise, (length, *state.shape))
        states = tracker.states(tokens, state, noise)
        logits = tracker.logits(states)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels.T)
        correct = jnp.argmax(logits, -1) == labels.T
        return jnp.mean(losses), (correct, states[-1], labels[:, -1])

    def step(carry, inputs):
        tracker, moments, fresh, state, product = carry
        key, rate = inputs
        state = jnp.where(fresh[:, None], tracker.cell.init_state(), state)
        product = jnp.where(fresh, 0, product)
        grads, (correct, state, product) = eqx.filter_grad(loss_fn, has_aux=True)(
            tracker, state, product, key
        )
        updates, moments = _OPTIMIZER.update(grads, moments)
        updates = jax.tree.map(lambda x: -rate * x, updates)
        tracker = eqx.apply_updates(tracker, updates)
        fresh = ~correct[-1] | (jnp.arange(BATCH) < BATCH // 8)
        return (tracker, moments, fresh, state, product), jnp.mean(correct)

    carry = tracker, moments, jnp.ones(BATCH, bool), _initial(tracker, BATCH)
    carry = *carry, jnp.zeros(BATCH, jnp.int32)
    keys = jax.random.split(key, len(rates))
    (tracker, moments, *_), correct = jax.lax.scan(step, carry, (keys, rates))
    return tracker, moments, jnp.mean(correct[-10:])


def _attempt(group: str, key: PRNGKeyArray) -> tuple[Tracker, float]:
    """A tracker, and its accuracy at length 512; 0 if it did not learn all of `LENGTHS`."""
    key, key_init, key_check = jax.random.split(key, 3)
    tracker = Tracker(make_group(group), HIDDEN_SIZES[group], key=key_init)
    moments = _OPTIMIZER.init(eqx.filter(tracker, eqx.is_array))

    def run(rates, length):
        nonlocal tracker, moments, key
        key, subkey = jax.random.split(key)
        tracker, moments, correct = _train_steps(tracker, moments, subkey, rates, group, length)
        return correct

    steps = 0
    for length in LENGTHS:
        while run(np.full(_BLOCK, RATE, np.float32), length) < 0.95:
            steps += _BLOCK
            if steps >= MAX_STEPS:
                return tracker, 0.0
    angles = np.linspace(0, np.pi, FINAL_STEPS, endpoint=False)
    rates = (RATE * (1 + np.cos(angles)) / 2).astype(np.float32)
    for some in np.split(rates, FINAL_STEPS // _BLOCK):
        run(some, LENGTHS[-1])
    return tracker, float(accuracy(tracker, group, 512, 256, key_check))


def train(group: str) -> Tracker:
    """Trains a tracker until it answers every letter of 256 random words of length 512 correctly.

    Words grow through `LENGTHS`, each until 95 % of the answers are right; then the learning rate
    falls to zero along a cosine. Gradients reach back to the start of a piece of `length` letters.
    Raises RuntimeError if no seed succeeds.
    """
    for seed in range(ATTEMPTS):
        tracker, correct = _attempt(group, jax.random.key(seed))
        if correct == 1:
            return tracker
    raise RuntimeError(f"No tracker of {group} answers perfectly; tried {ATTEMPTS} seeds.")
