"""A slow line between two processes of this machine, for what a network does to a solve.

Each process gets a network of its own (namespaces of Linux, so this needs root), whose only way out
is a device that hands every packet to this program; which hands it to the other one later: after
the delay of the line, and no sooner than its rate allows.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

ADDRESSES = "10.9.0.1", "10.9.0.2"
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x0001 | 0x1000
_PACKET = 65_536


def is_possible() -> bool:
    """Whether this user may make networks here."""
    if not sys.platform.startswith("linux") or not os.path.exists("/dev/net/tun"):
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def line(delay: float, rate: float) -> Iterator[list[Sequence[str]]]:
    """A line, as long as the block lasts.

    **Arguments:**

    - `delay`: seconds from one end to the other, one way.
    - `rate`: bytes per second in each direction.

    **Returns:**

    The command for each end, to be followed by the command of the process that is to be there.
    """
    ends: list[socket.socket] = []
    paths = []
    for address in ADDRESSES:
        path = f"/tmp/line-{os.getpid()}-{address}"
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen(1)
        ends.append(server)
        paths.append(path)
    stop = threading.Event()
    relay = threading.Thread(target=_relay, args=(ends, delay, rate, stop), daemon=True)
    relay.start()
    own = [sys.executable, "-m", __name__]
    try:
        yield [
            ["unshare", "-n", "-u", *own, address, path]
            for address, path in zip(ADDRESSES, paths, strict=True)
        ]
    finally:
        stop.set()
        relay.join()
        for server, path in zip(ends, paths, strict=True):
            server.close()
            os.unlink(path)


def _relay(servers: list[socket.socket], delay: float, rate: float, stop: threading.Event) -> None:
    devices = []
    for server in servers:
        connection, _ = server.accept()
        _, (device,), _, _ = socket.recv_fds(connection, 1, 1)
        connection.close()
        os.set_blocking(device, False)
        devices.append(device)
    free = [0.0, 0.0]  # when the line can take the next packet, by direction
    waiting: list[list[tuple[float, bytes]]] = [[], []]
    while not stop.is_set():
        due = [queue[0][0] for queue in waiting if queue]
        rest = max(0.0, min(due) - time.monotonic()) if due else 0.05
        ready, _, _ = select.select(devices, [], [], rest)
        now = time.monotonic()
        for i, device in enumerate(devices):
            while device in ready:
                try:
                    packet = os.read(device, _PACKET)
                except OSError:  # no more, or the process at this end is gone
                    break
                free[i] = max(now, free[i]) + len(packet) / rate
                waiting[i].append((free[i] + delay, packet))
            while waiting[i] and waiting[i][0][0] <= now:
                _, packet = waiting[i].pop(0)
                with contextlib.suppress(OSError):
                    os.write(devices[1 - i], packet)
    for device in devices:
        os.close(device)


def main(address: str, path: str, *command: str) -> None:
    """Becomes the process at one end, once there is a network."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"line", _TUN_WITHOUT_HEADER))
    for action in (
        f"addr add {address}/24 dev line",
        "link set line mtu 9000 up",
        "link set lo up",
    ):
        subprocess.run(["ip", *action.split()], check=True)
    # The libraries below JAX ask for the address of this host by its name.
    socket.sethostname(address)
    with socket.socket(socket.AF_UNIX) as relay:
        relay.connect(path)
        socket.send_fds(relay, [b"x"], [device])
    os.set_inheritable(device, True)  # the network is gone with the last who holds it
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
