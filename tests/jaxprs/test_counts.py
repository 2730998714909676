"""Operations and bytes against counts made by hand, and loops against plain Python."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.jaxprs._counting import count, loop_turns

A = jnp.ones((3, 4), jnp.float32)
B = jnp.ones((4, 5), jnp.float32)
W = jnp.full((4, 4), 0.1, jnp.float32)
H = jnp.ones(4, jnp.float32)


def test_a_product():
    counts = count(jnp.matmul, A, B)
    assert counts.flops == 2 * 3 * 4 * 5
    assert counts.bytes == 4 * (12 + 20 + 15)


def test_elements_and_moves():
    assert count(jnp.tanh, A) == (12, 2 * 48)
    assert count(lambda x: x + 1, A) == (12, 2 * 48)  # a literal is not memory
    assert count(lambda x: x.T, A) == (0, 2 * 48)
    assert count(lambda x: x.reshape(4, 3), A) == (0, 0)
    assert count(lambda x: x > 0, A) == (0, 48 + 12)
    assert count(jnp.sum, A) == (12, 48 + 4)
    assert count(lambda x: jax.lax.dynamic_slice(x, (0, 1), (3, 2)), A) == (0, 2 * 24)
    assert count(lambda x: x + 1, jnp.arange(5)).flops == 0


def test_a_convolution():
    x, kernel = jnp.ones((1, 2, 9)), jnp.ones((6, 2, 3))
    counts = count(lambda x: jax.lax.conv_general_dilated(x, kernel, (1,), "VALID"), x)
    assert counts.flops == 2 * 6 * 7 * 2 * 3


def _scan(h, length):
    return jax.lax.scan(lambda h, _: (W @ h, h), h, None, length=length)


def test_a_scan_counts_as_often_as_it_is_long():
    counts = count(lambda h: _scan(h, 7), H)
    assert counts.flops == 7 * 2 * 4 * 4
    assert counts.bytes == 7 * 4 * (16 + 4 + 4) + 4 * 7 * 4  # the stacked states, once


def test_scans_in_scans():
    def outer(h):
        return jax.lax.scan(lambda h, _: (_scan(h, 7)[0], None), h, None, length=5)[0]

    assert count(outer, H).flops == 5 * 7 * 32


@pytest.mark.parametrize("turns", [0, 1, 6])
def test_while_turns_are_observed(turns):
    def loop(h, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, W @ c[1]), (0, h))[1]

    assert count(loop, H, jnp.asarray(turns)).flops == turns * 32


def test_while_in_while_in_scan_and_cond():
    """The inner loop turns 1 + 2 + 3 times for each of the four steps of the scan, in one branch;
    the loop of the other branch never."""

    def inner(n, h):
        return jax.lax.fori_loop(0, n, lambda _, h: W @ h, h)

    def middle(h):
        return jax.lax.fori_loop(jnp.asarray(1), jnp.asarray(4), inner, h)

    def body(h, _):
        return jax.lax.cond(h[0] > -1, middle, lambda h: inner(jnp.asarray(9), h), h), None

    counts = count(lambda h: jax.lax.scan(body, h, None, length=4)[0], H)
    assert counts.flops == 4 * 6 * 32


def _with_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
    return g


def _with_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda h: (f(h), None), lambda _, g: (g,))
    return g


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, eqx.filter_jit, _with_jvp, _with_vjp])
def test_calls_are_entered(wrap):
    assert count(wrap(lambda h: W @ h), H).flops == 32


def test_a_linear_solve_counts_its_solution():
    def solve(b):
        return jax.lax.custom_linear_solve(
            lambda x: 2 * x, b, lambda _, b: W @ b, lambda _, b: W @ b
        )

    assert count(solve, H).flops == 32


def test_vmap_multiplies():
    def loop(h, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, W @ c[1]), (0, h))[1]

    counts = count(jax.vmap(loop), jnp.ones((3, 4), jnp.float32), jnp.array([1, 5, 2]))
    assert counts.flops == 5 * 3 * 32  # until the last of them is ready


def test_static_arguments_pass():
    assert count(lambda f, x: f(x), jnp.tanh, A).flops == 12


def test_a_sequential_solve():
    """A product and three operations per unit and step, as much again as the scan counts, and two
    that tell whether all states are finite."""
    xs = jnp.ones((20, 4), jnp.float32)

    def step(h, x):
        return jnp.tanh(W @ h + x)

    def run(xs):
        return prnn.solve(step, xs, H, solver=prnn.Sequential(), throw=False).states

    assert count(run, xs).flops == pytest.approx(20 * (32 + 4 + 4 + 8), rel=0.05)


def test_a_newton_solve_counts_its_sweeps():
    """Each iteration of `Jacobi` is a sweep over all steps, with two more that judge it, of
    disturbed and of displaced states; and one makes the trajectory."""
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)

    def step(h, x):
        return jnp.tanh(W @ h + x)

    def run(xs):
        return prnn.solve(step, xs, H, solver=prnn.Jacobi(chunk_size=8), throw=False)

    iterations = int(run(xs).stats.iterations)
    sweep = 64 * (32 + 4 + 4)
    flops = count(run, xs).flops
    assert iterations >= 2
    assert iterations * sweep <= flops <= 2 * (3 * iterations + 1) * sweep


# --- turns of loops ---------------------------------------------------------------------------


def test_turns_are_told_with_their_place():
    def up_to(bound, h):
        return jax.lax.while_loop(lambda h: h < bound, lambda h: h + 1, h)

    def inner(h, bound):
        with jax.named_scope("inner"):
            return up_to(bound, h), None

    def f(h):
        with jax.named_scope("outer"):
            h, _ = jax.lax.scan(inner, h, jnp.asarray([2, 3, 7]))
        return jax.jit(lambda h: up_to(9, h))(h)

    assert loop_turns(f, jnp.asarray(0)) == [("/outer/while/inner/while", 7), ("/while", 2)]
    assert loop_turns(jnp.sin, 1.0) == []


def test_turns_of_a_newton_solve_and_of_its_derivative():
    """They are what the solve reports; the derivative, being linear, does not iterate."""
    cell = prnn.DiagonalGRU(3, 3, key=jax.random.key(0))
    us = cell.project(jax.random.normal(jax.random.key(1), (40, 3)))
    solver = prnn.Newton(chunk_size=4, linear_method=prnn.scans.Sequential())

    def solve(us, solver):
        return prnn.solve(
            cell.step, us, cell.init_state(), solver=solver, adjoint=solver, throw=False
        )

    def loss(us):
        return jnp.sum(solve(us, solver).states ** 2)

    stats = solve(us, solver).stats
    turns = loop_turns(jax.grad(loss), us)
    forward = [(path, n) for path, n in turns if "transpose" not in path]
    ends = {path.split("pararnn_")[-1]: n for path, n in forward}
    assert ends["iterations/while"] == stats.iterations > 1
    assert stats.sequential_steps // 4 == stats.iterations + 1
    assert ends["finish/while"] == 0
    assert not any("iterations" in path for path, _ in turns if "transpose" in path)
    # One that is not exact iterates there, too.
    jacobi = prnn.Jacobi(chunk_size=4, linear_method=prnn.scans.Sequential())
    turns = loop_turns(jax.grad(lambda us: jnp.sum(solve(us, jacobi).states ** 2)), us)
    backward = [n for path, n in turns if "transpose" in path and "iterations" in path]
    assert len(backward) == 1 and backward[0] > 1
