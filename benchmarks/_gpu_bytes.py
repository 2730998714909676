"""How many bytes a compiled program moves, from its optimised HLO.

Every operation that runs on the device reads its operands and writes its results, once each; of an
array from which it only takes slices, what it takes; of one into which it only puts an update, the
update. What is fused moves nothing between. Caches are not modelled: small arrays that stay in the
second level's cache count like others. (XLA has such a figure, "bytes accessed", but not for a
program that no device holds.)
"""

import functools
import math
import re
from typing import NamedTuple

_ITEMSIZE = {"pred": 1, "token": 0, "c64": 8, "c128": 16}
# Nothing runs on the device for these, or it is counted where it stands.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
    "optimization-barrier", "partition-id", "replica-id", "opaque",
}  # fmt: skip
_HOLDERS = {"call", "conditional", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is put
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}


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
        while found.opcode in _VIEWS and len(found.operands) == 1:
            found = self.instructions[found.operands[0]]
        return found

    def uses(self, name: str) -> list[tuple[Instruction, int]]:
        """Where a value or a view of it is an operand, and which."""
        found = []
        for user in self.instructions.values():
            for i, operand in enumerate(user.operands):
                if operand == name:
                    view = user.opcode in _VIEWS and user is not self.root
                    found += self.uses(user.name) if view else [(user, i)]
        return found


class HloLoop(NamedTuple):
    """A `while`: its computations, where it comes from, and its number of turns, if it is known."""

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

    def moved(self, name: str) -> int:
        """Bytes that an execution of a computation moves, its loops aside."""
        computation = self.computations.get(name)
        if computation is None:
            return 0
        return sum(self._moved_by(computation, i) for i in computation.instructions.values())

    def _moved_by(self, computation: Computation, found: Instruction) -> int:
        if found.opcode in _FREE or found.opcode.endswith("-done"):
            return 0
        if found.opcode in _HOLDERS:
            return sum(map(self.moved, found.called()))
        if found.opcode in _SLICES:
            return 2 * found.size
        sizes = [computation.instructions[name].size for name in found.operands]
        if found.opcode in _UPDATES:
            return 2 * sizes[_UPDATES[found.opcode]]
        if found.opcode == "fusion":
            return self._moved_by_fusion(*found.called())
        return sum(sizes) + found.size

    @functools.cache  # noqa: B019 (a module lives as long as its figures are made)
    def _moved_by_fusion(self, name: str) -> int:
        fused = self.computations[name]
        results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        read = sum(_taken(fused, parameter) for parameter in fused.parameters)
        return read + sum(_put(fused, result) for result in results)


def _taken(fused: Computation, parameter: Instruction) -> int:
    """What a fusion reads of a parameter."""
    total = 0
    for user, place in fused.uses(parameter.name):
        if user.opcode in _UPDATES and place == 0:
            continue
        if user.opcode not in _SLICES or place > 0:
            return parameter.size
        total += user.size
    return min(total, parameter.size)


def _put(fused: Computation, result: str) -> int:
    """What a fusion writes of a result."""
    found = fused.through_views(result)
    if found.opcode in _UPDATES:
        return fused.instructions[found.operands[_UPDATES[found.opcode]]].size
    return fused.instructions[result].size


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
