"""Train a character-level language model on the text of Python's own documentation.

    python -m examples.char_lm --help

First the program checks, on the very model to be trained and on real text, that solving its
recurrences in parallel gives the values and the gradients of running them step by step. Then it
trains, measures bits per character on held-out text, continues that text one character at a time,
and saves the model, the loss curve and the numbers.
"""

import argparse
import json
import math
import pathlib
import textwrap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.figure import Figure

import pararnn as prnn

from ._agreement import report
from ._cells import CELLS
from ._language_model import (
    LanguageModel,
    bits_per_character,
    load,
    make_optimiser,
    predict,
    save,
    update,
    with_solver,
)
from ._options import add_language_model, number, parse_language_model
from ._progress import progress_bar
from ._text import Text, Tokens, Windows, all_windows, load_text, random_windows

SOLVERS = {
    "auto": None,
    "sequential": prnn.Sequential,
    "newton": prnn.Newton,
    "jacobi": prnn.Jacobi,
}


# --- options --------------------------------------------------------------------------------------


def parse_options(args: Sequence[str] | None, max_length: int) -> argparse.Namespace:
    """Reads the command line; ends the program with a message if something is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.char_lm",
        description="Train a character-level language model on Python's own documentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, maybe_zero, positive = number(int, 1), number(int, 0), number(float, 0)

    def add(flag: str, default: Any, description: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=default, help=description, **kwargs)

    add("--cell", "diagonal-gru", "the recurrence", choices=list(CELLS))
    add("--solver", "auto", "how it is evaluated in training", choices=list(SOLVERS))
    add("--chunk-size", None, "for newton, jacobi; None: they choose", type=count, metavar="STEPS")
    add_language_model(parser, "out/char_lm")
    add("--temperature", 0.7, "divides the logits of the sample", type=positive, metavar="T")
    add("--sample", 400, "length of the sample", type=maybe_zero, metavar="CHARACTERS")
    options = parse_language_model(parser, args, max_length)
    if options.chunk_size is not None and options.solver not in ("newton", "jacobi"):
        parser.error("argument --chunk-size: needs --solver newton or --solver jacobi")
    return options


def make_solver(name: str, chunk_size: int | None) -> prnn.AbstractSolver | None:
    """The solver of that name; `None` leaves the choice to the package."""
    solver = SOLVERS[name]
    if solver is None:
        return None
    return solver() if chunk_size is None else solver(chunk_size=chunk_size)


# --- training -------------------------------------------------------------------------------------


class History(NamedTuple):
    """Bits per character of every training step, and of the held-out text after some of them."""

    train: list[float]
    held_out: dict[int, float]
    characters_per_second: float


def loss_of(model: LanguageModel, windows: Windows) -> Float[Array, ""]:
    """Bits per character of the model on some windows."""
    return bits_per_character(predict(model, windows), windows)


def train(
    model: LanguageModel, text: Text, options: argparse.Namespace
) -> tuple[LanguageModel, History]:
    """Minimises the loss of random windows with AdamW."""
    optimiser = make_optimiser(options.lr, options.steps)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, state, windows):
        loss, gradients = eqx.filter_value_and_grad(loss_of)(model, windows)
        return *update(optimiser, model, state, gradients), loss

    rng = np.random.default_rng(options.seed)
    held_out_windows = all_windows(text.held_out, options.length)
    losses, held_out = [], {}
    seconds = speed = 0.0
    with progress_bar("training", options.steps, note="compiling") as progress:
        held_out[0] = evaluate(model, held_out_windows, options.batch)
        for i in range(1, options.steps + 1):
            windows = random_windows(text.train, options.batch, options.length, rng)
            start = time.perf_counter()
            model, state, loss = train_step(model, state, windows)
            losses.append(float(loss))  # waits for the result
            elapsed = time.perf_counter() - start
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"error: the loss is not finite at step {i}; try a smaller --lr.")
            # Forgets the first step, which compiles.
            seconds = elapsed if i <= 2 else seconds + elapsed
            speed = options.batch * options.length * max(1, i - 1) / seconds
            shown = f"{losses[-1]:.2f} bits/char, {speed:,.0f} chars/s"
            progress.set_postfix_str(shown, refresh=False)
            progress.update()
            if i % max(1, options.steps // 10) == 0 or i == options.steps:
                held_out[i] = evaluate(model, held_out_windows, options.batch)
    return model, History(losses, held_out, speed)


def evaluate(model: LanguageModel, windows: Windows, batch: int) -> float:
    """The loss of any number of windows, `batch` of them at a time."""
    return float(_evaluate(model, windows, batch))


@eqx.filter_jit
def _evaluate(model: LanguageModel, windows: Windows, batch: int):
    def one(window):
        return loss_of(model, jnp.expand_dims(window, 0))

    return jnp.mean(jax.lax.map(one, windows, batch_size=batch))


# --- sampling -------------------------------------------------------------------------------------


def sample(
    model: LanguageModel, prompt: Tokens, length: int, *, temperature: float, key: PRNGKeyArray
) -> list[int]:
    """Continues `prompt` by `length` characters. Each costs the same, however long the text is,
    because the state is all that the model remembers of it."""
    tokens, state = prompt.tolist(), None
    scale = jnp.asarray(temperature, jnp.float32)
    for i, step_key in enumerate(jax.random.split(key, len(prompt) + length - 1)):
        token = jnp.asarray(tokens[i], jnp.int32)
        token, state = _sample_step(model, token, state, scale, step_key)
        if i + 1 == len(tokens):
            tokens.append(int(token))
    return tokens[len(prompt) :]


@eqx.filter_jit
def _sample_step(
    model: LanguageModel,
    token: Int[Array, ""],
    state: PyTree[Array] | None,
    temperature: Float[Array, ""],
    key: PRNGKeyArray,
):
    logits, state = model.step(state, token)
    return jax.random.categorical(key, logits / temperature), state


# --- results --------------------------------------------------------------------------------------


def plot(path: pathlib.Path, history: History, characters_per_step: int) -> None:
    """Draws the loss curve, in colours that colour-blind readers can tell apart."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(history.train) + 1)
    axes.plot(steps, history.train, color="#56b4e9", linewidth=0.8, label="training batch")
    steps, held_out = list(history.held_out), list(history.held_out.values())
    axes.plot(steps, held_out, "o", color="#d55e00", label="held-out text")
    axes.set_xlabel(f"training step (of {characters_per_step:,} characters)")
    axes.set_ylabel("loss (bits per character)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def save_and_reload(
    path: pathlib.Path,
    model: LanguageModel,
    hyperparameters: dict[str, Any],
    solver: prnn.AbstractSolver | None,
    windows: Windows,
) -> None:
    """Saves the model, and checks that what the file holds gives identical outputs."""
    save(path, hyperparameters, model)
    loaded = with_solver(load(path)[0], solver)
    run = eqx.filter_jit(predict)
    if not np.array_equal(run(model, windows), run(loaded, windows)):
        raise SystemExit(f"error: the model loaded from {path} differs from the one saved.")


def describe_choice(model: LanguageModel, length: int) -> str:
    """Which solver `auto` stands for here, and why."""
    rnn, width = model.residual_blocks()[0].rnn, model.embedding.embedding_size
    us = rnn.cell.project(jnp.zeros((length, width), jnp.float32))
    solver, reason = prnn.select_solver(
        rnn.cell.step, us, rnn.cell.init_state(), structure=rnn.cell.structure
    )
    return textwrap.fill(f"auto is {type(solver).__name__} here. {reason}", 100)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    begin = time.perf_counter()
    text = load_text()
    options = parse_options(args, max_length=len(text.held_out) - 1)
    key_model, key_sample = jax.random.split(jax.random.key(options.seed))
    hyperparameters = {
        "cell": options.cell,
        "vocabulary": text.vocabulary,
        "width": options.width,
        "depth": options.depth,
    }
    solver = make_solver(options.solver, options.chunk_size)
    model = with_solver(LanguageModel(**hyperparameters, key=key_model), solver)
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    print(
        f"Text: {len(text.train):,} characters to train on, {len(text.held_out):,} held out, "
        f"{len(text.vocabulary)} distinct.\n"
        f"Model: {parameters:,} parameters; cell {options.cell}, width {options.width}, depth "
        f"{options.depth}.\n\n"
        "Compiling, to compare the solvers before training; this can take a minute ...",
        flush=True,
    )

    chosen = options.solver
    if options.chunk_size is not None:
        chosen += f", chunks of {options.chunk_size}"
    solvers = {"newton": prnn.Newton(), "jacobi": prnn.Jacobi(), chosen: solver}
    windows = all_windows(text.train, options.length)[: min(4, options.batch)]
    difference = f"Relative difference from the sequential run ({len(windows)} windows)"
    before = report(f"{difference} before training:", model, windows, solvers)
    if solver is None:
        print(describe_choice(model, options.length))
    print()

    model, history = train(model, text, options)
    untrained, trained = history.held_out[0], history.held_out[options.steps]
    print(
        f"Held-out text: {untrained:.2f} bits per character before training, {trained:.2f} after; "
        f"a uniform guess has {math.log2(len(text.vocabulary)):.2f}.\n"
    )
    plot(options.output / "loss.png", history, options.batch * options.length)
    held_out = all_windows(text.held_out, options.length)[: options.batch]
    save_and_reload(options.output / "model.eqx", model, hyperparameters, solver, held_out)

    after = report(f"{difference} after training:", model, windows, solvers)

    prompt = text.held_out[: options.length]
    written = sample(model, prompt, options.sample, temperature=options.temperature, key=key_sample)
    print(f"\nHeld-out text | continuation at temperature {options.temperature}:\n")
    print(f"{text.decode(prompt)}|{text.decode(written)}\n")

    metrics = {
        "options": vars(options) | {"output": str(options.output)},
        "parameters": parameters,
        "bits_per_character": {"untrained": untrained, "trained": trained},
        "characters_per_second": history.characters_per_second,
        "seconds": time.perf_counter() - begin,
        "agreement": {
            "before": [row._asdict() for row in before],
            "after": [row._asdict() for row in after],
        },
        "loss": history.train,
        "held_out": history.held_out,
    }
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"Wrote loss.png, metrics.json and model.eqx to {options.output}.")


if __name__ == "__main__":
    main()
