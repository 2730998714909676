"""An optimised program of XLA, read from its text (`compiled.as_text()`)."""

import math
import re
from typing import NamedTuple

_ITEMSIZE = {"pred": 1, "token": 0, "c64": 8, "c128": 16}
VIEWS = {"bitcast", "reshape", "get-tuple-element"}


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # its attributes

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(
            math.prod(int(n) for n in shape.split(",") if n) * _itemsize(dtype)
            for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", self.type)
        )

    def called(self) -> list[str]:
        """The computations of a call, a fusion or a conditional."""
        text = " ".join(
            re.findall(r"(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%\S+)", self.rest)
        )
        return re.findall(r"%([\w.\-]+)", text)


def _itemsize(dtype: str) -> int:
    if dtype in _ITEMSIZE:
        return _ITEMSIZE[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return -(-int(bits[1]) // 8) if bits else 0


class Computation(NamedTuple):
    """The instructions by name; the parameters in order; the last one."""

    instructions: dict[str, Instruction]
    parameters: list[Instruction]
    root: Instruction

    def through_views(self, name: str) -> Instruction:
        """What an instruction is a view of."""
        found = self.instructions[name]
        while found.opcode in VIEWS and len(found.operands) == 1:
            found = self.instructions[found.operands[0]]
        return found

    def uses(self, name: str) -> list[tuple[Instruction, int]]:
        """Where a value or a view of it is an operand, and which."""
        found = []
        for user in self.instructions.values():
            for i, operand in enumerate(user.operands):
                if operand == name:
                    view = user.opcode in VIEWS and user is not self.root
                    found += self.uses(user.name) if view else [(user, i)]
        return found


class HloLoop(NamedTuple):
    """A `while`: its computations, its name scopes, and its static trip count, if it has one."""

    body: str
    condition: str
    path: str
    trip: int | None


class Hlo:
    """A module: its computations, the entry's name, and the loops by name."""

    def __init__(self, computations: dict[str, Computation], entry: str):
        self.computations = computations
        self.entry = entry
        instructions = [i for c in computations.values() for i in c.instructions.values()]
        self.loops = {i.name: _loop(i) for i in instructions if i.opcode == "while"}


# --- the text ---------------------------------------------------------------------------------


def read_hlo(text: str) -> Hlo:
    """Reads what `compiled.as_text()` returns."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line == "}":
            computations[name] = _computation(lines)
        elif name:
            lines.append(line.strip())
    return Hlo(computations, entry)


def _computation(lines: list[str]) -> Computation:
    parsed = [(line, found) for line in lines if (found := _instruction(line)) is not None]
    parameters = [found for _, found in parsed if found.opcode == "parameter"]
    root = next(found for line, found in parsed if line.startswith("ROOT "))
    return Computation({found.name: found for _, found in parsed}, parameters, root)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    cut = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:cut], rest[cut:].strip()
    opcode, rest = rest.split("(", 1)
    cut = _closing("(" + rest) - 1
    operands = re.findall(r"%([\w.\-]+)", rest[:cut])
    return Instruction(match[1], kind, opcode, tuple(operands), rest[cut + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis closes with which a text begins."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"`text` has a parenthesis that is not closed: {text[:80]!r}.")


def _loop(found: Instruction) -> HloLoop:
    def attribute(pattern: str) -> str:
        match = re.search(pattern, found.rest)
        return match[1] if match else ""

    trip = attribute(r'"known_trip_count":\{"n":"(\d+)"')
    return HloLoop(
        attribute(r"body=%?([\w.\-]+)"),
        attribute(r"condition=%?([\w.\-]+)"),
        attribute(r'op_name="([^"]*)"'),
        int(trip) if trip else None,
    )
