"""What `solve` returns can be read: printed whole, in batches, under `jit` and after `tree_map`."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import pararnn as prnn


def run(xs):
    return prnn.solve(
        lambda h, x: 0.5 * h + x, xs, jnp.ones(2), solver=prnn.Newton(chunk_size=2), throw=False
    )


XS = jnp.ones((6, 2))


@pytest.fixture(scope="module")
def solution():
    return run(XS)


@pytest.fixture(scope="module")
def batch():
    return jax.vmap(run)(jnp.broadcast_to(XS, (3, 6, 2)).at[1].set(jnp.inf))


def test_values_are_shown(solution):
    stats = solution.stats
    expected = (
        f"Stats(iterations={int(stats.iterations)}, correction={float(stats.correction):.3g}, "
        f"chunk_size=2, sequential_steps={int(stats.sequential_steps)}, fallback=False)"
    )
    assert int(stats.iterations) > 0
    assert str(stats) == repr(stats) == expected
    assert str(solution) == repr(solution) == (
        "Solution(\n  states=f64[6,2],\n  final=f64[2],\n  result=RESULTS<successful>,\n"
        f"  stats={expected},\n)"
    )  # fmt: skip


def test_results_print_their_message(solution, batch):
    assert str(solution.result) == "pararnn.RESULTS<successful>"
    assert prnn.RESULTS[solution.result] == "successful"
    for item in (prnn.RESULTS.not_converged, prnn.RESULTS.nonfinite):
        assert str(item) == repr(item) == f"pararnn.RESULTS<{prnn.RESULTS[item]}>"
        assert len(prnn.RESULTS[item]) > 50
    assert str(batch.result).count("successful") == 2
    assert str(batch.result).count("A state is not finite") == 1


def test_batches_are_shown(batch):
    text = repr(batch)
    assert "result=RESULTS<2 × successful, 1 × A state is not finite>" in text
    assert "fallback=[False, True, False]" in text
    many = jtu.tree_map(lambda x: jnp.broadcast_to(x[:1], (100, *x.shape[1:])), batch)
    assert "result=RESULTS<100 × successful>" in repr(many)
    assert "fallback=[False, False, False, ..., False, False, False]" in repr(many.stats)
    assert "RESULTS<>" in repr(jtu.tree_map(lambda x: x[:0], batch))


def test_mapped_trees_are_shown(solution, batch):
    picked = jtu.tree_map(lambda x: x[1], batch)
    assert "result=RESULTS<A state is not finite. With `fallback=True`" in repr(picked)
    assert "A state is not finite." in str(picked.result)
    for function in (np.asarray, jax.device_get):
        assert repr(jtu.tree_map(function, solution.stats)) == repr(solution.stats)
        mapped = jtu.tree_map(function, solution)
        assert str(mapped.result) == str(solution.result)
    numbers = jtu.tree_map(lambda x: x.tolist(), solution)
    assert repr(numbers.stats) == repr(solution.stats)
    assert "result=RESULTS<successful>" in repr(numbers)
    assert pickle.loads(pickle.dumps(mapped)).result == prnn.RESULTS.successful


def test_what_has_no_values_is_shown_by_its_shape(solution):
    seen = []

    @jax.jit
    def traced(xs):
        made = run(xs)
        seen.extend([repr(made), str(made.result), str(made.stats)])
        return made

    assert repr(traced(XS)) == repr(solution)
    assert "fallback=bool[]" in seen[0] and "fallback=bool[]" in seen[2]
    assert "traced" in seen[0] and seen[1] == "pararnn.RESULTS<traced>"
    assert "fallback=bool[]" in repr(jax.eval_shape(run, XS))
    for other in (lambda x: None, lambda x: x.shape, lambda x: "text"):
        assert repr(jtu.tree_map(other, solution)).startswith("Solution(")


def test_results_still_compute(solution, batch):
    assert solution.result == prnn.RESULTS.successful
    assert solution.result != prnn.RESULTS.nonfinite
    assert np.array_equal(batch.result == prnn.RESULTS.nonfinite, [False, True, False])
    worse = jax.jit(lambda r: prnn.RESULTS.where(True, prnn.RESULTS.not_converged, r))
    assert worse(solution.result) == prnn.RESULTS.not_converged
    assert isinstance(solution.result, prnn.RESULTS)
    assert eqx.tree_equal(solution.result, prnn.RESULTS.successful, typematch=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solutions_of_different_solvers_are_branches_of_one_cond(dtype):
    """And those of an empty sequence; the chunk size is a number as any other."""
    xs, init = jnp.ones((6, 2), dtype), jnp.ones(2, dtype)
    newton, jacobi = prnn.Newton(chunk_size=2), prnn.Jacobi(chunk_size=3)
    solvers = [prnn.Sequential(), newton, jacobi, prnn.Speculative(chunk_size=2)]

    def of(solver, length=6):
        return lambda: prnn.solve(
            lambda h, x: jnp.tanh(h) / 2 + x, xs[:length], init, solver=solver, throw=False
        )

    chosen = jax.jit(lambda i: jax.lax.switch(i, [of(solver) for solver in solvers]))
    for i, solver in enumerate(solvers):
        assert repr(chosen(i)) == repr(of(solver)())
        assert chosen(i).stats.chunk_size == (6, 2, 3, 2)[i]
        assert chosen(i).stats.chunk_size.dtype == np.int32
    both = jax.jit(lambda i: jax.lax.cond(i > 0, lambda: of(newton)().stats, lambda: none.stats))
    none = of(newton, 0)()
    assert int(both(0).chunk_size) == 0 and int(both(1).chunk_size) == 2
    sizes = jax.vmap(lambda x: prnn.solve(run_step, x, init, solver=jacobi).stats.chunk_size)
    assert sizes(jnp.ones((4, 6, 2), dtype)).tolist() == [3] * 4


def run_step(h, x):
    return h / 2 + x
