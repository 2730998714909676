"""Being one of the processes that train together."""

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from ._launch import LOST, TOLD, Place

# A process that is silent for so long is taken for dead, and JAX then ends all others.
_HEARTBEAT_SECONDS = 20
# JAX waits for five minutes until all have come; after so many seconds something is said of it.
_PATIENCE_SECONDS = 15
_CRASHED = 70
# What the errors of collectives speak of when a partner is gone.
_ABOUT_OTHERS = re.compile("gloo|nccl|connection|socket|heartbeat|coordination|barrier", re.I)


@contextlib.contextmanager
def joined(place: Place) -> Iterator[bool]:
    """Makes this process one of the run until the end of the block, and gives whether it is the
    first: the only one to show progress, to write files and to speak. An exception ends the
    process, with a status for the guard."""
    threading.Thread(target=_end_with_guard, daemon=True).start()
    _keep_output_clear()
    first, status = False, 0
    try:
        _initialise(place)
        first = jax.process_index() == 0
        if not first:
            sys.stdout = open(os.devnull, "w")
        yield first
    except SystemExit as error:  # an end that all processes come to at the same place
        told = isinstance(error.code, str)
        status = TOLD if told else error.code or 0
        if told and first:
            print(error.code, file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if not _ABOUT_OTHERS.search(str(error)):
            _crash()
        leave(f"{place.name}: {str(error).splitlines()[0]}", LOST)
    except BaseException:
        _crash()
    jax.distributed.shutdown()  # waits for the others
    if status:
        sys.exit(status)


def leave(message: str, status: int = TOLD) -> NoReturn:
    """Ends this process alone, at once: the usual end would wait for the others."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _crash() -> NoReturn:
    leave(traceback.format_exc(), _CRASHED)


def _end_with_guard() -> None:
    """The guard holds the other end of the standard input, and never writes."""
    os.read(0, 1)
    leave("error: the process that had started this one is gone; this one ends too.", LOST)


def _keep_output_clear() -> None:
    """What Python prints goes to the standard output, what libraries write there is dropped: gloo
    tells of each connection that it makes."""
    sys.stdout = open(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _initialise(place: Place) -> None:
    own = None
    if place.devices is not None:
        jax.config.update("jax_num_cpu_devices", place.devices)
        if place.first_device is not None:
            own = range(place.first_device, place.first_device + place.devices)
    note = f"{place.name} waits for the others, at {place.coordinator or 'the address it was told'}"
    patience = threading.Timer(_PATIENCE_SECONDS, print, [note], {"file": sys.stderr})
    patience.start()
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.index,
        local_device_ids=own,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    patience.cancel()
