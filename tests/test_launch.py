"""The guard of several processes: it ends all when one ends badly, and tells what has happened.

The processes here are small programs without JAX; tests/test_distributed_lm.py has real ones.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from examples import _launch
from examples._launch import LOST, STOPPED, TOLD, Place

pytestmark = pytest.mark.slow

PROGRAM = """
    import os, signal, sys, time
    from examples._launch import own_place
    def say(text):
        os.write(1, (text + chr(10)).encode())  # a whole line: another process writes there too
    place = own_place()
    say(f"started {place.index}")
    act = sys.argv[1 + place.index]
    if act == "wait":
        time.sleep(600)
    elif act == "obey":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        say("ready")
        time.sleep(600)
    elif act == "deaf":
        signal.signal(signal.SIGTERM, lambda *_: say("heard"))
        say("ready")
        while True:
            time.sleep(600)
    elif act == "orphan":
        say(f"pid {os.getpid()}")
        os.read(0, 1)
    elif act.startswith("-"):
        os.kill(os.getpid(), -int(act))
    else:
        sys.exit(int(act))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "small_program.py").write_text(textwrap.dedent(PROGRAM))
    root = os.path.dirname(os.path.dirname(_launch.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    return "small_program"


def places(count):
    return [Place("localhost:1", count, i) for i in range(count)]


@pytest.mark.parametrize(
    "acts, status, says",
    [
        ("0 0", 0, []),
        ("0 3", 3, ["process 1 of 2 ended with status 3; ", "advice"]),
        ("-9 75", 137, ["process 0 of 2 was killed by signal 9 (SIGKILL).", "ended process 1 of"]),
        ("-6 -9", 137, ["process 1 of 2 was killed by signal 9 (SIGKILL).", "ended process 0 of"]),
        ("75 -6", LOST, ["process 0 of 2 lost the others: ", "process 1 of 2 lost", "advice"]),
        ("wait 4", 4, ["process 1 of 2 ended with status 4; ", "That ended process 0 of 2."]),
        ("wait 75", LOST, ["process 0 of 2 did not answer any more.", "ended process 1 of 2"]),
        ("1 75", TOLD, []),
        ("143 143", STOPPED, []),
    ],
)
def test_what_the_guard_tells(acts, status, says, module, monkeypatch, capfd):
    monkeypatch.setattr(_launch, "GRACE", 0.5 if "wait" in acts else 60.0)
    assert _launch.guard(module, acts.split(), places(2), "advice") == status
    told = capfd.readouterr().err
    assert all(text in told for text in says), told
    assert bool(told) == bool(says)


@contextlib.contextmanager
def guarding(module, acts):
    """A guard in a process of its own, with what its processes print."""
    program = (
        "import sys\nfrom examples._launch import Place, guard\n"
        "places = [Place('localhost:1', 2, i) for i in range(2)]\n"
        f"sys.exit(guard({module!r}, {acts.split()}, places, 'advice'))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        late = threading.Timer(120, run.kill)
        late.start()
        try:
            yield run
        finally:
            late.cancel()
            run.kill()


def wait_for(run, word):
    """Until both processes have printed `word`, and perhaps more; returns what follows it."""
    found = []
    while len(found) < 2:
        line = run.stdout.readline()
        assert line, "ended"
        if line.startswith(word):
            found.append(line.removeprefix(word).strip())
    return found


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_the_guard_to_end_asks_all(asked, module):
    with guarding(module, "obey obey") as run:
        wait_for(run, "ready")
        run.send_signal(asked)
        assert run.wait(60) == STOPPED


def test_a_second_interrupt_kills(module):
    with guarding(module, "deaf deaf") as run:
        wait_for(run, "ready")
        run.send_signal(signal.SIGINT)
        wait_for(run, "heard")
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 128 + signal.SIGKILL


def test_nobody_outlives_the_guard(module):
    with guarding(module, "orphan orphan") as run:
        orphans = [int(number) for number in wait_for(run, "pid")]
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, orphans)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def parse(flags):
    parser = argparse.ArgumentParser()
    _launch.add_options(parser)
    return _launch.places(parser, parser.parse_args(flags.split()))


def test_places_on_one_machine():
    first, second = parse("--processes 2 --devices-per-process 3")
    assert first.coordinator == second.coordinator
    assert first.coordinator.startswith("localhost:")
    assert (first.index, first.first_device) == (0, 0)
    assert (second.index, second.processes, second.devices, second.first_device) == (1, 2, 3, 3)


def test_places_on_several():
    there = "--coordinator host:1234 --num-processes 4 --process-id 2 --devices-per-process 2"
    assert parse(there) == [Place("host:1234", 4, 2, 2)]
    assert parse("--scheduler") == [Place()]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--coordinator host:1", "needs --num-processes and --process-id"),
        ("--coordinator host:1 --num-processes 2 --process-id 2", "must be below --num-processes"),
        ("--scheduler --process-id 0", "--scheduler: it tells"),
        ("--scheduler --processes 2", "--processes: is for one machine"),
        ("--processes 0", "--processes: must be a whole number, at least 1"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(flags)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
