"""Walking through a jaxpr: what its equations hold inside, and evaluating it in any domain.

A domain may be that of arrays, of patterns of dependence, or of flags: `walk` keeps the values of
the variables, and a rule says what an equation makes of its operands.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.extend.core as jex_core
import jax.numpy as jnp

_V = TypeVar("_V")

# Primitives whose value is that of the one jaxpr that they hold, at their operands. They are known
# by their names: that a jaxpr has the shapes of an equation does not tell that it is called once.
_PLAIN_CALLS = frozenset(
    "jit pjit closed_call core_call eval_jaxpr checkpoint remat remat2".split()
)
# These are transformed by rules of their own, or replaced on some platforms.
_CUSTOM_CALLS = frozenset(
    "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call custom_dce_call "
    "custom_partitioning custom_linear_solve linear_call composite".split()
)
LOOPS = frozenset({"cond", "scan", "while"})
# Primitives that the walks enter: a rule of somebody's own for them would not be asked.
ENTERED = _PLAIN_CALLS | _CUSTOM_CALLS | LOOPS


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, closed or open, without its constants, and these."""
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
    """A jaxpr that is called, closed or open, and which operands of the equation it takes."""

    jaxpr: Any
    operands: Sequence[int]

    def args(self, ins: Sequence[_V]) -> list[_V]:
        """What the jaxpr takes of the values of the equation's operands."""
        return [ins[i] for i in self.operands]


def called(eqn: Any, *, plain: bool = False) -> Call | None:
    """What an equation merely calls, or `None` if it does something else.

    **Arguments:**

    - `eqn`: the equation.
    - `plain`: whether to leave out what is transformed by rules of its own, such as
        `custom_jvp_call`: under `jax.vmap`, say, it may do more than its jaxpr tells.
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
    """Of the constants of four functions, and the right-hand sides after them, the solution takes
    its own constants and the right-hand sides."""
    lengths = eqn.params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    start = before + lengths.solve + lengths.transpose_solve
    operands = [*range(before, before + lengths.solve), *range(start, len(eqn.invars))]
    return Call(eqn.params["jaxprs"].solve, operands)


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(a.aval, "shape", None) for a in atoms]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many constants, and how many carried values, a scan has; the rest are slices.

    The parameters that tell differ between versions of JAX. Only slices lose an axis on their way
    into the body, and only stacked results gain one on their way out.
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
    """The values of the outputs of a jaxpr, equation after equation.

    **Arguments:**

    - `jaxpr`: an open jaxpr.
    - `inputs`: the values of its inputs, in whichever domain.
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
    """`walk` over a jaxpr, closed or open, in a domain where constants and literals are all
    `nothing`: what they depend on."""
    opened, _ = open_jaxpr(jaxpr)
    consts = [nothing] * len(opened.constvars)
    return walk(opened, inputs, rule, literal=lambda _: nothing, consts=consts)


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    rule: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """`walk` over an open jaxpr in the domain of arrays. What equations merely call is entered, so
    that `rule` is asked for all others."""

    def enter(eqn, ins):
        call = called(eqn)
        if call is None:
            return rule(eqn, ins)
        return evaluate(*open_jaxpr(call.jaxpr), call.args(ins), rule)

    return walk(jaxpr, args, enter, literal=_array, consts=consts)


def _array(literal: Any) -> Any:
    return jnp.asarray(literal.val, getattr(literal.aval, "dtype", None))


def evaluate_alone(eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
    """The results of one equation, which JAX evaluates as a jaxpr of its own."""
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
