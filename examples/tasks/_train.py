"""Training a sequence model on a task, from short sequences to longer ones."""

import dataclasses
import functools
import pathlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .._harness import Metrics, State, fit
from .._model import SOLVERS, SequenceModel
from . import TASKS
from ._task import Batch, Task

_BLOCK = 20  # steps of training in one compiled call


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run depends on.

    - `task`, `cell`, `solver`: keys of `TASKS`, `CELLS` and `SOLVERS`.
    - `width`, `depth`, `conv`, `mlp`: as for `SequenceModel`.
    - `lengths`: of the sequences; training goes on to the next when the fraction `threshold` of the
        answers of ten steps is right.
    - `shares`: whether training also goes on when a length has had its equal share of the steps.
    - `stop`: the same for the last length; training ends there. Above 1: it never does.
    - `batch`: sequences in a step at the last length; in all of `lengths`, a step has about as many
        tokens.
    - `steps`, `lr`: steps, and the learning rate of Adam after the warm-up, from which it falls to
        zero along a cosine.
    - `seed`: of weights and sequences.
    """

    task: str
    cell: str = "gru"
    solver: str = "auto"
    width: int = 64
    depth: int = 1
    conv: int = 0
    mlp: bool = False
    lengths: tuple[int, ...] = (64,)
    batch: int = 64
    steps: int = 1000
    lr: float = 3e-3
    threshold: float = 0.95
    shares: bool = False
    stop: float = 2.0
    seed: int = 0


def make_model(options: Options, key: PRNGKeyArray) -> SequenceModel:
    task = TASKS[options.task]
    return SequenceModel(
        task.inputs,
        task.outputs,
        tokens=task.tokens,
        cell=options.cell,
        width=options.width,
        depth=options.depth,
        conv=options.conv,
        mlp=options.mlp,
        solver=SOLVERS[options.solver],
        key=key,
    )


def score(model: SequenceModel, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(loss, accuracy)`: the mean cross-entropy of the answers in nats, the fraction right."""
    logits = jax.vmap(model)(batch.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    right = jnp.argmax(logits, -1) == batch.targets
    weight = batch.mask.astype(losses.dtype)
    total = jnp.maximum(jnp.sum(weight), 1)
    accuracy = jnp.sum(jnp.where(right, weight, 0)) / total
    return jnp.sum(weight * losses) / total, accuracy


def make_optimiser(options: Options) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.lr, warmup_steps=min(50, options.steps // 10), decay_steps=options.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


@eqx.filter_jit
def _train_steps(model, moments, key, *, options: Options, length: int, number: int):
    """`number` steps; the mean loss and accuracy of the last ten."""
    task, optimiser = TASKS[options.task], make_optimiser(options)
    sequences = max(1, options.batch * options.lengths[-1] // length)
    weights, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(weights, batch):
        return score(eqx.combine(weights, rest), batch)

    def step(carry, key):
        weights, moments = carry
        batch = task(key, sequences, length)
        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, batch)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, moments = optimiser.update(grads, moments, weights)
        return (eqx.apply_updates(weights, updates), moments), (loss, accuracy)

    carry, (losses, accuracies) = jax.lax.scan(
        step, (weights, moments), jax.random.split(key, number)
    )
    weights, moments = carry
    return eqx.combine(weights, rest), moments, jnp.mean(losses[-10:]), jnp.mean(accuracies[-10:])


def start(options: Options) -> State:
    """The state before the first step."""
    key_model, key = jax.random.split(jax.random.key(options.seed))
    model = make_model(options, key_model)
    moments = make_optimiser(options).init(eqx.filter(model, eqx.is_inexact_array))
    return State(model, moments, key)


def advance(state: State, options: Options) -> tuple[State, Metrics]:
    """A few steps of training, and a longer sequence after them if these went well."""
    key, subkey = jax.random.split(state.key)
    number = min(_BLOCK, options.steps - state.step)
    length = options.lengths[state.stage]
    last = state.stage + 1 == len(options.lengths)
    model, moments, loss, accuracy = _train_steps(
        state.model,
        state.moments,
        subkey,
        options=dataclasses.replace(options, seed=0),  # compiled once for all seeds
        length=length,
        number=number,
    )
    metrics = {"loss": float(loss), "accuracy": float(accuracy), "length": length}
    step = state.step + number
    ready = metrics["accuracy"] >= (options.stop if last else options.threshold)
    if options.shares and not last:
        ready |= step * len(options.lengths) >= (state.stage + 1) * options.steps
    return State(model, moments, key, step, state.stage + ready), metrics


def train(
    options: Options, folder: pathlib.Path, *, resume: bool = False, quiet: bool = False
) -> State:
    """Trains, or goes on training, with the files of `fit` in `folder`."""
    return fit(
        start(options),
        functools.partial(advance, options=options),
        steps=options.steps,
        done=lambda state: state.stage == len(options.lengths),
        folder=folder,
        options=dataclasses.asdict(options),
        resume=resume,
        description=f"{options.task}, {options.cell}, seed {options.seed}",
        quiet=quiet,
    )


def evaluate(
    model: SequenceModel, task: Task, length: int, *, batch: int = 64, seed: int = 1_000_000
) -> float:
    """The fraction of right answers on held-out data, or on sequences drawn with another seed."""
    if task.held_out is not None:
        return float(_accuracy(model, task.held_out()))
    return float(_fresh_accuracy(model, jax.random.key(seed), task, batch, length))


@eqx.filter_jit
def _accuracy(model: SequenceModel, batch: Batch) -> Any:
    return score(model, batch)[1]


@eqx.filter_jit
def _fresh_accuracy(model, key, task, batch, length):
    return score(model, task(key, batch, length))[1]
