"""Running a function of this package on several CPU devices, or in several processes of one device
each: how many there are is settled when JAX starts, so it runs in processes of its own.

The function is called with the options, by name, and returns what JSON can hold; of several
processes the first one's result counts.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def on_devices(count: int, function: Callable[..., Any], **options: Any) -> Any:
    """What the function returns in a process that has so many CPU devices."""
    return _result(_start(function, options, count), function)


def in_processes(
    prefixes: Sequence[Sequence[str]], address: str, function: Callable[..., Any], **options: Any
) -> Any:
    """What the function returns in the first of some processes that JAX connects, one for each of
    the commands that start them, its own command following; `address` is that of the first."""
    coordinator = f"{address}:{_free_port()}"
    started = [
        _start(function, options, 1, (coordinator, len(prefixes), i), prefix)
        for i, prefix in enumerate(prefixes)
    ]
    first, *_ = [_result(process, function) for process in started]
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(function, options, devices, member=None, prefix=()) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    name = f"{function.__module__}:{function.__qualname__}"
    command = [*prefix, sys.executable, "-m", __name__, name, json.dumps(options)]
    command += [json.dumps(member)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str], function: Callable[..., Any]) -> Any:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{function.__qualname__} ended with status {process.returncode}.")
    return json.loads(output.splitlines()[-1])


def main(name: str, options: str, member: str) -> None:
    import jax

    where = json.loads(member)
    if where is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(*where)
    module, function = name.split(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(options))
    print(json.dumps(found), flush=True)
    if where is not None:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
