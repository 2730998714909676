"""Train the language model of `examples.char_lm` on many devices, of several processes.

    python -m examples.distributed_lm --processes 2 --devices-per-process 2 --mesh 2,2

starts two processes on this machine, with two CPU devices each. Windows of text are dealt out along
one axis of the mesh, and cut into pieces along the other, which is time. On several machines, run
the same command on each:

    python -m examples.distributed_lm --coordinator HOST:PORT --num-processes 2 --process-id 0

or let a scheduler start it, with `--scheduler`. Each process makes only its own part of a batch.
The first one shows the progress, and it alone reads and writes the output folder. When a process
dies all others end, within a minute, and `--resume` goes on from the last checkpoint, on whatever
devices there are then.

Cutting time pays for long windows. On 2 CPU cores, one window of 32,768 characters (`--length 32768
--batch 1 --width 64 --depth 1`) made nearly twice as many steps a second on two devices as on one,
in one process or in two; with windows of 128, two processes of two devices were several times
slower than one device, as they do little but wait for each other.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import pararnn as prnn

from ._cells import CELLS
from ._harness import Metrics, State, check_resumable, fit
from ._language_model import (
    LanguageModel,
    cross_entropy,
    make_optimiser,
    save,
    update,
    with_solver,
)
from ._launch import STOPPED, add_options, guard, own_place, places
from ._member import joined, leave
from ._mesh import make_mesh, replicate, windows
from ._options import add_language_model, number, parse_language_model
from ._text import Text, load_text

Batch = Int[Array, "batch length"]
_MODULE = "examples.distributed_lm"

# --- options --------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Train a character-level language model on the devices of several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", default="diagonal-gru", help="the recurrence", choices=list(CELLS))
    add_language_model(parser, "out/distributed_lm")
    add(
        "--mesh",
        default=None,
        help="over how many devices the windows of a batch are dealt out, and over how many each "
        "is cut along time; None: all processes, and all devices of one",
        type=mesh_shape,
        metavar="DATA,TIME",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    add(
        "--save-every",
        default=30.0,
        help="between checkpoints; there is one more at the end",
        type=number(float, 0),
        metavar="SECONDS",
    )
    add_options(parser)
    return parser


def mesh_shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be two whole numbers, such as 2,4; got {text!r}")
    return int(parts[0]), int(parts[1])


def choose_mesh(options: argparse.Namespace, processes: int, devices: int) -> tuple[int, int]:
    """The shape of the mesh. Ends the program if it does not fit the devices or the batches."""
    data, time = options.mesh or (processes, devices // processes)
    if data * time != devices:
        raise SystemExit(
            f"error: --mesh {data},{time} needs {data * time} devices; there are {devices}."
        )
    for flag, given, parts in (("batch", options.batch, data), ("length", options.length, time)):
        if given % parts:
            raise SystemExit(
                f"error: --{flag} {given} cannot be cut into {parts} equal parts, as the mesh "
                f"{data},{time} asks for. Take a multiple of {parts}, or another --mesh."
            )
    return data, time


# --- training -------------------------------------------------------------------------------------


def start(options: argparse.Namespace, text: Text) -> State:
    """The state before the first step."""
    key_model, key = jax.random.split(jax.random.key(options.seed))
    model = LanguageModel(**hyperparameters(options, text), key=key_model)
    model = with_solver(model, prnn.TimeSharded("time"))
    optimiser = make_optimiser(options.lr, options.steps)
    return State(model, optimiser.init(eqx.filter(model, eqx.is_inexact_array)), key)


def hyperparameters(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    return {
        "cell": options.cell,
        "vocabulary": text.vocabulary,
        "width": options.width,
        "depth": options.depth,
    }


def record(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What the weights depend on. The mesh is not among it."""
    names = ("length", "batch", "steps", "lr", "seed")
    chosen = {name: vars(options)[name] for name in names}
    return hyperparameters(options, text) | chosen | {"characters": len(text.train)}


def share(state: State, mesh: Mesh) -> State:
    """The state of the first process, on all devices."""
    numbers = np.asarray([state.step, state.stage])
    arrays, rest = eqx.partition((state.model, state.moments), eqx.is_array)
    arrays, numbers = replicate((arrays, numbers), mesh)
    model, moments = eqx.combine(arrays, rest)
    return State(model, moments, state.key, int(numbers[0]), int(numbers[1]))


@eqx.filter_jit
def loss_of(model: LanguageModel, inputs: Batch, targets: Batch) -> Float[Array, ""]:
    """Bits per character."""
    return cross_entropy(jax.vmap(model)(inputs), targets)


@eqx.filter_jit
def train_step(model, moments, inputs, targets, everywhere, lr, steps):
    loss, gradients = eqx.filter_value_and_grad(loss_of)(model, inputs, targets)
    model, moments = update(make_optimiser(lr, steps), model, moments, gradients)
    return eqx.filter_shard((model, moments, loss), everywhere)


def advance(
    state: State, options: argparse.Namespace, text: Text, mesh: Mesh
) -> tuple[State, Metrics]:
    """One step of training. Its windows depend on the seed and the step, not on the mesh."""
    rng = np.random.default_rng((options.seed, state.step))
    starts = rng.integers(0, len(text.train) - options.length, options.batch)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        inputs, targets = windows(mesh, text.train, starts, options.length)
        out = train_step(
            state.model, state.moments, inputs, targets, everywhere, options.lr, options.steps
        )
    # Waits for all: with too many steps in flight, collectives may wait for each other for ever.
    model, moments, loss = jax.block_until_ready(out)
    return State(model, moments, state.key, state.step + 1), {"loss": float(loss)}


def evaluate(model: LanguageModel, options: argparse.Namespace, text: Text, mesh: Mesh) -> float:
    """The loss on as much of the held-out text as fills whole batches; NaN if it fills none."""
    starts = np.arange(0, len(text.held_out) - options.length, options.length)
    batches = starts[: len(starts) // options.batch * options.batch].reshape(-1, options.batch)
    with jax.set_mesh(mesh):
        losses = [
            float(loss_of(model, *windows(mesh, text.held_out, batch, options.length)))
            for batch in batches
        ]
    return sum(losses) / len(losses) if losses else math.nan


def train(options: argparse.Namespace, text: Text, mesh: Mesh, first: bool) -> State:
    """Trains, or goes on training. Only the first process has a folder."""
    try:
        return fit(
            start(options, text),
            functools.partial(advance, options=options, text=text, mesh=mesh),
            steps=options.steps,
            # Asked to end, the processes agree on a step.
            done=lambda state: reached_preemption_sync_point(state.step),
            folder=options.output if first else None,
            options=record(options, text),
            resume=options.resume,
            share=functools.partial(share, mesh=mesh),
            save_every=options.save_every,
            quiet=not first,
        )
    except FloatingPointError as error:  # in all processes alike
        raise SystemExit(f"error: {error}") from None
    except OSError as error:  # in the first alone
        leave(f"error: {error}")


def work(options: argparse.Namespace, text: Text, first: bool) -> None:
    """What each process does."""
    data, time = choose_mesh(options, jax.process_count(), jax.device_count())
    mesh = make_mesh(data, time)
    print(
        f"Text: {len(text.train):,} characters to train on, {len(text.held_out):,} held out.\n"
        f"Mesh: {data} (data) x {time} (time) of the devices of {jax.process_count()} processes: "
        f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}."
    )
    state = train(options, text, mesh, first)
    if state.step < options.steps:
        print(f"Stopped at step {state.step}. Go on with --resume.")
        sys.exit(STOPPED)
    bits = evaluate(state.model, options, text, mesh)
    measured = f"{bits:.3f} bits per character"
    if math.isnan(bits):
        measured = f"too short for a batch of {options.batch} windows, not measured"
    print(f"Held-out text: {measured}; a uniform guess has {math.log2(len(text.vocabulary)):.2f}.")
    if first:
        save(options.output / "model.eqx", hyperparameters(options, text), state.model)
        print(f"Wrote checkpoint.eqx, metrics.jsonl, metrics.png, model.eqx to {options.output}.")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    args = sys.argv[1:] if args is None else args
    text, parser = load_text(), make_parser()
    options = parse_language_model(parser, args, max_length=len(text.held_out) - 1)
    place = own_place()
    if place is not None:
        with joined(place) as first:
            work(options, text, first)
        return
    started = places(parser, options)
    if options.resume and started[0].index == 0:
        try:
            check_resumable(options.output, record(options, text))
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None
    advice = f"Go on from the last checkpoint: the same with --resume ({options.output})."
    status = guard(_MODULE, args, started, advice)
    if status != 0:
        sys.exit(status)


if __name__ == "__main__":
    main()
