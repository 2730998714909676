"""Starting the processes of a run on this machine, and ending all of them when one ends badly.

A program that trains in several processes is started once on each machine. What is started is a
guard: it starts the program anew, as the processes that train, and waits for them. The guard has
nothing to do with JAX, so it can tell what happened when JAX has ended a process at once.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from ._options import number

# How a process ends, for the guard. Any other status is a surprise, and so is a signal.
TOLD = 1  # by an error that it has explained
LOST = 75  # because it cannot reach the others
STOPPED = 128 + signal.SIGTERM  # as it was asked to, with a checkpoint
GRACE = 10.0  # seconds in which the others may end by themselves
_VARIABLE = "EXAMPLES_PLACE"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of the run one is.

    - `coordinator`, `processes`, `index`: as for `jax.distributed.initialize`; None where a
        scheduler tells.
    - `devices`: how many devices are its own; None for all that there are.
    - `first_device`: the first of them on its machine, if the GPUs of the machine are shared.
    """

    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None
    devices: int | None = None
    first_device: int | None = None

    @property
    def name(self) -> str:
        if self.index is None:
            return "the process of this task"
        return f"process {self.index} of {self.processes}"


def own_place() -> Place | None:
    """The place of this process, or None if it is not one that a guard has started."""
    text = os.environ.get(_VARIABLE)
    return None if text is None else Place(**json.loads(text))


# --- options --------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `places` reads."""
    count, index = number(int, 1), number(int, 0)
    here = parser.add_argument_group("processes on this machine").add_argument
    here("--processes", default=1, help="start so many", type=count, metavar="N")
    here(
        "--devices-per-process",
        default=None,
        help="CPU devices, or GPUs, of each process; None: all GPUs that there are, or one CPU",
        type=count,
        metavar="N",
    )
    group = parser.add_argument_group(
        "processes on several machines", "The same command on each, with another --process-id."
    )
    there = group.add_argument
    there(
        "--coordinator", help="where process 0 is; a port that is free there", metavar="HOST:PORT"
    )
    there("--num-processes", help="of the whole run", type=count, metavar="N")
    there("--process-id", help="from 0; which one this is", type=index, metavar="I")
    there(
        "--scheduler",
        action="store_true",
        help="ask the scheduler (SLURM, Open MPI) for these three: it starts the command",
    )


def places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Place]:
    """The processes that this command is to start."""
    devices = options.devices_per_process
    addressed = (options.coordinator, options.num_processes, options.process_id)
    if all(given is None for given in addressed) and not options.scheduler:
        address = f"localhost:{free_port()}"
        firsts = [devices and i * devices for i in range(options.processes)]
        return [Place(address, len(firsts), i, devices, k) for i, k in enumerate(firsts)]
    if options.processes != 1:
        parser.error(
            "argument --processes: is for one machine; with --coordinator or --scheduler, each "
            "command is one process"
        )
    if options.scheduler:
        if any(given is not None for given in addressed):
            parser.error("argument --scheduler: it tells what --coordinator and the like would")
        return [Place(devices=devices)]
    if any(given is None for given in addressed):
        parser.error("argument --coordinator: needs --num-processes and --process-id, and they it")
    if options.process_id >= options.num_processes:
        parser.error(
            f"argument --process-id: must be below --num-processes, {options.num_processes}; got "
            f"{options.process_id}"
        )
    return [Place(*addressed, devices)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --- the guard ------------------------------------------------------------------------------------


def guard(module: str, words: Sequence[str], places: Sequence[Place], advice: str) -> int:
    """Runs `python -m module words` in each of `places`, and waits for the end of all.

    When one ends badly the others are given `GRACE` seconds to do so too, and are killed then.
    SIGTERM and Ctrl-C are handed on as SIGTERM, which asks for a checkpoint and the end; a second
    Ctrl-C kills.

    **Returns:**

    The exit status: 0 only if that of all was. Else the standard error tells what happened, and
    gives `advice`.
    """
    children = {}
    try:
        for place in places:
            children[place] = _start(module, words, place)
        with _handing_on(list(children.values())):
            killed = _wait(children)
    finally:  # whatever happens here, nobody is left behind
        for child in children.values():
            child.kill()
            child.communicate()  # waits, and closes its input
    codes = {p: child.returncode for p, child in children.items() if p not in killed}
    return _conclude(codes, [place for place in places if place in killed], advice)


def _start(module: str, words: Sequence[str], place: Place) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=os.environ | {_VARIABLE: json.dumps(dataclasses.asdict(place))},
        stdin=subprocess.PIPE,  # never written to: it closes when the guard dies
        process_group=0,  # Ctrl-C is for the guard alone
    )


@contextlib.contextmanager
def _handing_on(children: list[subprocess.Popen]) -> Iterator[None]:
    """Within the block, what asks this process to end asks all of `children`."""
    asked = []

    def hand_on(signum, frame):
        again = signal.SIGINT in asked and signum == signal.SIGINT
        if not asked:
            print("\nEnding after a checkpoint; Ctrl-C again ends at once.", file=sys.stderr)
        asked.append(signum)
        for child in children:
            child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    old = {s: signal.signal(s, hand_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def _wait(children: dict[Place, subprocess.Popen]) -> set[Place]:
    """Returns when all have ended: the places of those that had to be killed."""
    deadline = None
    while running := {place for place, child in children.items() if child.poll() is None}:
        if deadline is None and any(child.returncode for child in children.values()):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for place in running:
                children[place].kill()
            return running
        time.sleep(0.05)
    return set()


def _conclude(codes: dict[Place, int], killed: list[Place], advice: str) -> int:
    """The exit status; and a message on what has happened, if no process has given it."""
    bad = {place: code for place, code in codes.items() if code != 0}
    if TOLD in bad.values():
        return TOLD
    if set(bad.values()) <= {STOPPED}:
        return STOPPED if bad else 0
    # JAX aborts a process that has lost the others: what ended in another way was the first.
    lost = [place for place, code in bad.items() if code in (LOST, -signal.SIGABRT)]
    causes = {place: code for place, code in bad.items() if place not in lost}
    if causes:
        lines = [f"error: {place.name} {_fate(code)}." for place, code in causes.items()]
        ended = [*lost, *killed]
    elif killed:
        lines = [f"error: {place.name} did not answer any more." for place in killed]
        ended = lost
    else:
        lines = [
            f"error: {place.name} lost the others: one of them has died, or cannot be reached. "
            "The messages of the other machines, and those above, may tell more."
            for place in lost
        ]
        ended = []
    if ended:
        lines.append(f"That ended {', '.join(place.name for place in ended)}.")
    print("\n".join([*lines, advice]), file=sys.stderr, flush=True)
    code = next(iter((causes or bad).values()))
    return code if code > 0 else 128 - code


def _fate(code: int) -> str:
    if code > 0:
        return f"ended with status {code}; the messages above may tell why"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # one without a name
        return f"was killed by signal {-code}"
