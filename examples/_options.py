"""What the command lines of the programs share."""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A parser of finite numbers from `low` to `high`; real numbers must be above `low`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        enough = value >= low if kind is int else value > low
        if not (enough and value <= high and math.isfinite(value)):
            wanted = f"a whole number, at least {low}" if kind is int else f"a number above {low}"
            wanted += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}")
        return value

    return parse


def add_language_model(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the options of any training of a language model, with `output` as the default folder."""
    count, positive = number(int, 1), number(float, 0)
    seed = number(int, 0, 2**32 - 1)

    def add(flag: str, default: Any, description: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=default, help=description, **kwargs)

    add("--width", 128, "features of a character and of a state", type=count, metavar="N")
    add("--depth", 2, "blocks, each an RNN and an MLP", type=count, metavar="N")
    add("--length", 128, "length of a training window", type=count, metavar="CHARACTERS")
    add("--batch", 8, "windows in a training step", type=count, metavar="N")
    add("--steps", 1000, "training steps", type=count, metavar="N")
    add("--lr", 4e-3, "learning rate of AdamW after warm-up", type=positive, metavar="RATE")
    add("--seed", 0, "seed of all that is random", type=seed, metavar="N")
    add("--output", output, "folder for the results", type=pathlib.Path, metavar="FOLDER")


def parse_language_model(
    parser: argparse.ArgumentParser, args: Sequence[str] | None, max_length: int
) -> argparse.Namespace:
    """Reads the command line and makes the folder for the results; ends the program with a message
    if something is wrong with an option of `add_language_model`."""
    options = parser.parse_args(args)
    if options.length > max_length:
        parser.error(f"argument --length: must be at most {max_length}; got {options.length}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return options
