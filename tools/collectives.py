"""The collectives of a compiled program: their kinds, bytes and loops."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .hlo import Hlo, read_hlo

# By HLO's names; asynchronous ones are named twice, of which one counts.
_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Collective(NamedTuple):
    """One collective of one array.

    - `kind`: HLO's name.
    - `nbytes`: the bytes that each device sends.
    - `loops`: the loops around it, the outer ones first, by the package's named scopes
        (`iterations`) or `while`; with a question mark in a loop's condition.
    """

    kind: str
    nbytes: int
    loops: tuple[str, ...]


def collectives(text: str) -> list[Collective]:
    """All of a program, from `compiled.as_text()`."""
    hlo = read_hlo(text)
    return sorted(_found(hlo, hlo.entry, ()), key=lambda one: (one.loops, one.kind, one.nbytes))


def _found(hlo: Hlo, name: str, loops: tuple[str, ...]) -> Iterator[Collective]:
    computation = hlo.computations[name]
    for one in computation.instructions.values():
        if one.opcode == "while":
            loop = hlo.loops[one.name]
            inner = _name(loop.path)
            yield from _found(hlo, loop.body, (*loops, inner))
            yield from _found(hlo, loop.condition, (*loops, f"{inner}?"))
            continue
        kind = one.opcode.removesuffix("-start")
        if kind in _KINDS:
            # Of several arrays, which between CPUs go one after another.
            for operand in one.operands:
                yield Collective(kind, computation.instructions[operand].size, loops)
            continue
        for called in one.called():
            if called in hlo.computations:
                yield from _found(hlo, called, loops)


def _name(path: str) -> str:
    """`iterations` of `jit(f)/pararnn_rest/while/body/pararnn_iterations/while`."""
    parts = path.split("/")
    found = re.fullmatch(r"pararnn_(\w+)", parts[-2]) if len(parts) > 1 else None
    return found[1] if found else "while"
