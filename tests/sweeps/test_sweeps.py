"""Sweeps against loops over the rows that they are to consume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import INTERPRET, normal

import pararnn as prnn
from pararnn.sweeps import Fused, Rows, Scanned, Unrolled

LENGTH = 11
WEIGHT = normal(0, (2, 2), np.float64, 0.5)
XS = normal(1, (LENGTH, 2)), normal(2, (LENGTH,))
SWEEPS = {
    "scan": Scanned(),
    "in place": Scanned(in_place=True),
    "unrolled": Unrolled(),
    "kernel": Fused(interpret=INTERPRET),
}
ROWS = {
    "whole": Rows(LENGTH, 3, 4, 4),
    "one step": Rows(LENGTH, LENGTH, 1, 1),
    "even": Rows(LENGTH, 1, LENGTH, LENGTH),
    "early": Rows(LENGTH, 2, 3, 4, first=1),
    "shared": Rows(LENGTH, 3, 4, 0),
    "beyond": Rows(LENGTH, 2, 4, 4, first=5),
}


def step(state, inputs):
    h, clock = state
    x, scale = inputs
    return jnp.tanh(WEIGHT @ h + scale * x), clock + 1


def starts_of(count):
    return normal(3, (count, 2)), jnp.zeros(count)


def loop(rows, starts):
    """Ends and kept states, one step after another, by the definition of the rows."""
    ends, kept = [], {}
    for c in range(rows.num_chunks):
        state = jax.tree.map(lambda s, c=c: s[c], starts)
        for i in range(rows.num_steps):
            time = min(rows.first + c * rows.stride + i, rows.length - 1)
            row = rows.length - 1 - time if rows.reverse else time
            state = step(state, jax.tree.map(lambda x, row=row: x[row], XS))
            kept.setdefault(row, state)
        ends.append(state)
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *ends)
    in_order = [kept[row] for row in range(rows.length)] if rows.covers else None
    return stacked, in_order and jax.tree.map(lambda *s: jnp.stack(s), *in_order)


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("which", ROWS)
@pytest.mark.parametrize("reverse", [False, True])
def test_rows(name, which, reverse):
    sweep, rows = SWEEPS[name], ROWS[which]._replace(reverse=reverse)
    if name == "kernel" and which not in ("whole", "early"):
        pytest.skip("the kernels' own tests ask this")
    starts = starts_of(rows.num_chunks)

    @jax.jit
    def run(xs, starts):
        return sweep.run(step, starts, sweep.prepare(xs, rows), rows, keep=rows.covers)

    got, kept = run(XS, starts)
    ends, states = loop(rows, starts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, ends)
    assert (kept is None) == (states is None)
    if states is not None:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), kept, states)


@pytest.mark.parametrize("method", [Scanned(), Unrolled(), Fused(interpret=INTERPRET)])
@pytest.mark.parametrize("batched", [False, True])
def test_in_a_solve(method, batched):
    """Values, and gradients both ways through a linear solve, with weights of their own for each
    sequence or shared."""
    solver = prnn.Newton(chunk_size=4, sweep_method=method)

    def loss(weight, xs, solve):
        return jnp.sum(jnp.sin(solve(lambda h, x: jnp.tanh(weight @ h + x), xs)))

    def ours(step, xs):
        return prnn.solve(step, xs, jnp.zeros(2), solver=solver, adjoint=solver).states

    def scan(step, xs):
        return jax.lax.scan(lambda h, x: (step(h, x),) * 2, jnp.zeros(2), xs)[1]

    def run(solve):
        both = jax.value_and_grad(lambda w, xs: loss(w, xs, solve), argnums=(0, 1))
        return jax.jit(jax.vmap(both, (0, 0)) if batched else both)

    args = WEIGHT, XS[0]
    if batched:
        args = jnp.stack([WEIGHT, -WEIGHT]), jnp.stack([XS[0], 2 * XS[0]])
    got, expected = run(ours)(*args), run(scan)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, expected)


def test_what_cannot_be_a_kernel_runs_all_the_same():
    def sorting(h, x):
        return jnp.sort(0.5 * h + x)

    assert "sort" in prnn.kernels.unsupported(sorting, jnp.zeros((1, 2)), XS[0])
    solver = prnn.Newton(chunk_size=4, sweep_method=Fused(interpret=INTERPRET))
    got = prnn.solve(sorting, XS[0], jnp.zeros(2), solver=solver).states
    expected = prnn.solve(sorting, XS[0], jnp.zeros(2), solver=prnn.Sequential()).states
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_sequential_run_in_one_kernel():
    def plain(h, x):
        return jnp.tanh(WEIGHT @ h + x)

    solver = prnn.Sequential(sweep_method=Fused(interpret=INTERPRET))
    got = prnn.solve(plain, XS[0], jnp.ones(2), solver=solver, adjoint=solver)
    expected = prnn.solve(plain, XS[0], jnp.ones(2), solver=prnn.Sequential())
    np.testing.assert_allclose(got.states, expected.states, rtol=1e-12)


def test_the_switch(monkeypatch):
    """Kernels are picked on CUDA, where they can be generated, if there is one device or they are
    switched on."""
    recurrence = prnn.Recurrence(lambda h, x: jnp.tanh(0.5 * h + x), XS[0], jnp.zeros(2))
    odd = prnn.Recurrence(lambda h, x: jnp.sort(h + x), XS[0], jnp.zeros(2))
    long = jnp.zeros((1000, 2))
    diagonal = prnn.Recurrence(lambda h, x: jnp.tanh(0.5 * h + x), long, jnp.zeros(2))
    monkeypatch.setenv("PARARNN_KERNELS", "0")
    assert prnn.Newton().resolved(recurrence, "cuda").sweep_method == Unrolled()
    monkeypatch.delenv("PARARNN_KERNELS")
    with monkeypatch.context() as several:
        several.setattr(jax, "device_count", lambda: 2)
        assert prnn.Newton().resolved(recurrence, "cuda").sweep_method == Unrolled()
        several.setenv("PARARNN_KERNELS", "1")
        assert prnn.Newton().resolved(recurrence, "cuda").sweep_method == Fused()
    solver = prnn.Newton().resolved(diagonal, "cuda")
    assert solver.sweep_method == Fused() and solver.chunk_size == 64
    assert prnn.Newton().resolved(odd, "cuda").sweep_method == Unrolled()
    assert prnn.Newton().resolved(recurrence, "cpu").sweep_method == Scanned()
    assert prnn.Sequential().resolved(recurrence, "cuda").sweep_method == Fused()
    assert prnn.Sequential().resolved(recurrence, "tpu").sweep_method is None
    _, reason = prnn.select_solver(diagonal.step, long, jnp.zeros(2), platform="cuda")
    assert reason.endswith("16 chunks of 64 steps, in one kernel.")
    _, reason = prnn.select_solver(odd.step, long, jnp.zeros(2), platform="cuda")
    assert "There is no kernel: the step uses `sort`." in reason
    monkeypatch.setenv("PARARNN_KERNELS", "yes")
    with pytest.raises(ValueError, match="PARARNN_KERNELS must be 0 or 1; got 'yes'"):
        prnn.Newton().resolved(recurrence, "cuda")


def test_refusals(as_users_run_it):
    message = r"`sweep_method` must be .*`Fused\(\)` \(one kernel\).*got 'kernel'"
    with pytest.raises(TypeError, match=message):
        prnn.Newton(sweep_method="kernel")
    with pytest.raises(TypeError, match="forget the parentheses"):
        prnn.Sequential(sweep_method=Scanned)
    for name in ("overlap", "min_iters"):
        with pytest.raises(ValueError, match=f"`{name}` must not be negative; got -1"):
            prnn.Newton(**{name: -1})
        with pytest.raises(TypeError, match=f"`{name}` must be a Python int or None; got 1.5"):
            prnn.Newton(**{name: 1.5})
