"""How far a program is: a bar on a terminal, a line now and then in a log."""

import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS = 10.0  # between two lines of a log
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left{postfix}"


class _Lines:
    """A stream to which tqdm writes what it would draw over the last; it comes out as lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.stream.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(
    description: str, total: int, *, initial: int = 0, note: str = "", quiet: bool = False
) -> tqdm:
    """A progress bar on the standard error, to be used as a context manager.

    What stands beside it is changed with `refresh=False`: `update` decides when to show it.

    **Arguments:**

    - `description`, `total`, `initial`: what is done, how many steps it takes, how many are done.
    - `note`: stands beside the bar until there is something else, such as "compiling".
    - `quiet`: shows nothing.
    """
    # In a log, each drawing of a bar would follow the last one on the same endless line.
    log = not sys.stderr.isatty()
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit="step",
        postfix=note,
        disable=quiet,
        file=_Lines(sys.stderr) if log else None,
        bar_format=_LINE if log else None,
        mininterval=_SECONDS if log else 0.1,
        miniters=1,  # the time alone decides
    )
