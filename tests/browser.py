"""Headless Chromium, told what to do through a pair of pipes (the DevTools protocol)."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = [
    "--headless",
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # there is no network
    "--remote-debugging-pipe",
]
# Chromium reads from 3 and writes to 4.
_START = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Page:
    """A tab. `complaints` are the errors and warnings of the console, and requests that failed."""

    def __init__(self, out: int, into: int):
        self._out, self._into = out, into
        self._count, self._rest, self._session = 0, b"", None
        self._loaded = False
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Goes to an address, in a window of some size, and waits until all is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self._call("Page.navigate", url=url)
        end = time.monotonic() + 30
        while not self._loaded:
            assert time.monotonic() < end, f"{url} does not load"
            self._hear(self._receive())

    def evaluate(self, script: str) -> Any:
        """What a piece of JavaScript gives, as JSON."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20) -> Any:
        """The same, as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)
        return value

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._hear(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._out], [], [], 30)[0], "Chromium does not answer"
            more = os.read(self._out, 2**16)
            assert more, "Chromium has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _hear(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url')}")
        elif method == "Network.loadingFailed":
            self.complaints.append(f"not loaded: {params['errorText']}")


@contextlib.contextmanager
def page(folder: str) -> Iterator[Page]:
    """A tab of a browser that keeps its files in a folder of its own."""
    assert CHROMIUM is not None
    child_in, into = os.pipe()
    out, child_out = os.pipe()
    # From numbers that are free to those that Chromium takes. (With a `preexec_fn` for that, Python
    # would fork, of which JAX warns.)
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (child_in, child_out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *map(str, given)]
        + [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}"],
        pass_fds=given,
        stderr=subprocess.DEVNULL,
    )
    for fd in (child_in, child_out, *given):
        os.close(fd)
    try:
        yield Page(out, into)
    finally:
        process.terminate()
        process.wait(10)
        os.close(into)
        os.close(out)
