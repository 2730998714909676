"""How the primitives of a jaxpr carry "which state elements may this element depend on".

A pattern is a boolean CSR matrix (elements of a value × elements of the state), or `None` where
nothing depends on the state. The rules are sound: a pattern may be larger than the true one, never
smaller. A primitive that is not known makes each of its outputs depend on all that its inputs
depend on.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

Pattern = sp.csr_array | None
# Patterns beyond this many entries are not worth their time: dense.
_MAX_ENTRIES = 5_000_000


class TooDenseError(Exception):
    """The analysis ended early: the state is not worth (or not capable of) being split."""


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _index(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def _num_rows(pattern: sp.csr_array) -> int:
    # SciPy has no annotations: its `shape` is inferred from the base class's initial `None`.
    return pattern.shape[0]  # pyright: ignore[reportOptionalSubscript]


def _checked(pattern: sp.csr_array) -> sp.csr_array:
    if pattern.nnz > _MAX_ENTRIES:
        raise TooDenseError
    return pattern


def _rows(pattern: sp.csr_array, index: np.ndarray) -> sp.csr_array:
    """Output element `i` depends on what element `index[i]` of the input depends on."""
    return _checked(pattern[index.reshape(-1)])


def _union(patterns: Sequence[Pattern]) -> Pattern:
    known = [p for p in patterns if p is not None]
    return _checked(functools.reduce(lambda a, b: a + b, known)) if known else None


def _union_over(pattern: sp.csr_array, shape: Sequence[int], axes: Sequence[int]) -> sp.csr_array:
    """The union along `axes` of a value of shape `shape`, which lose these axes."""
    kept = [n for i, n in enumerate(shape) if i not in axes]
    target = np.expand_dims(_index(kept), tuple(axes))
    target = np.broadcast_to(target, shape).reshape(-1)
    ones = np.ones(target.size, bool)
    gather = sp.csr_array(
        (ones, (target, np.arange(target.size))), shape=(math.prod(kept), target.size)
    )
    return _checked(sp.csr_array(gather @ pattern, dtype=bool))


def _all_to_all(patterns: Sequence[Pattern], out_size: int) -> Pattern:
    """Each output element depends on everything that any input element depends on."""
    known = [_union_over(p, (_num_rows(p),), (0,)) for p in patterns if p is not None]
    total = _union(known)
    return None if total is None else _rows(total, np.zeros(out_size, int))


# --- primitives -------------------------------------------------------------------------------
# Each rule maps (equation, input patterns), at least one of which is not None, to one output
# pattern; rules with several outputs follow further down. Outputs that cannot carry a derivative
# (integers, booleans) are dropped beforehand.

# Derivatives are linear in the tangent, but loop bodies and untraced rules may mix in any of these.
_ELEMENTWISE = (
    "add add_any sub mul div neg max min select_n clamp convert_element_type reduce_precision copy "
    "real imag conj complex abs sign pow integer_pow square sqrt rsqrt exp log tanh logistic"
).split()


def _elementwise(eqn, patterns):
    shape = eqn.outvars[0].aval.shape

    def broadcast(pattern, var):  # operands may be scalars or have axes of size 1
        if pattern is None or var.aval.shape == shape:
            return pattern
        return _rows(pattern, np.broadcast_to(_index(var.aval.shape), shape))

    return _union([broadcast(p, v) for p, v in zip(patterns, eqn.invars, strict=True)])


def _reshape(eqn, patterns):
    return (
        _all_to_all(patterns, _size(eqn.outvars[0]))
        if eqn.params.get("dimensions")
        else patterns[0]
    )


def _moved(move: Callable[[np.ndarray, dict[str, Any]], np.ndarray]):
    def rule(eqn, patterns):
        return _rows(patterns[0], move(_index(eqn.invars[0].aval.shape), eqn.params))

    return rule


def _broadcast(index, params):
    shape = params["shape"]
    aligned = [1] * len(shape)
    for axis, dim in zip(params["broadcast_dimensions"], index.shape, strict=True):
        aligned[axis] = dim
    return np.broadcast_to(index.reshape(aligned), shape)


def _slice(index, params):
    strides = params["strides"] or (1,) * index.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return index[tuple(slice(*b) for b in bounds)]


def _stack(eqn, patterns):
    return _joined(eqn, patterns, lambda pieces: np.stack(pieces, eqn.params["axis"]))


def _concatenate(eqn, patterns):
    return _joined(eqn, patterns, lambda pieces: np.concatenate(pieces, eqn.params["dimension"]))


def _joined(eqn, patterns, join):
    width = next(p.shape[1] for p in patterns if p is not None)
    stacked = [
        sp.csr_array((_size(v), width), dtype=bool) if p is None else p
        for v, p in zip(eqn.invars, patterns, strict=True)
    ]
    offsets = np.cumsum([0, *map(_size, eqn.invars)])
    pieces = [_index(v.aval.shape) + o for v, o in zip(eqn.invars, offsets, strict=False)]
    return _rows(sp.csr_array(sp.vstack(stacked, format="csr")), join(pieces))


def _pad(eqn, patterns):
    operand, fill = patterns
    if fill is not None:
        return _all_to_all(patterns, _size(eqn.outvars[0]))
    shape = eqn.invars[0].aval.shape
    index = np.full(eqn.outvars[0].aval.shape, operand.shape[0])
    source: list[Any] = []
    target: list[Any] = []
    for (low, _, interior), n, m in zip(
        eqn.params["padding_config"], shape, index.shape, strict=True
    ):
        where = low + np.arange(n) * (interior + 1)
        inside = (where >= 0) & (where < m)
        source.append(np.arange(n)[inside])
        target.append(where[inside])
    index[np.ix_(*target)] = _index(shape)[np.ix_(*source)]
    empty = sp.csr_array((1, operand.shape[1]), dtype=bool)
    return _rows(sp.csr_array(sp.vstack([operand, empty], format="csr")), index)


def _reduction(eqn, patterns):
    return _union_over(patterns[0], eqn.invars[0].aval.shape, eqn.params["axes"])


def _cumulative(eqn, patterns):
    shape, axis = eqn.invars[0].aval.shape, eqn.params["axis"]
    reduced = _union_over(patterns[0], shape, (axis,))
    kept = np.expand_dims(_index([n for i, n in enumerate(shape) if i != axis]), axis)
    return _rows(reduced, np.broadcast_to(kept, shape))


def _dot_general(eqn, patterns):
    """Union over the contracted axes, then a broadcast along the other operand's free axes."""
    contract, batch = eqn.params["dimension_numbers"]
    out_shape = eqn.outvars[0].aval.shape
    num_batch = len(batch[0])
    ranks = [len(v.aval.shape) for v in eqn.invars]
    free = [
        [i for i in range(ranks[s]) if i not in contract[s] and i not in batch[s]] for s in (0, 1)
    ]
    results: list[Pattern] = []
    for side, pattern in enumerate(patterns):
        if pattern is None:
            continue
        shape = eqn.invars[side].aval.shape
        reduced = _union_over(pattern, shape, contract[side])
        kept = [i for i in range(ranks[side]) if i not in contract[side]]
        index = _index([shape[i] for i in kept])
        index = index.transpose([kept.index(i) for i in (*batch[side], *free[side])])
        other = len(free[1 - side])
        start = num_batch if side == 1 else index.ndim
        index = np.expand_dims(index, tuple(range(start, start + other)))
        results.append(_rows(reduced, np.broadcast_to(index, out_shape)))
    return _union(results)


def _split(eqn, patterns):
    index = _index(eqn.invars[0].aval.shape)
    cuts = np.cumsum(eqn.params["sizes"])[:-1]
    return [_rows(patterns[0], piece) for piece in np.split(index, cuts, eqn.params["axis"])]


_RULES: dict[str, Callable[[Any, list[Any]], Pattern]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "reshape": _reshape,
    "squeeze": lambda eqn, patterns: patterns[0],
    "expand_dims": lambda eqn, patterns: patterns[0],
    "transpose": _moved(lambda index, params: index.transpose(params["permutation"])),
    "rev": _moved(lambda index, params: np.flip(index, params["dimensions"])),
    "broadcast_in_dim": _moved(_broadcast),
    "slice": _moved(_slice),
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "dot_general": _dot_general,
    **dict.fromkeys("reduce_sum reduce_max reduce_min reduce_prod".split(), _reduction),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _cumulative),
}


# --- several outputs: control flow and splits -------------------------------------------------


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex_core.ClosedJaxpr) else jaxpr


def _fixed_point(body: Callable[[list[Pattern]], list[Pattern]], carry: list[Pattern]):
    """Grows the patterns of a loop's carry until one more turn adds nothing."""
    while True:
        grown = [_union(pair) for pair in zip(carry, body(carry), strict=True)]
        if [0 if p is None else p.nnz for p in grown] == [0 if p is None else p.nnz for p in carry]:
            return carry
        carry = grown


def scan_parts(eqn) -> tuple[int, int]:
    """How many constants, and how many carried values, a scan has; the rest are slices.

    The parameters that tell differ between versions of JAX. Only slices lose an axis on their way
    into the body, and only stacked results gain one on their way out.
    """
    body = _open(eqn.params["jaxpr"])

    def whole(outer, inner):
        pairs = zip(outer, inner, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    num_carry = whole(eqn.outvars, body.outvars)
    return whole(eqn.invars, body.invars) - num_carry, num_carry


def _scan(eqn, patterns):
    num_consts, num_carry = scan_parts(eqn)
    consts = patterns[:num_consts]
    carry = patterns[num_consts : num_consts + num_carry]
    length = eqn.params["length"]
    if length == 0:
        return [*carry, *(None for _ in eqn.outvars[num_carry:])]
    # What a slice depends on at one turn, it may depend on at any turn.
    slices = [
        None if p is None else _union_over(p, (length, _num_rows(p) // max(length, 1)), (0,))
        for p in patterns[num_consts + num_carry :]
    ]
    jaxpr = _open(eqn.params["jaxpr"])

    def body(carry):
        return interpret(jaxpr, [*consts, *carry, *slices])[:num_carry]

    carry = _fixed_point(body, carry)
    ys = interpret(jaxpr, [*consts, *carry, *slices])[num_carry:]
    stacked = [
        None if p is None else _rows(p, np.tile(np.arange(_num_rows(p)), length)) for p in ys
    ]
    return [*carry, *stacked]


def _while(eqn, patterns):
    skip, num_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = patterns[skip : skip + num_consts], patterns[skip + num_consts :]
    jaxpr = _open(eqn.params["body_jaxpr"])
    return _fixed_point(lambda carry: interpret(jaxpr, [*consts, *carry]), carry)


def _cond(eqn, patterns):
    branches = [interpret(_open(b), patterns[1:]) for b in eqn.params["branches"]]
    return [_union(outs) for outs in zip(*branches, strict=True)]


CALLS = frozenset("jit pjit closed_call core_call checkpoint remat remat2".split())


def inner_jaxpr(eqn):
    return _open(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))


def _call(eqn, patterns):
    return interpret(inner_jaxpr(eqn), patterns)


_MULTIPLE_OUTPUT_RULES: dict[str, Callable[[Any, list[Any]], Sequence[Pattern]]] = {
    "split": _split,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(CALLS, _call),
}


def interpret(jaxpr: Any, inputs: Sequence[Pattern]) -> list[Pattern]:
    """The patterns of the outputs of `jaxpr` from those of its inputs."""
    env: dict[Any, Pattern] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(var):
        return None if isinstance(var, jex_core.Literal) else env.get(var)

    for eqn in jaxpr.eqns:
        patterns = [read(v) for v in eqn.invars]
        if all(p is None for p in patterns):
            continue
        if eqn.effects:  # for example, writing to a reference: the dependence leaves our sight
            raise TooDenseError
        name = eqn.primitive.name
        if name in _MULTIPLE_OUTPUT_RULES:
            outputs = _MULTIPLE_OUTPUT_RULES[name](eqn, patterns)
        elif name in _RULES:
            outputs = [_RULES[name](eqn, patterns)]
        else:
            outputs = [_all_to_all(patterns, _size(v)) for v in eqn.outvars]
        for var, pattern in zip(eqn.outvars, outputs, strict=True):
            differentiable = jnp.issubdtype(var.aval.dtype, jnp.inexact)
            env[var] = pattern if differentiable else None
    return [read(v) for v in jaxpr.outvars]
