"""The table of primitives, and what its readers rely on."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.jaxprs._moves import MOVES
from pararnn.jaxprs._primitives import Kind, names, primitive
from pararnn.jaxprs._registry import combines_elements
from pararnn.jaxprs._walk import equations
from pararnn.kernels._elementwise import NAMES

H = jnp.arange(1.0, 5.0)


def combining(function):
    """The primitives of a function that combine elements of an operand."""
    eqns = equations(jax.make_jaxpr(function)(H))
    return {eqn.primitive.name for eqn in eqns if combines_elements(eqn)}


@pytest.mark.parametrize(
    "expected, function",
    [
        ("", lambda h: jnp.tanh(h) * jnp.where(h > 2, h, -h)),
        ("", lambda h: jnp.concatenate([h[2:], h[:2]])[::-1].reshape(2, 2)),
        ("dot_general", lambda h: jnp.ones((4, 4)) @ h),
        ("conv_general_dilated", lambda h: jnp.convolve(h, jnp.ones(3), "same")),
        ("cumsum", jnp.cumsum),
        ("reduce_max", jnp.max),
        ("reduce_sum", lambda h: h - jnp.mean(h)),
        ("sort", jnp.sort),
        ("fft", lambda h: jnp.abs(jnp.fft.fft(h))),
    ],
)
def test_which_primitives_combine_elements(expected, function):
    assert combining(function) - {"jit", "pjit"} == set(expected.split())


def test_a_registered_primitive_combines_elements_unless_it_is_elementwise():
    for name, rule in (("whole", prnn.jaxprs.all_to_all), ("each", prnn.jaxprs.elementwise)):
        new = jex_core.Primitive(f"test_primitives_{name}")
        new.def_abstract_eval(lambda h: h)
        assert combining(new.bind) == {new.name}
        prnn.jaxprs.register_rule(new, rule)
        assert combining(new.bind) == ({new.name} if name == "whole" else set())


def test_lists_of_the_readers_agree_with_the_table():
    assert {primitive(name).kind for name in MOVES} == {Kind.MOVE}
    assert {primitive(name).kind for name in NAMES} == {Kind.ELEMENTWISE}
    # All that moves elements to places that need not be computed has positions.
    computed = {"dynamic_slice", "dynamic_update_slice", "gather", "scatter"}
    assert set(names(Kind.MOVE)) == {*MOVES, *computed}


def test_moves_and_barriers_keep_elements_apart():
    """Unlike what no rule knows, they do not make a step dense."""

    def barred(h, x):
        return jax.lax.optimization_barrier((jnp.tanh(h) + x, x))[0]

    def padded(h, x):
        return jnp.tanh(jnp.pad(h, 1)[1:-1]) + x

    for step in (barred, padded):
        assert prnn.detect_structure(step, H, H) == prnn.Diagonal()

    def filled(h, x):  # with an element of the state
        return jax.lax.pad(h[:3], h[3], [(0, 1, 0)]) * jnp.asarray([1.0, 1, 1, 2]) + x

    jacobian = jax.jacobian(filled)(H, H)
    assert np.array_equal(np.asarray(jacobian), np.diag([1.0, 1, 1, 2]))
    assert prnn.detect_structure(filled, H, H) == prnn.Diagonal()
