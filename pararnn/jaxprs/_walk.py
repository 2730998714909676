"""Traversing a jaxpr: the jaxprs inside its equations, and evaluation in any domain.

A domain is a set of values: arrays, patterns of dependence, or flags. `walk` stores the values of
the variables, and a rule evaluates an equation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.extend.core as jex_core
import jax.numpy as jnp

_V = TypeVar("_V")

# Primitives that evaluate the one jaxpr inside them at their operands. They are listed by name:
# matching shapes do not show that a jaxpr is called once.
_PLAIN_CALLS = frozenset(
    "jit pjit closed_call core_call eval_jaxpr checkpoint remat remat2".split()
)
# Likewise, but transformations follow rules of their own, or platforms replace the jaxpr.
_CUSTOM_CALLS = frozenset(
    "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call custom_dce_call "
    "custom_partitioning custom_linear_solve linear_call composite".split()
)
LOOPS = frozenset({"cond", "scan", "while"})
# Primitives whose jaxprs are evaluated: a user's rule for them would never be called.
ENTERED = _PLAIN_CALLS | _CUSTOM_CALLS | LOOPS


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and the constants of a jaxpr, closed or open."""
    closed = isinstance(jaxpr, jex_core.ClosedJaxpr)
    return (jaxpr.jaxpr, jaxpr.consts) if closed else (jaxpr, ())


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation, closed or open."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
                found.append(item)
    return found


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, and those of the jaxprs inside them."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


class Call(NamedTuple):
    """A jaxpr that an equation calls, closed or open, and the indices of the operands it takes."""

    jaxpr: Any
    operands: Sequence[int]

    def args(self, ins: Sequence[_V]) -> list[_V]:
        """The jaxpr's arguments among the values of the equation's operands."""
        return [ins[i] for i in self.operands]


def called(eqn: Any, *, plain: bool = False) -> Call | None:
    """The call of an equation that only calls a jaxpr, or `None` for other equations.

    **Arguments:**

    - `eqn`: the equation.
    - `plain`: whether to exclude primitives with transformation rules of their own, such as
        `custom_jvp_call`: under `jax.vmap`, say, they may compute something else than their jaxpr.
    """
    name = eqn.primitive.name
    if name not in (_PLAIN_CALLS if plain else _PLAIN_CALLS | _CUSTOM_CALLS):
        return None
    call = _linear_solve(eqn) if name == "custom_linear_solve" else _whole_call(eqn)
    if call is None:
        return None
    jaxpr, _ = open_jaxpr(call.jaxpr)
    fits = _shapes(call.args(eqn.invars)) == _shapes(jaxpr.invars)
    return call if fits and _shapes(eqn.outvars) == _shapes(jaxpr.outvars) else None


def _whole_call(eqn: Any) -> Call | None:
    inner = inner_jaxprs(eqn)
    return Call(inner[0], range(len(eqn.invars))) if len(inner) == 1 else None


def _linear_solve(eqn: Any) -> Call:
    """The call of the solution: its operands are its own constants, the third group of four, and
    the right-hand sides, which come last."""
    lengths = eqn.params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    start = before + lengths.solve + lengths.transpose_solve
    operands = [*range(before, before + lengths.solve), *range(start, len(eqn.invars))]
    return Call(eqn.params["jaxprs"].solve, operands)


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(a.aval, "shape", None) for a in atoms]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan; the other operands are slices.

    Derived from ranks, as the parameters differ between supported versions of JAX: only slices lose
    an axis in the body, and only stacked results gain one.
    """
    body, _ = open_jaxpr(eqn.params["jaxpr"])

    def whole(outer, inner):
        pairs = zip(outer, inner, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    num_carry = whole(eqn.outvars, body.outvars)
    return whole(eqn.invars, body.invars) - num_carry, num_carry


# --- the walk -----------------------------------------------------------------------------------


def walk(
    jaxpr: Any,
    inputs: Sequence[_V],
    rule: Callable[[Any, list[_V]], Sequence[_V]],
    *,
    literal: Callable[[Any], _V],
    consts: Sequence[_V],
) -> list[_V]:
    """Evaluates a jaxpr, equation after equation.

    **Arguments:**

    - `jaxpr`: an open jaxpr.
    - `inputs`: the values of its inputs, in any domain.
    - `rule`: `rule(eqn, ins) -> outs`, from the values of an equation's operands to those of its
        results.
    - `literal`: the value of a literal.
    - `consts`: the values of the jaxpr's constants.
    """
    values: dict[Any, _V] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return literal(atom) if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        outs = rule(eqn, [read(a) for a in eqn.invars])
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def walk_independent(
    jaxpr: Any,
    inputs: Sequence[_V],
    rule: Callable[[Any, list[_V]], Sequence[_V]],
    *,
    nothing: _V,
) -> list[_V]:
    """`walk` over a jaxpr, closed or open, in a domain of dependence: constants and literals are
    `nothing`."""
    opened, _ = open_jaxpr(jaxpr)
    consts = [nothing] * len(opened.constvars)
    return walk(opened, inputs, rule, literal=lambda _: nothing, consts=consts)


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    rule: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """`walk` over an open jaxpr in the domain of arrays. Calls are inlined; `rule` evaluates all
    other equations."""

    def enter(eqn, ins):
        call = called(eqn)
        if call is None:
            return rule(eqn, ins)
        return evaluate(*open_jaxpr(call.jaxpr), call.args(ins), rule)

    return walk(jaxpr, args, enter, literal=_array, consts=consts)


def _array(literal: Any) -> Any:
    return jnp.asarray(literal.val, getattr(literal.aval, "dtype", None))


def evaluate_alone(eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
    """The results of one equation, evaluated by JAX as a jaxpr of its own."""
    known = {v: x for v, x in zip(eqn.invars, ins, strict=True) if isinstance(v, jex_core.Var)}
    alone = jex_core.Jaxpr(
        [],
        list(known),
        eqn.outvars,
        [eqn],
        effects=eqn.effects,
        debug_info=jex_core.DebugInfo("evaluate_alone", eqn.primitive.name, None, None),
    )
    return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(alone, ()))(*known.values())
