"""The diagnostic tools on cells and layers: the same answers as for their steps, with raw inputs;
and whether a cell keeps its promises on time."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal

import pararnn as prnn
from pararnn.diagnostics import Measurement, Row, Spread

L = 40
XS = normal(0, (L, 2))
CELL = prnn.Elman(2, 3, key=jax.random.key(0))
QUIET = {"repetitions": 1, "progress": False}


def test_a_cell_and_a_layer_are_taken_with_their_raw_inputs():
    solver = prnn.Newton(chunk_size=4)
    problem = (CELL.step, CELL.project(XS), CELL.init_state())
    by_hand = prnn.verify(*problem, solver=solver)
    for found in (
        prnn.verify(CELL, XS, solver=solver),
        prnn.verify(prnn.RNN(CELL, solver=solver), XS),
    ):
        assert found and found.broken_promises == ()
        assert found.value_error == by_hand.value_error
    assert prnn.lyapunov(prnn.RNN(CELL), XS) == prnn.lyapunov(*problem) == prnn.lyapunov(CELL, XS)


def test_a_layer_starts_from_the_state_that_is_given():
    state = jnp.ones(3)
    expected = prnn.lyapunov(CELL.step, CELL.project(XS), state)
    assert prnn.lyapunov(prnn.RNN(CELL), XS, state) == expected != prnn.lyapunov(CELL, XS)


def test_a_cell_of_equinox_is_adapted():
    cell = eqx.nn.GRUCell(2, 3, key=jax.random.key(0))
    assert prnn.lyapunov(cell, XS) == prnn.lyapunov(prnn.from_equinox(cell), XS)


def test_select_solver_is_that_of_the_layer():
    shape = jax.ShapeDtypeStruct((500, 2), float)
    minmax = prnn.MinMax(2, 3, key=jax.random.key(0))
    solver, _ = prnn.select_solver(minmax, shape, platform="gpu")
    assert isinstance(solver, prnn.AssociativeScan) and solver.algebra == minmax.algebra
    assert isinstance(prnn.select_solver(minmax, shape, platform="cpu")[0], prnn.Sequential)
    us, init = jax.eval_shape(CELL.project, shape), CELL.init_state()
    of_step = prnn.select_solver(CELL.step, us, init, platform="gpu")
    assert of_step == prnn.select_solver(prnn.RNN(CELL), shape, platform="gpu")
    solver, reason = prnn.select_solver(prnn.RNN(CELL, solver=prnn.Picard()), shape)
    assert solver == prnn.Picard().resolved(prnn.Recurrence(CELL.step, us, init), "cpu")
    assert solver.chunk_size == 1 and solver.linear_method == prnn.scans.Sequential()
    assert "layer" in reason
    solver, reason = prnn.select_solver(CELL, shape, platform="gpu", batch_size=8)
    assert solver == of_step[0] and "tune(…, batch_size=8)" in reason


def test_a_batch_is_verified_in_all_of_its_sequences():
    def step(h, x):
        return jnp.tanh(0.5 * h + x)

    init = jnp.zeros(2)
    assert prnn.verify(step, XS, init, solver=prnn.Jacobi(chunk_size=4), batch_size=3)
    failing = prnn.Jacobi(chunk_size=1, max_iters=1, fallback=False)
    found = prnn.verify(step, XS, init, solver=failing, batch_size=3)
    assert not found and "did not converge" in found.result


@pytest.mark.parametrize("measure", [prnn.tune, prnn.benchmark])
def test_a_layer_is_measured_with_its_solver(measure):
    layer = prnn.RNN(prnn.MinMax(2, 3, key=jax.random.key(0)), solver=prnn.AssociativeScan())
    options = {"costs": False} if measure is prnn.benchmark else {}
    result = measure(layer, XS, batch_size=2, solvers=[layer.solver], **options, **QUIET)
    assert all(row.agrees for row in result.rows)
    assert result.rows[-1].name == "AssociativeScan()"
    assert (result.baseline.gradient is not None) == (measure is prnn.benchmark)


def test_a_clipped_gradient_is_compared_without_its_limit():
    layer = prnn.RNN(_Declared(), solver=prnn.Sequential(), adjoint=prnn.ClippedAdjoint(1e-3))
    assert prnn.verify(layer, XS, structure=prnn.Dense())


class _Declared(prnn.AbstractCell):
    structure = prnn.Diagonal()

    def init_state(self):
        return jnp.zeros(2)

    def step(self, state, u):
        return jnp.tanh(0.5 * state + 0.1 * state[::-1] + u)


def test_the_structure_that_a_cell_declares_is_checked():
    found = prnn.verify(_Declared(), XS)
    assert not found and not found.structure_ok
    assert prnn.verify(_Declared(), XS, structure=prnn.Dense())


# --- promises on time -------------------------------------------------------------------------


class _Cell(prnn.AbstractCell):
    """A cell whose projection and readout are what a test says."""

    projection: str = ""
    outputs: str = ""
    width: int = 0

    @property
    def context(self):
        return self.width

    def init_state(self):
        return jnp.zeros(2)

    def step(self, state, u):
        return jnp.tanh(0.5 * state + u)

    def project(self, xs):
        previous = jnp.concatenate([jnp.zeros_like(xs[:1]), xs[:-1]])
        return {
            "": xs,
            "centred": xs - jnp.mean(xs, axis=0, keepdims=True),
            "previous": xs + previous,
            "positions": xs + jnp.expand_dims(jnp.arange(len(xs), dtype=xs.dtype), 1),
            "shorter": xs[1:],
        }[self.projection]

    def readout(self, states, us):
        return {
            "": states,
            "cumulative": jnp.cumsum(states, axis=0),
            "shorter": states[::2],
            "counted": states / len(states),
        }[self.outputs]


KEPT = {"identity": _Cell(), "context": _Cell("previous", width=1), "wider": _Cell(width=3)}
BROKEN = {
    "`project` mixes time": _Cell("centred"),
    "it may change step 0 alone": _Cell("previous"),
    "streaming gives other numbers": _Cell("positions"),
    "`readout` mixes time": _Cell(outputs="cumulative"),
    "`readout` changes the length": _Cell(outputs="shorter"),
    "the output of step": _Cell(outputs="counted"),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_cell_that_keeps_its_promises(name):
    found = prnn.verify(KEPT[name], XS, solver=prnn.Sequential())
    assert found and found.broken_promises == (), str(found)


def test_a_context_goes_on_from_the_inputs_that_are_given():
    state = (jnp.ones(2), normal(1, (1, 2)))
    found = prnn.verify(KEPT["context"], XS, state, solver=prnn.Sequential())
    assert found and found.broken_promises == (), str(found)


def test_a_projection_that_changes_the_length_is_refused():
    with pytest.raises(ValueError, match="project"):
        prnn.verify(_Cell("shorter"), XS)


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_promise_is_told_in_words(words):
    found = prnn.verify(BROKEN[words], XS, solver=prnn.Sequential())
    assert not found and any(words in sentence for sentence in found.broken_promises)
    assert words in str(found) and "FAILED" in str(found) and found.value_error == 0


def test_tokens_are_exchanged_for_other_tokens():
    class Embedded(prnn.AbstractCell):
        table: jax.Array

        def init_state(self):
            return jnp.zeros(2)

        def step(self, state, u):
            return jnp.tanh(0.5 * state + u)

        def project(self, xs):
            us = self.table[xs]
            return us + jnp.roll(us, 1, 0)

    tokens = jnp.arange(L) % 5
    found = prnn.verify(Embedded(normal(0, (5, 2))), tokens, solver=prnn.Sequential())
    assert any("`project` mixes time" in sentence for sentence in found.broken_promises)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [prnn.verify, prnn.lyapunov, prnn.tune, prnn.select_solver])
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_recurrence_is_refused(tool):
    with pytest.raises(TypeError, match="the class Elman: make an instance"):
        tool(prnn.Elman, XS)
    with pytest.raises(TypeError, match="callable as step"):
        tool(3, XS, jnp.zeros(2))
    with pytest.raises(TypeError, match="Pass an `RNN` that it holds"):
        tool(prnn.Bidirectional(prnn.RNN(CELL), prnn.RNN(CELL)), XS)
    with pytest.raises(ValueError, match="`init` is needed for a step"):
        tool(CELL.step, XS)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_together_is_refused():
    layer = prnn.RNN(CELL, solver=prnn.Newton())
    with pytest.raises(ValueError, match="`solver` is given twice"):
        prnn.verify(layer, XS, solver=prnn.Jacobi())
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="`batch_size`"):
            prnn.tune(CELL, XS, batch_size=size)
    with pytest.raises(ValueError, match="`axis_name` needs"):
        prnn.verify(CELL, XS, axis_name="batch")
    with pytest.raises(ValueError, match="`tolerance`"):
        prnn.verify(CELL, XS, tolerance=0)


# --- lyapunov and tables ----------------------------------------------------------------------


def test_lyapunov_of_a_strong_contraction_in_float32():
    """The squares of the tangents are below the smallest numbers."""
    xs, init = jnp.zeros(50, np.float32), jnp.ones(2, np.float32)
    estimate = prnn.lyapunov(lambda h, x: jnp.float32(1e-25) * h, xs, init)
    assert estimate.exponent == pytest.approx(np.log(1e-25), rel=1e-3)


def fabricated(names, gradient=True):
    def row(name, agrees, factor):
        spread = Spread(factor * 123.4567, factor * 98.7654, factor * 1234.5678)
        measured = Measurement(spread, spread, 12.3456, 123_456_789, 1.2e13, 1.2e13)
        kinds = {"forward": measured, "gradient": measured if gradient else None}
        counts = {"iterations": 1234, "sequential_steps": 123_456, "fallback": True}
        return Row(name, **kinds, error=1e-7, rounding=False, agrees=agrees, **counts)

    rows = [row(name, i != 1, 0.001 * (i + 1)) for i, name in enumerate(names)]
    return prnn.Benchmark(prnn.Newton(), row("lax.scan", True, 1.0), tuple(rows))


def changed_row(benchmark, **changes):
    """The benchmark with another first row."""
    return dataclasses.replace(benchmark, rows=(benchmark.rows[0]._replace(**changes),))


def test_a_table_fits_a_terminal_and_ends_with_a_verdict():
    long = str(prnn.Speculative(chunk_size=16, num_candidates=4, corrector=prnn.Newton()))
    names = ["Newton(chunk_size=16)", long, "Jacobi()", "a" * 150]
    text = str(fabricated(names))
    assert max(map(len, text.splitlines())) <= 100
    assert all("lower–upper" in part for part in (text, str(fabricated(names, False))))
    flat = " ".join(text.split())
    assert "Fastest that agrees: Newton(chunk_size=16), forward + gradient in 0.123 of" in flat
    words = long.split()
    assert all(word in flat for word in words) and "discarded, finished" in flat
    assert "e+" not in flat


def test_a_verdict_is_honest():
    slow = fabricated(["Newton()"])
    gradient = slow.rows[0].gradient._replace(ratio=Spread(1.25, 1.2, 1.3))
    slow = changed_row(slow, gradient=gradient)
    text = " ".join(str(slow).split())
    assert "1.25 of the scan's time: no faster than lax.scan" in text
    none = changed_row(fabricated(["Newton()"]), agrees=False)
    assert "No solver that was measured agrees with lax.scan: use Sequential()." in str(none)
