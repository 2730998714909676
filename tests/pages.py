"""The Python blocks of a Markdown page: found, run as a reader would run them, and what they print.

A block of a page may be followed by a comment with what must hold then, which readers do not see,
and by a block of text, which is what it prints:

    ```python
    print(1 + 1)
    ```

    <!-- check
    assert 1 + 1 == 2
    -->

    ```text
    2
    ```

`python -m tests.pages docs/quickstart.md …` runs pages, and writes into them what is printed.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
_BLOCK = re.compile(
    r"(?:<!-- example: (?P<name>\w+) -->\n)?"
    r"```python\n(?P<code>.*?)```\n"
    r"(?:\n<!-- check\n(?P<check>.*?)-->\n)?"
    r"(?:\n```text\n(?P<output>.*?)```\n)?",
    re.S,
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")
_CORRECTION = re.compile(r"(?<=correction=)[-+.\de]+")
_FLAGS = os.environ.get("XLA_FLAGS", "")
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "MPLBACKEND": "agg",
    "PYTHONPATH": str(ROOT),
}
_TWO_DEVICES = {"XLA_FLAGS": f"{_FLAGS} --xla_force_host_platform_device_count=2"}


class Block(NamedTuple):
    """A block of a page: its name, if it has one; the line of the page above it; what it prints,
    if the page says so, and where that stands."""

    name: str | None
    line: int
    code: str
    check: str
    output: str | None
    span: tuple[int, int]


def blocks_of(text: str) -> list[Block]:
    """The Python blocks, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        name, code, check, output = match.group("name", "code", "check", "output")
        found.append(Block(name, line, code, check or "", output, match.span("output")))
    return found


def run(page: str, blocks: list[Block], *, alone: bool = False) -> list[str]:
    """What the blocks print, run one after another in a process of their own.

    `alone`: each as if there were no others; otherwise each knows what those before it made.
    """
    return run_all({page: blocks}, alone=alone)[page]


def need_devices(blocks: list[Block]) -> bool:
    """Whether they are for several devices."""
    return any("jax.device_count()" in block.code for block in blocks)


def run_all(blocks: dict[str, list[Block]], *, alone: bool = False) -> dict[str, list[str]]:
    """The same of several pages, in one process: JAX takes long to start. None knows of another."""
    parts = {
        page: [(block.line, block.code, block.check) for block in some]
        for page, some in blocks.items()
    }
    given = json.dumps({"pages": parts, "alone": alone})
    meshes = any(map(need_devices, blocks.values()))
    output = python("-m", "tests.pages", "--run", given=given, two_devices=meshes)
    return json.loads(output.splitlines()[-1])


def python(*args: str, given: str = "", two_devices: bool = False) -> str:
    """What Python prints in a process of its own, where every warning is an error."""
    result = subprocess.run(
        [sys.executable, "-W", "error", *args],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT, **(_TWO_DEVICES if two_devices else {})},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def agree(shown: str, printed: str) -> bool:
    """Whether a page shows what is printed. The words are the same; numbers are about the same,
    since machines and releases of JAX round in other ways, and errors as small as rounding count
    as none, as do corrections that are below the tolerance, which is their unit."""
    shown, printed = (_CORRECTION.sub(_settled, text) for text in (shown, printed))
    if _NUMBER.sub("#", shown).split() != _NUMBER.sub("#", printed).split():
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(_about(*pair) for pair in pairs)


def _settled(correction: re.Match[str]) -> str:
    return "0" if float(correction[0]) <= 1 else correction[0]


def _about(shown: str, printed: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (shown, printed))
    whole = re.fullmatch(r"[-+\d,]+", shown)
    small = 1 if whole else 1e-4
    return abs(a - b) <= max(small, 0.1 * abs(a))


def _run_here(page: str, blocks: list[tuple[int, str, str]], alone: bool) -> list[str]:
    printed, names = [], {"__name__": "__main__"}
    for line, code, check in blocks:
        if alone:
            names = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + code, page, "exec"), names)
        exec(compile(check, f"{page}, check of line {line}", "exec"), names)
        printed.append(out.getvalue())
    return printed


def _write(page: pathlib.Path) -> None:
    """Puts what the blocks of a page print into the page."""
    text = page.read_text()
    blocks = blocks_of(text)
    for block, printed in reversed(list(zip(blocks, run(page.name, blocks), strict=True))):
        if block.output is not None:
            begin, end = block.span
            text = text[:begin] + printed + text[end:]
    page.write_text(text)


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        given = json.load(sys.stdin)
        pages = given["pages"].items()
        print(json.dumps({page: _run_here(page, some, given["alone"]) for page, some in pages}))
    else:
        for argument in sys.argv[1:]:
            _write(pathlib.Path(argument))
