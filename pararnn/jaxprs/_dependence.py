"""The dependence of a jaxpr's outputs on its inputs, by abstract interpretation.

Calls and control flow are interpreted here; the rules of all other primitives are in `_rules.py` or
are registered. Outputs without a derivative (integers, booleans) are dropped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._patterns import Pattern, TooDenseError, num_rows, rows, union, union_over
from ._registry import carry
from ._walk import called, scan_parts, walk_independent


def interpret(jaxpr: Any, inputs: Sequence[Pattern]) -> list[Pattern]:
    """The patterns of the outputs of `jaxpr` from those of its inputs."""
    return walk_independent(jaxpr, inputs, _rule, nothing=None)


def _rule(eqn: Any, patterns: list[Pattern]) -> Sequence[Pattern]:
    if all(p is None for p in patterns):
        return [None] * len(eqn.outvars)
    if eqn.effects:  # such as writing to a reference, which carries dependence out of the jaxpr
        raise TooDenseError
    call = called(eqn)
    if call is not None:
        outputs = interpret(call.jaxpr, call.args(patterns))
    else:
        outputs = _CONTROL_FLOW.get(eqn.primitive.name, carry)(eqn, patterns)
    pairs = zip(eqn.outvars, outputs, strict=True)
    return [p if jnp.issubdtype(v.aval.dtype, jnp.inexact) else None for v, p in pairs]


def reaches(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the flagged inputs, under `jax.vmap` too."""

    def rule(eqn, flags):
        call = called(eqn, plain=True)
        if call is None:
            return [any(flags)] * len(eqn.outvars)
        return reaches(call.jaxpr, call.args(flags))

    return walk_independent(jaxpr, flags, rule, nothing=False)


# --- control flow -------------------------------------------------------------------------------


def _fixed_point(body: Callable[[list[Pattern]], list[Pattern]], carry: list[Pattern]):
    """The least patterns of a loop's carry to which one more iteration adds nothing."""
    while True:
        grown = [union(pair) for pair in zip(carry, body(carry), strict=True)]
        if [0 if p is None else p.nnz for p in grown] == [0 if p is None else p.nnz for p in carry]:
            return carry
        carry = grown


def _scan(eqn, patterns):
    num_consts, num_carry = scan_parts(eqn)
    consts = patterns[:num_consts]
    carry = patterns[num_consts : num_consts + num_carry]
    length = eqn.params["length"]
    if length == 0:
        return [*carry, *(None for _ in eqn.outvars[num_carry:])]
    # One pattern for all iterations: the union of those of all slices.
    slices = [
        None if p is None else union_over(p, (length, num_rows(p) // length), (0,))
        for p in patterns[num_consts + num_carry :]
    ]
    jaxpr = eqn.params["jaxpr"]

    def body(carry):
        return interpret(jaxpr, [*consts, *carry, *slices])[:num_carry]

    carry = _fixed_point(body, carry)
    ys = interpret(jaxpr, [*consts, *carry, *slices])[num_carry:]
    stacked = [None if p is None else rows(p, np.tile(np.arange(num_rows(p)), length)) for p in ys]
    return [*carry, *stacked]


def _while(eqn, patterns):
    skip, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = patterns[skip : skip + num_consts], patterns[skip + num_consts :]
    jaxpr = eqn.params["body_jaxpr"]
    return _fixed_point(lambda carry: interpret(jaxpr, [*consts, *carry]), carry)


def _cond(eqn, patterns):
    branches = [interpret(b, patterns[1:]) for b in eqn.params["branches"]]
    return [union(outs) for outs in zip(*branches, strict=True)]


_CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}
