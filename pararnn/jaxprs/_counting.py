"""Operations and bytes of a function, counted in its jaxpr, and the trip counts of its loops.

XLA's own `compiled.cost_analysis()` counts the body of every loop once (seen in JAX 0.10.2), so it
says nothing of a recurrence. `pararnn.benchmark` reports what is counted here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import jax.tree_util as jtu

from ._primitives import Cost, Kind, primitive
from ._walk import LOOPS, called, evaluate, evaluate_alone, inner_jaxprs, open_jaxpr, scan_parts


class Counts(NamedTuple):
    """The cost of one call of a function.

    - `flops`: one for each element that an arithmetic primitive or a function such as `tanh`
        computes, two for each multiply-add of a product. Comparisons, integer arithmetic and moves
        count nothing.
    - `bytes`: the operands and results of every primitive, each read or written once, as if XLA
        fused nothing: an upper bound on the traffic.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Counts") -> "Counts":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Counts(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Counts":
        return Counts(factor * self.flops, factor * self.bytes)


def count(function: Callable[..., Any], *args: Any) -> Counts:
    """Counts the operations and bytes of `function(*args)`.

    The body of a scan counts once per step. The trip counts of `while` loops are observed: the
    function is run once with counters in its loops. The most expensive branch of a `cond` counts,
    and nothing inside a Pallas kernel.

    **Arguments:**

    - `function`, `args`: pytrees of arrays and anything else, which is static.
    """
    jaxpr, trips = _observed(function, args)
    return _count(jaxpr, 1.0, iter(trips))


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The operations of `function(*args)`, as `count` has them; of a `while` loop, one turn.

    **Arguments:**

    - `function`, `args`: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, 1.0, itertools.repeat(1)).flops


def loop_turns(function: Callable[..., Any], *args: Any) -> list[tuple[str, int]]:
    """The total number of iterations of each `while` loop in a run of `function(*args)`.

    **Arguments:**

    - `function`, `args`: as for `count`.

    **Returns:**

    Pairs of a path and the number of iterations. The path has the names of the scopes
    (`jax.named_scope`) and of the transformations around the loop, and `while` for the loop itself
    and for each loop or scan around it.
    """
    jaxpr, trips = _observed(function, args)
    return list(zip(_loop_paths(jaxpr, ""), trips, strict=True))


def _observed(function: Callable[..., Any], args: Any) -> tuple[Any, list[int]]:
    """The function's jaxpr, and the trip counts of its `while` loops."""
    arrays, static = eqx.partition(args, eqx.is_array)

    def on_arrays(arrays):
        return eqx.filter(function(*eqx.combine(arrays, static)), eqx.is_array)

    closed = jax.make_jaxpr(on_arrays)(arrays)
    if not _num_loops(closed.jaxpr):
        return closed.jaxpr, []
    # Constants are passed as arguments, so that XLA does not embed them in the program.
    observed = jax.jit(lambda consts, xs: _run(closed.jaxpr, consts, xs)[1])
    return closed.jaxpr, [int(n) for n in observed(closed.consts, jtu.tree_leaves(arrays))]


# --- the walk -----------------------------------------------------------------------------------
# `_run`, `_count` and `_loop_paths` visit the `while` loops in the same order.


def _entered(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation that are visited, in order."""
    call = called(eqn)
    if call is not None:
        return [call.jaxpr]
    return inner_jaxprs(eqn) if eqn.primitive.name in LOOPS else []


def _num_loops(jaxpr: Any) -> int:
    """The number of `while` loops that are visited."""
    eqns = open_jaxpr(jaxpr)[0].eqns
    own = sum(eqn.primitive.name == "while" for eqn in eqns)
    return own + sum(_num_loops(inner) for eqn in eqns for inner in _entered(eqn))


def _loop_paths(jaxpr: Any, outer: str) -> Iterator[str]:
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        path = f"{outer}/{eqn.source_info.name_stack}".rstrip("/")
        if eqn.primitive.name in ("scan", "while"):
            path += "/while"
        if eqn.primitive.name == "while":
            yield path
        for inner in _entered(eqn):
            yield from _loop_paths(inner, path)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Evaluates a jaxpr. Returns its outputs, and the total trip count of each `while` loop."""
    trips: list[Any] = []

    def rule(eqn, ins):
        name, repeats = eqn.primitive.name, any(map(_num_loops, _entered(eqn)))
        if name == "while":
            outs, turned = _run_while(eqn.params, ins)
        elif name == "scan" and repeats:
            outs, turned = _run_scan(eqn, ins)
        elif name == "cond" and repeats:
            outs, turned = _run_cond(eqn.params, ins)
        else:
            return evaluate_alone(eqn, ins)
        trips.extend(turned)
        return outs

    return evaluate(jaxpr, consts, args, rule), trips


def _run_while(params: Any, ins: list[Any]) -> tuple[list[Any], list[Any]]:
    test, test_consts = open_jaxpr(params["cond_jaxpr"])
    body, body_consts = open_jaxpr(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]
    inner = _num_loops(test) + _num_loops(body)

    def decide(values):
        (go,), trips = _run(test, test_consts, [*ins[:n], *values])
        return go, trips

    def turn(carry):
        trips, values = carry
        go, test_trips = decide(values)
        new, body_trips = _run(body, body_consts, [*ins[n : n + m], *values])
        # Under `vmap` the test has leading axes: members that have ended keep their values.
        values = [
            jnp.where(_expand(go, old.ndim), x, old) for x, old in zip(new, values, strict=True)
        ]
        return [a + b for a, b in zip(trips, [1, *test_trips, *body_trips], strict=True)], values

    trips, values = jax.lax.while_loop(
        lambda carry: jnp.any(decide(carry[1])[0]),
        turn,
        ([jnp.asarray(0)] * (1 + inner), ins[n + m :]),
    )
    return values, trips


def _expand(flags: Any, ndim: int) -> Any:
    return jnp.expand_dims(flags, tuple(range(flags.ndim, ndim)))


def _run_scan(eqn: Any, ins: list[Any]) -> tuple[list[Any], list[Any]]:
    params = eqn.params
    body, consts = open_jaxpr(params["jaxpr"])
    n, m = scan_parts(eqn)

    def turn(carry, x):
        outs, trips = _run(body, consts, [*ins[:n], *carry, *x])
        return outs[:m], (outs[m:], trips)

    carry, (ys, trips) = jax.lax.scan(
        turn, ins[n : n + m], ins[n + m :], length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *ys], [jnp.sum(t) for t in trips]


def _run_cond(params: Any, ins: list[Any]) -> tuple[list[Any], list[Any]]:
    branches = params["branches"]
    numbers = [_num_loops(branch) for branch in branches]

    def make(k):
        def run(args):
            outs, trips = _run(*open_jaxpr(branches[k]), args)
            others = [[jnp.asarray(0)] * n for n in numbers]
            return outs, sum([*others[:k], trips, *others[k + 1 :]], [])

        return run

    return jax.lax.switch(ins[0], [make(k) for k in range(len(branches))], ins[1:])


def _count(jaxpr: Any, times: float, trips: Iterator[int]) -> Counts:
    total = Counts(0.0, 0.0)
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        call = called(eqn)
        if call is not None:
            total += _count(open_jaxpr(call.jaxpr)[0], times, trips)
        elif name == "scan":
            num_consts, num_carry = scan_parts(eqn)
            sliced = [*eqn.invars[num_consts + num_carry :], *eqn.outvars[num_carry:]]
            total += Counts(0.0, float(sum(map(_bytes, sliced)))).times(times)
            total += _count(open_jaxpr(params["jaxpr"])[0], times * params["length"], trips)
        elif name == "while":
            turns = float(next(trips))
            for part in ("cond_jaxpr", "body_jaxpr"):
                total += _count(open_jaxpr(params[part])[0], turns, trips)
        elif name == "cond":
            branches = [_count(open_jaxpr(j)[0], times, trips) for j in params["branches"]]
            total += Counts(*map(max, zip(*branches, strict=True)))
        else:
            total += _primitive(eqn).times(times)
    return total


# --- primitives ---------------------------------------------------------------------------------


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _bytes(var: Any) -> int:
    if isinstance(var, jex_core.Literal) or not hasattr(var.aval, "dtype"):
        return 0
    return _size(var) * getattr(var.aval.dtype, "itemsize", 0)


def _primitive(eqn: Any) -> Counts:
    name, outs = eqn.primitive.name, eqn.outvars
    row = primitive(name)
    inexact = any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in outs if _bytes(v))
    written = float(sum(map(_bytes, outs)))
    if row.cost is Cost.FREE:
        return Counts(0.0, 0.0)
    if row.cost is Cost.SLICE:
        return Counts(0.0, 2 * written)
    if row.cost is Cost.UPDATE:
        update = eqn.invars[1 if name == "dynamic_update_slice" else 2]
        adds = _size(update) if row.kind is Kind.REDUCTION and inexact else 0
        return Counts(float(adds), 2.0 * _bytes(update))
    moved = sum(map(_bytes, eqn.invars)) + written
    computes = row.cost is Cost.COMPUTE and inexact
    return Counts(_arithmetic(eqn, row.kind) if computes else 0.0, moved)


def _arithmetic(eqn: Any, kind: Kind) -> float:
    """The floating-point operations of a primitive that computes."""
    name, outs = eqn.primitive.name, eqn.outvars
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        return 2.0 * depth * _size(outs[0])
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * _size(outs[0]) * math.prod(kernel) / channels
    if kind in (Kind.REDUCTION, Kind.CUMULATIVE) or name == "reduce":
        return float(_size(eqn.invars[0]))
    return float(sum(map(_size, outs)))
