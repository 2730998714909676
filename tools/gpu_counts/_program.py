"""A program that XLA compiled for a GPU, read from its dumps: the launches, and their loops.

There are two dumps: the list of *thunks*, which the host launches one by one, and the optimised
HLO, which has the sizes. A program is a `Block`: the operations of one execution, and its loops.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tools.hlo import read_hlo

from ._bytes import Moved


@dataclasses.dataclass
class Block:
    """Operations that run one after another.

    - `device_ops`: kernels, copies and library calls.
    - `submissions`: launches by the host; a CUDA graph is one.
    - `moved_bytes`: operands and results of every operation; see `_bytes`.
    - `loops`: the loops among them, whose operations are not included above.
    """

    device_ops: int = 0
    submissions: int = 0
    moved_bytes: int = 0
    loops: "list[Loop]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Loop:
    """A `while` loop. Without a static trip count (`trip`), the host waits for the condition in
    every iteration, and once more at the end, unless the loop is part of a CUDA graph."""

    name: str
    path: str  # JAX's name scopes around it
    trip: int | None
    condition: Block
    body: Block
    in_graph: bool = False


class Totals(NamedTuple):
    """The sums of the fields of `Block` over a run, and how often the host reads the condition of a
    loop."""

    device_ops: float = 0.0
    submissions: float = 0.0
    moved_bytes: float = 0.0
    reads: float = 0.0

    def plus(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


def totals(
    block: Block, trips: Callable[[Loop], float] = lambda _: math.nan, executions: float = 1.0
) -> Totals:
    """The totals of a run.

    **Arguments:**

    - `block`: the program.
    - `trips`: the trips of a loop without a static trip count in the whole run; NaN where they are
        unknown, and then the totals are NaN.
    - `executions`: how often the block is executed.
    """
    found = Totals(
        executions * block.device_ops,
        executions * block.submissions,
        executions * block.moved_bytes,
    )
    for loop in block.loops:
        if loop.trip is not None:  # nobody reads the condition
            found = found.plus(totals(loop.body, trips, executions * loop.trip))
            continue
        inside = trips(loop)
        reads = executions + inside
        found = found.plus(Totals(reads=0.0 if loop.in_graph else reads))
        found = found.plus(totals(loop.condition, trips, reads))
        found = found.plus(totals(loop.body, trips, inside))
    return found


def all_loops(block: Block) -> Iterator[Loop]:
    """All loops, the outer ones first."""
    for loop in block.loops:
        yield loop
        yield from all_loops(loop.condition)
        yield from all_loops(loop.body)


# --- the list of thunks -----------------------------------------------------------------------

# Thunks that only hold others.
_HOLDERS = {
    "kWhile", "kConditional", "kCommandBuffer", "kSequential", "kDynamicSliceFusion",
    "kDynamicSlice", "kAsyncStart", "kAsyncDone", "root",
}  # fmt: skip


@dataclasses.dataclass
class _Thunk:
    kind: str
    role: str  # "condition" or "body" in a loop
    name: str = ""
    children: "list[_Thunk]" = dataclasses.field(default_factory=list)


def read_program(thunks: str, metadata: str, hlo: str) -> Block:
    """The program.

    **Arguments:**

    - `thunks`, `metadata`: as XLA dumps them.
    - `hlo`: the optimised HLO.
    """
    found = re.findall(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)', metadata)
    names = {int(number): name for name, number in found}
    moved = Moved(read_hlo(hlo))
    root = _block([_tree(thunks, names)], moved, False)
    root.moved_bytes = moved.by(moved.hlo.entry)
    return root


def _tree(text: str, names: Mapping[int, str]) -> _Thunk:
    root = _Thunk("root", "body")
    stack: list[tuple[int, _Thunk]] = [(-1, root)]
    roles: dict[int, str] = {}
    for line in filter(str.strip, text.splitlines()):
        indent, line = len(line) - len(line.lstrip()), line.strip()
        match = re.match(r"(\d+): (k\w+)\s*(?:\[[^\]]*\])?\s*(.*)", line)
        if match is None:
            # "condition:" (printed at column 0), "body:", "branch_0:", "No thunks.   body:"
            label = line.split()[-1].rstrip(":")
            for level, thunk in reversed(stack):
                holds = thunk.kind in ("kWhile", "kConditional")
                if holds and (label == "condition" or level <= indent):
                    roles[id(thunk)] = label
                    break
            continue
        while stack[-1][0] >= indent:
            stack.pop()
        parent = stack[-1][1]
        thunk = _Thunk(match[2], roles.get(id(parent), "body"), match[3].split(" ")[0])
        if thunk.kind == "kWhile":
            thunk.name = names.get(int(match[1]), "")
        parent.children.append(thunk)
        stack.append((indent, thunk))
    return root


def _block(thunks: list[_Thunk], moved: Moved, in_graph: bool) -> Block:
    block = Block()
    for thunk in thunks:
        if thunk.kind == "kWhile":
            block.loops.append(_loop(thunk, moved, in_graph))
        elif thunk.kind in _HOLDERS:
            graph = thunk.kind == "kCommandBuffer"
            inner = _block(thunk.children, moved, in_graph or graph)
            block.device_ops += inner.device_ops
            block.submissions += 1 if graph and not in_graph else inner.submissions
            block.loops += inner.loops
        else:
            block.device_ops += 1
            block.submissions += not in_graph
    return block


def _loop(thunk: _Thunk, moved: Moved, in_graph: bool) -> Loop:
    found = moved.hlo.loops.get(thunk.name)
    trip = None if found is None else found.trip
    parts = {}
    for role in ("condition", "body"):
        children = [child for child in thunk.children if child.role == role]
        skipped = role == "condition" and trip is not None
        parts[role] = Block() if skipped else _block(children, moved, in_graph)
    if found is None:
        return Loop(thunk.name, "", None, **parts, in_graph=in_graph)
    parts["body"].moved_bytes = moved.by(found.body)
    if trip is None:
        parts["condition"].moved_bytes = moved.by(found.condition)
    return Loop(thunk.name, found.path, trip, **parts, in_graph=in_graph)
