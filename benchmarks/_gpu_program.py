"""A program that XLA compiled for a GPU, read from its texts: what is launched, and in which loops.

Two texts tell it: the list of *thunks*, which is what the host launches one by one, and the
optimised HLO, which has the sizes. A program is a `Block`: what one execution of it takes, its
loops aside, and the loops.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ._gpu_bytes import Moved
from ._hlo import read_hlo


@dataclasses.dataclass
class Block:
    """Operations that run one after another.

    - `device_ops`: kernels, copies and library calls.
    - `submissions`: what the host launches one by one; a CUDA graph is one.
    - `moved_bytes`: operands and results of every operation; see `_gpu_bytes`.
    - `loops`: the loops among them, whose operations are not included above.
    """

    device_ops: int = 0
    submissions: int = 0
    moved_bytes: int = 0
    loops: "list[Loop]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Loop:
    """A `while` loop. Without a static number of turns (`trip`), the host waits in every turn for
    the condition, and once more at the end, unless the loop is part of a CUDA graph."""

    name: str
    path: str  # where JAX says that it comes from
    trip: int | None
    condition: Block
    body: Block
    in_graph: bool = False


class Totals(NamedTuple):
    """What a run takes: the sums of the fields of `Block`, and how often the host reads the
    condition of a loop."""

    device_ops: float = 0.0
    submissions: float = 0.0
    moved_bytes: float = 0.0
    reads: float = 0.0

    def plus(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


def totals(
    block: Block, turns: Callable[[Loop], float] = lambda _: math.nan, executions: float = 1.0
) -> Totals:
    """What a run takes in all.

    **Arguments:**

    - `block`: the program.
    - `turns`: how often a loop without a static number of turns turns in the whole run; NaN where
        this is not known, and then the figures are.
    - `executions`: how often the block is executed.
    """
    found = Totals(
        executions * block.device_ops,
        executions * block.submissions,
        executions * block.moved_bytes,
    )
    for loop in block.loops:
        if loop.trip is not None:  # nobody reads the condition
            found = found.plus(totals(loop.body, turns, executions * loop.trip))
            continue
        turned = turns(loop)
        reads = executions + turned
        found = found.plus(Totals(reads=0.0 if loop.in_graph else reads))
        found = found.plus(totals(loop.condition, turns, reads))
        found = found.plus(totals(loop.body, turns, turned))
    return found


def all_loops(block: Block, depth: int = 0) -> Iterator[tuple[int, Loop]]:
    """All loops, the outer ones first, with their depths."""
    for loop in block.loops:
        yield depth, loop
        yield from all_loops(loop.condition, depth + 1)
        yield from all_loops(loop.body, depth + 1)


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


class Kernel(NamedTuple):
    """A device operation as it is listed, once: its name, the kind of thunk, whether it is part of
    a CUDA graph."""

    name: str
    kind: str
    in_graph: bool


def read_program(thunks: str, metadata: str, hlo: str) -> tuple[Block, list[Kernel]]:
    """The program, and its device operations as they are listed.

    **Arguments:**

    - `thunks`, `metadata`: as XLA dumps them.
    - `hlo`: the optimised HLO.
    """
    found = re.findall(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)', metadata)
    names = {int(number): name for name, number in found}
    moved = Moved(read_hlo(hlo))
    kernels: list[Kernel] = []
    root = _block([_tree(thunks, names)], moved, kernels, False)
    root.moved_bytes = moved.by(moved.hlo.entry)
    return root, kernels


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


def _block(thunks: list[_Thunk], moved: Moved, kernels: list[Kernel], in_graph: bool) -> Block:
    block = Block()
    for thunk in thunks:
        if thunk.kind == "kWhile":
            block.loops.append(_loop(thunk, moved, kernels, in_graph))
        elif thunk.kind in _HOLDERS:
            graph = thunk.kind == "kCommandBuffer"
            inner = _block(thunk.children, moved, kernels, in_graph or graph)
            block.device_ops += inner.device_ops
            block.submissions += 1 if graph and not in_graph else inner.submissions
            block.loops += inner.loops
        else:
            kernels.append(Kernel(thunk.name, thunk.kind, in_graph))
            block.device_ops += 1
            block.submissions += not in_graph
    return block


def _loop(thunk: _Thunk, moved: Moved, kernels: list[Kernel], in_graph: bool) -> Loop:
    found = moved.hlo.loops.get(thunk.name)
    trip = None if found is None else found.trip
    parts = {}
    for role in ("condition", "body"):
        children = [child for child in thunk.children if child.role == role]
        skipped = role == "condition" and trip is not None
        parts[role] = Block() if skipped else _block(children, moved, kernels, in_graph)
    if found is None:
        return Loop(thunk.name, "", None, **parts, in_graph=in_graph)
    parts["body"].moved_bytes = moved.by(found.body)
    if trip is None:
        parts["condition"].moved_bytes = moved.by(found.condition)
    return Loop(thunk.name, found.path, trip, **parts, in_graph=in_graph)
