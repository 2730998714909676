"""Walking through jaxprs, and rules for primitives that JAX does not know."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.interpreters import ad, batching, mlir
from systems import normal

import pararnn as prnn
from pararnn.diagnostics._rounding import rounded_anew
from pararnn.jaxprs import _walk
from pararnn.jaxprs._counting import count
from pararnn.jaxprs._dependence import interpret, reaches

H = jnp.linspace(-1.0, 1.0, 6)
X = jnp.zeros(())


# --- primitives of a user's own -------------------------------------------------------------------


def primitive(name, function):
    """A primitive with all that JAX asks for but derivatives; its results are shaped like its
    operands."""
    new = jex_core.Primitive(name)
    many = isinstance(function(H, H), list)
    new.multiple_results = many
    new.def_impl(function)
    new.def_abstract_eval(lambda *avals: [avals[0]] * len(avals) if many else avals[0])
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=many))
    return new


def bilinear(name):
    """The product of two vectors, element by element; in its derivative it stands itself."""
    new = primitive(name, lambda a, b: a * b)
    ad.defbilinear(new, lambda ct, a, b: new.bind(ct, b), lambda ct, a, b: new.bind(a, ct))
    batching.defbroadcasting(new)
    return new


def gated(product):
    """A step that multiplies by the primitive; its Jacobian is diagonal."""
    return lambda h, x: jnp.tanh(product.bind(h, jnp.cos(h)) + x)


def test_a_primitive_without_a_rule_makes_a_step_dense():
    step = gated(bilinear("product_without_a_rule"))
    assert isinstance(prnn.detect_structure(step, H, X), prnn.Dense)


@pytest.fixture(scope="module")
def product():
    new = bilinear("product_with_a_rule")
    prnn.jaxprs.register_rule(new, prnn.jaxprs.elementwise)
    return new


def test_a_rule_is_found(product):
    assert isinstance(prnn.detect_structure(gated(product), H, X), prnn.Diagonal)


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: lambda h, x: jax.lax.scan(lambda h, _: (f(h, x), None), h, length=3)[0],
        lambda f: lambda h, x: jax.lax.cond(h[0] > 0, f, lambda h, x: h, h, x),
        lambda f: lambda h, x: jax.vmap(f, (0, None))(h.reshape(2, 3), x).ravel(),
    ],
    ids=["jit", "checkpoint", "scan", "cond", "vmap"],
)
def test_a_rule_is_found_inside(product, wrap):
    assert isinstance(prnn.detect_structure(wrap(gated(product)), H, X), prnn.Diagonal)


def test_a_step_with_a_rule_is_solved_and_differentiated(product):
    """The rule is what makes the method of a diagonal Jacobian applicable."""
    xs, step = normal(0, (24, 6)), gated(product)

    def loss(solve):
        return lambda xs: jnp.sum(jnp.sin(solve(xs)))

    def by_newton(xs):
        return prnn.solve(step, xs, H, solver=prnn.Newton(chunk_size=4, fallback=False)).states

    def by_scan(xs):
        return jax.lax.scan(lambda h, x: (step(h, x),) * 2, H, xs)[1]

    value, gradient = jax.jit(jax.value_and_grad(loss(by_newton)))(xs)
    expected, true = jax.jit(jax.value_and_grad(loss(by_scan)))(xs)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(gradient, true, atol=1e-9)


def test_a_rule_of_ones_own():
    """A linear primitive that moves each element by three places: elements meet in pairs."""
    shift = primitive("shift_by_three", lambda a, *_: jnp.roll(a, 3))
    ad.deflinear(shift, lambda ct: [jnp.roll(ct, -3)])

    def rule(eqn, patterns):
        assert eqn.primitive is shift
        (pattern,) = patterns
        return [pattern[np.roll(np.arange(pattern.shape[0]), 3)]]

    prnn.jaxprs.register_rule("shift_by_three", rule)  # the name will do
    structure = prnn.detect_structure(lambda h, x: jnp.tanh(h + shift.bind(h)) + x, H, X)
    assert isinstance(structure, prnn.BlockDiagonal)
    assert sorted(map(sorted, structure.groups)) == [[0, 3], [1, 4], [2, 5]]


def test_a_primitive_with_several_results():
    """The rule is asked where an operand depends on the state, with None for the others."""
    both = primitive("sum_and_difference", lambda a, b: [a + b, a - b])
    ad.primitive_jvps[both] = lambda primals, tangents: (
        both.bind(*primals),
        both.bind(*map(ad.instantiate_zeros, tangents)),
    )
    seen = []

    def rule(eqn, patterns):
        seen.append([p is None for p in patterns])
        return prnn.jaxprs.elementwise(eqn, patterns)

    def step(h, x):
        a, b = both.bind(jnp.tanh(h), x * jnp.ones(6))
        return a * b

    assert isinstance(prnn.detect_structure(step, H, X), prnn.Dense)
    prnn.jaxprs.register_rule(both, rule)
    assert isinstance(prnn.detect_structure(step, H, X), prnn.Diagonal)
    assert seen == [[False, True]]


def linear(name, rule):
    """A step with a primitive whose derivative is itself, and the rule that is registered."""
    new = primitive(name, lambda a, *_: 2 * a)
    ad.deflinear(new, lambda ct: [2 * ct])
    prnn.jaxprs.register_rule(new, rule)
    return lambda h, x: new.bind(h) + x


def test_ready_rules():
    step = linear("linear_all_to_all", prnn.jaxprs.all_to_all)
    assert isinstance(prnn.detect_structure(step, H, X), prnn.Dense)
    step = linear("linear_constant", lambda eqn, patterns: [None])
    assert isinstance(prnn.detect_structure(step, H, X), prnn.Diagonal)


def test_stored_zeros_are_no_dependence():
    """A loop counts entries to see whether they still grow: a zero that a rule stores is none."""

    def rule(eqn, patterns):
        true = patterns[0].toarray()[np.roll(np.arange(6), 1)]
        stored = true | np.eye(6, dtype=bool)
        return [sp.csr_array((true[stored], np.nonzero(stored)), shape=(6, 6))]

    inner = linear("linear_stored_zeros", rule)

    def loop(h):
        return jax.lax.fori_loop(0, 9, lambda _, c: inner(c + h, 0.0), jnp.zeros(6))

    (pattern,) = interpret(jax.make_jaxpr(loop)(H), [eye(6)])
    assert pattern is not None
    assert pattern.toarray().all()


# --- what is refused ------------------------------------------------------------------------------


def eye(size, width=6, dtype=bool):
    return sp.csr_array(np.eye(size, width, dtype=dtype))


WRONG = {
    "not a list": (lambda eqn, patterns: patterns[0], "must return a list .* got a csr_array"),
    "nothing": (lambda eqn, patterns: None, "must return a list .* got a NoneType"),
    "too few": (lambda eqn, patterns: [], "each of the 1 results; got 0"),
    "too many": (lambda eqn, patterns: [None, None], "each of the 1 results; got 2"),
    "rows": (lambda eqn, patterns: [eye(5)], r"result 0.*\(6, 6\).*shape \(5, 6\)"),
    "columns": (lambda eqn, patterns: [eye(6, 7)], r"\(6, 6\).*shape \(6, 7\)"),
    "numbers": (lambda eqn, patterns: [eye(6, dtype=float)], "boolean.*dtype float64"),
    "an array": (lambda eqn, patterns: [np.eye(6, dtype=bool)], "got a ndarray"),
    "columns first": (lambda eqn, patterns: [patterns[0].tocsc()], "got a csc_array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_rule_returns_is_checked(name):
    rule, message = WRONG[name]
    step = linear(f"linear_{name}", rule)
    with pytest.raises(ValueError, match=message) as caught:
        prnn.detect_structure(step, H, X)
    assert f"`linear_{name}`" in str(caught.value)


def test_a_rule_that_fails_is_named():
    step = linear("linear_failing", lambda eqn, patterns: [patterns[3]])
    with pytest.raises(IndexError) as caught:
        prnn.solve(step, normal(0, (8, 6)), H, solver=prnn.Newton())
    assert any("`linear_failing`" in note for note in caught.value.__notes__)


def test_elementwise_needs_shapes_that_broadcast():
    total = jex_core.Primitive("linear_total")
    total.def_abstract_eval(lambda aval: jax.core.ShapedArray((), aval.dtype))
    ad.deflinear(total, lambda ct: [ct * jnp.ones(6)])
    prnn.jaxprs.register_rule(total, prnn.jaxprs.elementwise)
    with pytest.raises(ValueError, match=r"`linear_total`.*\(6,\).*\(\)"):
        prnn.detect_structure(lambda h, x: h * total.bind(h), H, X)


@pytest.mark.parametrize("name", ["tanh", "dot_general", "jit", "scan", "custom_jvp_call"])
def test_rules_of_jax_stay(name):
    with pytest.raises(ValueError, match=f"`primitive`.*`{name}` already"):
        prnn.jaxprs.register_rule(name, prnn.jaxprs.elementwise)


def test_a_primitive_has_one_rule(product):
    with pytest.raises(ValueError, match="`primitive`.*`product_with_a_rule` already"):
        prnn.jaxprs.register_rule(product, prnn.jaxprs.all_to_all)


@pytest.mark.usefixtures("as_users_run_it")
def test_arguments_of_a_rule_are_checked():
    with pytest.raises(TypeError, match="`primitive` must be .* got 3"):
        prnn.jaxprs.register_rule(3, prnn.jaxprs.elementwise)
    with pytest.raises(TypeError, match="`rule` must be a function .* got 'elementwise'"):
        prnn.jaxprs.register_rule("no_such_rule", "elementwise")
    with pytest.raises(TypeError, match="`rule` must be a function"):
        prnn.jaxprs.register_rule("no_such_rule", jex_core.Primitive)


# --- the walk -------------------------------------------------------------------------------------


def only_equation(function, *args):
    (eqn,) = jax.make_jaxpr(function)(*args).eqns
    return eqn


def with_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), f(*tangents)))
    return g


def with_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda h: (g(h), None), lambda _, ct: (ct,))
    return g


def with_vmap(f):
    g = jax.custom_batching.custom_vmap(f)
    g.def_vmap(lambda size, batched, h: (f(h), True))
    return g


PLAIN = {"jit": jax.jit, "checkpoint": jax.checkpoint}
CUSTOM = {"custom_jvp": with_jvp, "custom_vjp": with_vjp, "custom_vmap": with_vmap}


@pytest.mark.parametrize("name", [*PLAIN, *CUSTOM])
def test_calls_are_told(name):
    eqn = only_equation({**PLAIN, **CUSTOM}[name](lambda h: jnp.sin(h) * 2), H)
    call = _walk.called(eqn)
    assert call is not None
    assert [e.primitive.name for e in _walk.open_jaxpr(call.jaxpr)[0].eqns] == ["sin", "mul"]
    assert call.args(["operand"]) == ["operand"]
    assert (_walk.called(eqn, plain=True) is None) == (name in CUSTOM)


def joint(a, b):
    """Associative, and nothing that JAX has a reduction for."""
    return a + b + a * b


def reduction(x):
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), joint, (0,))


def test_a_reduction_is_no_call():
    """It holds one jaxpr of two inputs and an output, and has as many itself."""
    eqn = only_equation(lambda x: jax.lax.reduce(x, 0.0, joint, (0,)), H)
    assert eqn.primitive.name == "reduce"
    assert _walk.called(eqn) is None
    assert count(reduction, H).flops == 6
    rounded = rounded_anew(reduction, jnp.uint32(1))(H + 2)
    np.testing.assert_allclose(rounded, jnp.prod(H + 3) - 1, rtol=1e-12)


def test_a_primitive_that_holds_a_jaxpr_is_no_call():
    """Even if all shapes fit: it may call the jaxpr twice."""
    twice = jex_core.Primitive("twice")
    twice.def_abstract_eval(lambda aval, jaxpr: aval)
    twice.def_impl(
        lambda h, jaxpr: jex_core.jaxpr_as_fun(jaxpr)(*jex_core.jaxpr_as_fun(jaxpr)(h))[0]
    )
    inner = jax.make_jaxpr(lambda h: jnp.roll(h, 1))(H)
    eqn = only_equation(lambda h: twice.bind(h, jaxpr=inner), H)
    assert len(_walk.inner_jaxprs(eqn)) == 1
    assert _walk.called(eqn) is None


def linear_solve(weights):
    """Solves by what its constants say, whatever the matrix is."""

    def run(h, c, d):
        def solve(_, b):
            return weights @ (b * d)

        return jax.lax.custom_linear_solve(lambda v: v * c, h, solve, solve)

    return run


def test_a_linear_solve_takes_its_own_constants():
    """Its value depends on the right-hand side, and on what the solution uses."""
    run = linear_solve(jnp.eye(6))
    jaxpr = jax.make_jaxpr(run)(H, H + 2, H + 3)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "custom_linear_solve"]
    call = _walk.called(eqn)
    assert call is not None
    identity = eye(6)
    for given, found in (
        ([identity, None, None], True),
        ([None, identity, None], False),  # only the matrix, which the solution does not look at
        ([None, None, identity], True),
    ):
        (pattern,) = interpret(jaxpr, given)
        assert (pattern is not None) == found


def test_under_vmap_more_may_be_reached():
    """JAX's rules for batches, not the jaxpr, say what becomes a batch."""
    run = linear_solve(jnp.eye(6))
    jaxpr = jax.make_jaxpr(run)(H, H + 2, H + 3)
    reached = reaches(jaxpr, [False, True, False])
    with pytest.raises(ValueError, match="out_axes"):
        jax.vmap(run, (None, 0, None), out_axes=None)(H, jnp.stack([H + 2] * 2), H + 3)
    assert reached == [True]
    inside = jax.jit(lambda a, b: (jnp.sin(a), jnp.cos(b)))
    assert reaches(jax.make_jaxpr(inside)(H, H), [True, False]) == [True, False]


def test_all_equations_in_depth():
    def function(h):
        def body(h, _):
            return jax.lax.cond(h[0] > 0, jnp.sin, jax.jit(jnp.cos), h), None

        return jax.lax.scan(body, h, length=2)[0]

    names = [e.primitive.name for e in _walk.equations(jax.make_jaxpr(function)(H))]
    assert {"scan", "cond", "sin", "cos"} <= set(names)
    assert names.index("scan") < names.index("cond") < names.index("sin")


@pytest.mark.parametrize("num_consts", [0, 2])
@pytest.mark.parametrize("num_carry", [0, 1, 3])
@pytest.mark.parametrize("num_slices", [0, 2])
def test_parts_of_a_scan(num_consts, num_carry, num_slices):
    def function(consts, carry, slices):
        def body(carry, slices):
            total = sum([*consts, *carry, *slices], jnp.zeros(6))
            return [c + total for c in carry], [total, total]

        return jax.lax.scan(body, carry, slices, length=4)

    args = [H] * num_consts, [H] * num_carry, [jnp.stack([H] * 4)] * num_slices
    eqns = _walk.equations(jax.make_jaxpr(function)(*args))
    (eqn,) = [e for e in eqns if e.primitive.name == "scan"]
    consts, carry = _walk.scan_parts(eqn)
    assert carry == num_carry
    assert len(eqn.invars) - consts - carry == num_slices


def test_the_walk_evaluates():
    """In the domain of arrays, with constants, literals, calls and several results."""
    table = jnp.arange(6.0)

    def function(h, n):
        small, large = jnp.split(jax.jit(lambda h: with_jvp(jnp.sin)(h) * 2)(h) + table, 2)
        return {"a": small @ large, "n": n + 1}

    closed = jax.make_jaxpr(function)(H, 3)
    names = []

    def rule(eqn, ins):
        names.append(eqn.primitive.name)
        return _walk.evaluate_alone(eqn, ins)

    found = _walk.evaluate(closed.jaxpr, closed.consts, [H, 3], rule)
    expected = 2 * np.sin(np.asarray(H)) + np.arange(6.0)
    np.testing.assert_allclose(found[0], expected[:3] @ expected[3:], rtol=1e-12)
    assert found[1] == 4
    assert "sin" in names and "jit" not in names and "custom_jvp_call" not in names
