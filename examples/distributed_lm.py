"""Train the language model of `examples.char_lm` on many devices, of several processes.

    python -m examples.distributed_lm --cpu-devices 4 --mesh 2,2

trains on four CPU devices of one process. Windows of text are sharded along one axis of the mesh by
batch, and along the other by time. Of several processes, each runs the same command, with the
arguments of `jax.distributed.initialize`:

    python -m examples.distributed_lm --coordinator HOST:PORT --num-processes 2 --process-id 0

or, started by a scheduler that JAX detects (SLURM, Open MPI, Kubernetes), with `--distributed`:

    srun python -m examples.distributed_lm --distributed

Each process makes only its own shards of a batch. Process 0 shows the progress, and it alone reads
and writes the output folder. SIGTERM to any process ends all after a checkpoint. When a process
dies, JAX ends the others within two minutes. `--resume` continues from the last checkpoint, on
whatever devices there are then.

Sharding time pays for long windows. On 2 CPU cores, one window of 32,768 characters (`--length
32768 --batch 1 --width 64 --depth 1`) made nearly twice as many steps a second on two devices as on
one, in one process or in two; with windows of 128, two processes of two devices were several times
slower than one device, because they mostly waited for each other.
"""

import argparse
import functools
import math
import os
import sys
import traceback
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
from ._mesh import make_mesh, replicate, windows
from ._options import add_language_model, number, parse_language_model
from ._text import Text, load_text

Batch = Int[Array, "batch length"]
STOPPED = 143  # the exit status after SIGTERM

# --- options --------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.distributed_lm",
        description="Train a character-level language model on the devices of several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", default="diagonal-gru", help="the recurrence", choices=list(CELLS))
    add_language_model(parser, "out/distributed_lm")
    add(
        "--mesh",
        default=None,
        help="numbers of devices that shard the batch, and time; None: all processes, and all "
        "devices of one",
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
    group = parser.add_argument_group("devices and processes")
    add, count = group.add_argument, number(int, 1)
    add("--cpu-devices", help="of this process; None: one", type=count, metavar="N")
    add("--coordinator", help="address of process 0, with a free port", metavar="HOST:PORT")
    add("--num-processes", help="of the whole run", type=count, metavar="N")
    add("--process-id", help="from 0", type=number(int, 0), metavar="I")
    add("--distributed", action="store_true", help="let JAX detect these three")
    return parser


def connect(options: argparse.Namespace) -> bool:
    """Connects the processes; returns whether there may be several."""
    if options.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    addresses = options.coordinator, options.num_processes, options.process_id
    several = options.distributed or any(value is not None for value in addresses)
    if several:
        jax.distributed.initialize(*addresses)
    return several


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


def train(options: argparse.Namespace, text: Text, mesh: Mesh) -> State:
    """Trains, or continues training. Only process 0 has a folder."""
    first = jax.process_index() == 0
    try:
        return fit(
            start(options, text),
            functools.partial(advance, options=options, text=text, mesh=mesh),
            steps=options.steps,
            # After a SIGTERM, the processes agree on the step at which they end.
            done=lambda state: reached_preemption_sync_point(state.step),
            folder=options.output if first else None,
            options=record(options, text),
            resume=options.resume,
            share=functools.partial(share, mesh=mesh),
            save_every=options.save_every,
            quiet=not first,
        )
    except FloatingPointError as error:  # in all processes
        raise SystemExit(f"error: {error}") from None


def work(options: argparse.Namespace, text: Text) -> None:
    """Trains and evaluates; all processes call it."""
    data, time = choose_mesh(options, jax.process_count(), jax.device_count())
    mesh, first = make_mesh(data, time), jax.process_index() == 0
    say = print if first else lambda text: None
    say(
        f"Text: {len(text.train):,} characters to train on, {len(text.held_out):,} held out.\n"
        f"Mesh: {data} (data) x {time} (time) of the devices of {jax.process_count()} processes: "
        f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}."
    )
    state = train(options, text, mesh)
    if state.step < options.steps:
        say(f"Stopped at step {state.step}. Continue with --resume.")
        sys.exit(STOPPED)
    bits = evaluate(state.model, options, text, mesh)
    measured = f"{bits:.3f} bits per character"
    if math.isnan(bits):
        measured = f"too short for a batch of {options.batch} windows, not measured"
    say(f"Held-out text: {measured}; a uniform guess has {math.log2(len(text.vocabulary)):.2f}.")
    if first:
        save(options.output / "model.eqx", hyperparameters(options, text), state.model)
    say(f"Wrote checkpoint.eqx, metrics.jsonl, metrics.png, model.eqx to {options.output}.")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program; `args` are the words of the command line."""
    text, parser = load_text(), make_parser()
    options = parse_language_model(parser, args, max_length=len(text.held_out) - 1)
    if options.resume and not options.distributed and not options.process_id:
        try:  # before the other processes wait for this one
            check_resumable(options.output, record(options, text))
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None
    several = connect(options)
    try:
        work(options, text)
    except Exception:
        if not several:
            raise
        # The usual end would wait for the other processes, which wait for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
