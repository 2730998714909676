"""Wrong arguments are refused by name, and the message shows what came."""

import dataclasses
import sys
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def step(h, x):
    return 0.5 * h + x


@dataclasses.dataclass
class Plain:
    """Of which JAX does not know that it holds an array."""

    h: object


XS, INIT = jnp.ones((5, 2)), jnp.ones(2)
ELMAN = prnn.Elman(2, 3, key=jax.random.key(0))


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "`solver` must be a solver.*got 'newton'", {"solver": "newton"}),
        (TypeError, "`solver`.*Newton.*forget the parentheses", {"solver": prnn.Newton}),
        (TypeError, "`adjoint` must be a solver.*got 3", {"adjoint": 3}),
        (TypeError, "`adjoint`.*forget the parentheses", {"adjoint": prnn.Sequential}),
        (TypeError, "`adjoint`.*ClippedAdjoint.*parentheses", {"adjoint": prnn.ClippedAdjoint}),
        (TypeError, "`structure` must be.*got 'diagonal'", {"structure": "diagonal"}),
        (
            ValueError,
            "`structure` describes a state of 4 elements, but the state has 2",
            {"structure": prnn.BlockDiagonal.contiguous(2, 2)},
        ),
        (ValueError, r"`reset`.*\(5,\).*got bool of shape \(4,\)", {"reset": np.ones(4, bool)}),
        (
            ValueError,
            r"`reset`.*got int64 of shape \(5,\).*`reset.astype\(bool\)`.*`pararnn.segment_starts",
            {"reset": np.ones(5, np.int64)},
        ),
        (ValueError, r"`mask`.*got float64.*`mask.astype\(bool\)`", {"mask": np.ones(5)}),
        (ValueError, r"`mask`.*got int64 of.*`pararnn.mask_of\(length, 5\)`", {"mask": 3}),
        (ValueError, r"`mask`.*\(2,\). For the length.*mask_of", {"mask": np.array([3, 4])}),
        (ValueError, r"`mask`.*got bool of shape \(3, 5\).*vmap", {"mask": np.ones((3, 5), bool)}),
        (ValueError, r"`reset`.*got bool of shape \(\)", {"reset": True}),
        (ValueError, r"`reset`.*got bool of shape \(5, 1\)", {"reset": np.ones((5, 1), bool)}),
        (ValueError, r"`reset_state`.*\(2,\).*got .*\(3,\)", {"reset_state": jnp.ones(3)}),
        (ValueError, "`reset_state`.*float64.*got .*float32", {"reset_state": np.float32([1, 2])}),
        (ValueError, "`reset_state`.*got .*'h'", {"reset_state": {"h": jnp.ones(2)}}),
        (TypeError, "`reset_state` must be an array; got 'zero'", {"reset_state": "zero"}),
        (ValueError, r"`guess`.*\(5, 2\).*got .*\(4, 2\)", {"guess": jnp.ones((4, 2))}),
        (ValueError, "`guess`.*float64.*got .*float32", {"guess": np.ones((5, 2), np.float32)}),
        (ValueError, r"`guess`.*got \(Shape", {"guess": (jnp.ones((5, 2)),)}),
        (TypeError, "`guess.*1.*` must be an array; got 'x'", {"guess": [1.0, "x"]}),
        (TypeError, "`verbose` must be.*got 'loud'", {"verbose": "loud"}),
    ],
)
def test_options_of_solve(error, message, options):
    with pytest.raises(error, match=message):
        prnn.solve(step, XS, INIT, **options)


@pytest.mark.parametrize(
    "error, message, xs",
    [
        (ValueError, "`xs` must have at least one array", []),
        (ValueError, "`xs` must have at least one array", {"a": None}),
        (ValueError, r"`xs\['b'\]` must have a leading time axis", {"a": XS, "b": 1.0}),
        (ValueError, "`xs` must have a leading time axis; got a scalar", 3.0),
        (ValueError, r"share their leading.*got xs\[0\]: \(5, 2\), xs\[1\]: \(4,\)", (XS, XS[:4, 0])),  # noqa: E501
        (TypeError, "`xs` must be an array; got 'text'", "text"),
        (TypeError, r"`xs\[0\]` must be an array; got <object", [object()]),
        (ValueError, r"`xs\[0\]` must have.*scalar.*pass `jnp.asarray\(xs\)`", [1.0, 2.0]),
    ],
)  # fmt: skip
def test_inputs(error, message, xs):
    with pytest.raises(error, match=message):
        prnn.solve(step, xs, INIT)


@pytest.mark.parametrize(
    "error, message, init",
    [
        (ValueError, "`init` must have at least one array", ()),
        (TypeError, "`init` must be floating-point or complex.*got int64", np.ones(2, np.int64)),
        (TypeError, "`init` must be floating.*got int64. Cast it to a float.*move.*to `xs`", 0),
        (TypeError, r"`init\['n'\]`.*got bool", {"h": INIT, "n": np.ones(2, bool)}),
        (TypeError, "`init` must be an array; got <object", object()),
        (
            TypeError,
            "`init` must be an array; got .*dataclass Plain: .*register_dataclass`.*equinox.Module",
            Plain(INIT),
        ),
    ],
)
def test_initial_states(error, message, init):
    with pytest.raises(error, match=message):
        prnn.solve(step, XS, init)


@pytest.mark.parametrize(
    "error, message, bad",
    [
        (TypeError, "`step` must be callable.*got 5", 5),
        (TypeError, "`step`.*got the cell Elman.*RNN.*`cell.step`", ELMAN),
        (TypeError, "`step`.*parentheses", prnn.Elman),
        (ValueError, r"structure of `init`.*\*.*got .*\(\*, \*\)", lambda h, x: (h, h)),
        (ValueError, "Return the state only, not `.carry, y.`.*`readout`", lambda h, x: (h, h)),
        (ValueError, "Return the state only, not `.carry, y.`.*`readout`", lambda h, x: (h, None)),
        (ValueError, "structure of `init`.*got .*None", lambda h, x: None),
        (ValueError, r"keep the shape.*`init` has \(2,\).* \(1,\)", lambda h, x: h[:1]),
        (ValueError, r"keep the shape.*\(2,\).* \(2, 2\)", lambda h, x: h * x[:, None]),
        (
            ValueError,
            "keep the dtype.*`init` is float64.*float32.*Cast inside `step`",
            lambda h, x: h.astype(jnp.float32),
        ),
        (ValueError, "keep the dtype.*int64", lambda h, x: jnp.ones(2, np.int64)),
        (ValueError, "keep the dtype.*complex128", lambda h, x: jax.lax.complex(h, x)),
        (TypeError, "`step` must return arrays only; got 'text'", lambda h, x: "text"),
        (TypeError, "`step` must return arrays only; got 1.5", lambda h, x: 1.5),
        (TypeError, "arrays only; got Plain.*register_dataclass`", lambda h, x: Plain(h)),
    ],
)
def test_steps(error, message, bad):
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        for solver in (prnn.Sequential(), prnn.Newton()):
            with pytest.raises(error, match=message):
                prnn.solve(bad, XS, INIT, solver=solver)
            if callable(bad):  # no step is ever taken, but it is checked all the same
                with pytest.raises(error, match=message):
                    prnn.solve(bad, XS[:0], INIT, solver=solver)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")


def test_inputs_of_the_steps_one_by_one():
    message = r"input \[f64\[\].*`xs` is a list of 5.*each with time.*stack.*`jnp.stack\(xs\)`"
    with pytest.raises(TypeError, match=message):
        prnn.solve(step, [INIT] * 5, INIT)
    with pytest.raises(TypeError) as caught:  # several inputs, which are something else
        prnn.solve(step, [XS, XS[:, 0]], INIT)
    assert "jnp.stack" not in "".join(caught.value.__notes__)


@pytest.mark.parametrize("init", [jnp.ones((1, 2)), INIT])
def test_a_batch_where_one_sequence_belongs(init):
    message = r"keep the shape.*`init` has .*, but the new state has .*For a batch use `jax.vmap`"
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        with pytest.raises(ValueError, match=message):
            prnn.solve(lambda h, x: h + x, jnp.ones((64, 5, 2)), init)
        with pytest.raises(ValueError) as caught:  # no batch explains it
            prnn.solve(lambda h, x: h[:1], XS, INIT)
        assert "vmap" not in str(caught.value)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")


def test_leaf_of_a_state_is_named():
    init = {"c": jnp.ones(2), "h": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"`init\['h'\]` has \(3,\), but the new state has \(2,\)"):
        prnn.solve(lambda s, x: {"c": s["c"], "h": s["c"]}, XS, init)
    with pytest.raises(ValueError, match=r"`init\['h'\]` is float64"):
        prnn.solve(lambda s, x: {"c": s["c"], "h": s["h"].astype(jnp.float32)}, XS, init)


@pytest.mark.parametrize(
    "solver", [prnn.Newton, prnn.QuasiNewton, prnn.ElementwiseNewton, prnn.Picard, prnn.Jacobi,
               prnn.LevenbergMarquardt, prnn.Speculative],
)  # fmt: skip
@pytest.mark.parametrize(
    "error, message, settings",
    [
        (TypeError, "`rtol` must be a Python float or None; got '1e-3'", {"rtol": "1e-3"}),
        (ValueError, "`rtol` must be finite and not negative; got -1", {"rtol": -1.0}),
        (ValueError, "`rtol`.*got nan", {"rtol": float("nan")}),
        (ValueError, "`rtol`.*got inf", {"rtol": float("inf")}),
        (TypeError, "`atol`.*got True", {"atol": True}),
        (TypeError, "`atol`.*got None", {"atol": None}),
        (ValueError, "`atol`.*got -0.1", {"atol": -0.1}),
        (TypeError, "`max_iters` must be a Python int.*got 3.0", {"max_iters": 3.0}),
        (TypeError, "`max_iters`.*got True", {"max_iters": True}),
        (ValueError, "`max_iters` must be at least 1; got 0", {"max_iters": 0}),
        (TypeError, "`chunk_size`.*got 'all'", {"chunk_size": "all"}),
        (ValueError, "`chunk_size` must be at least 1; got -2", {"chunk_size": -2}),
        (TypeError, "`fallback` must be True or False; got 1", {"fallback": 1}),
        (TypeError, r"`linear_method` must be.*Radix\(\).*got 'radix'", {"linear_method": "radix"}),
    ],
)
def test_settings_of_solvers(solver, error, message, settings):
    with pytest.raises(error, match=message):
        solver(**settings)


@pytest.mark.parametrize(
    "error, message, make",
    [
        (TypeError, "`block_size`.*got 2.0", lambda: prnn.QuasiNewton(block_size=2.0)),
        (ValueError, "`block_size`.*at least 1; got 0", lambda: prnn.QuasiNewton(block_size=0)),
        (TypeError, "`damping`.*got 'x'", lambda: prnn.LevenbergMarquardt(damping="x")),
        (ValueError, "`damping`.*got -1", lambda: prnn.LevenbergMarquardt(damping=-1.0)),
        (TypeError, "`diagonal`.*got 1", lambda: prnn.LevenbergMarquardt(diagonal=1)),
        (TypeError, "`num_candidates`.*got 1.5", lambda: prnn.Speculative(num_candidates=1.5)),
        (ValueError, "`num_candidates`.*got 0", lambda: prnn.Speculative(num_candidates=0)),
        (TypeError, "`corrector`.*got 'x'", lambda: prnn.Speculative(corrector="x")),
        (
            TypeError,
            "`corrector`.*got Speculative",
            lambda: prnn.Speculative(corrector=prnn.Speculative()),
        ),
        (TypeError, "`algebra`.*got 'max'", lambda: prnn.AssociativeScan(algebra="max")),
        (
            TypeError,
            "`linear_method`.*got 'scan'",
            lambda: prnn.AssociativeScan(linear_method="scan"),
        ),
        (TypeError, "positional", lambda: prnn.Newton(1e-3)),
        (TypeError, "chunksize", lambda: prnn.Newton(chunksize=3)),
    ],
)
def test_own_settings_of_solvers(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_settings_that_do_not_fit_the_step():
    with pytest.raises(ValueError, match="`block_size` must divide.*got 4 for 6"):
        prnn.solve(
            lambda h, x: jnp.sum(h) * jnp.ones(6) + x[0],
            XS,
            jnp.ones(6),
            solver=prnn.QuasiNewton(block_size=4),
        )
    with pytest.raises(ValueError, match="`solver=AssociativeScan.*affine in the state"):
        prnn.solve(lambda h, x: jnp.sin(h) + x, XS, INIT, solver=prnn.AssociativeScan())


def test_platform():
    with pytest.raises(TypeError, match="`platform` must be a string or None; got 3"):
        prnn.select_solver(step, XS, INIT, platform=3)
    with pytest.raises(ValueError, match="`platform` must be one of.*'cuda'.*'tpu'.*got 'GPU'"):
        prnn.select_solver(step, XS, INIT, platform="GPU")
    for platform in ("cpu", "gpu", "cuda", "rocm", "tpu"):
        prnn.select_solver(step, XS, INIT, platform=platform)


@pytest.mark.parametrize(
    "bad, us, message",
    [
        (step, XS, r"shaped like `state`, f64\[2\]; got f64\[5,2\].*pass `us\[0\]`"),
        (lambda h, x: h + jnp.diag(h) @ x, XS, r"`step` failed when it was traced.*pass `us\[0\]`"),
        (lambda h, x: (h, x), INIT, r"shaped like `state`, f64\[2\]; got \(f64\[2\], f64\[2\]\)"),
    ],
)
def test_structure_of_one_time_slice(bad, us, message):
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        with pytest.raises((ValueError, TypeError), match=message):
            prnn.detect_structure(bad, INIT, us)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")


def test_plotting_without_matplotlib(monkeypatch):
    row = {"name": "x", "forward": {"seconds": None}}
    made = prnn.Benchmark(prnn.Sequential(), row, ())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'pararnn\[examples\]'"):
        made.plot()


def step_of_the_failure(h, x):
    return h * h + x


def test_a_failure_is_reported_where_it_happened():
    """The first call is compiled for all calls; its line must not turn up in the second's."""
    good, bad = INIT / 2, INIT * 1e200
    prnn.solve(step_of_the_failure, XS / 9, good)  # an unrelated line
    with pytest.raises(eqx.EquinoxRuntimeError, match="A state is not finite") as caught:
        prnn.solve(step_of_the_failure, XS / 9, bad)
    text = "".join(traceback.format_exception(caught.value))
    assert "prnn.solve(step_of_the_failure, XS / 9, bad)" in text
    assert "unrelated" not in text
    assert str(caught.value) == prnn.RESULTS[prnn.RESULTS.nonfinite]

    def own_error(h, x):
        return eqx.error_if(h + x, x[0] > 0, "an error of the user's own")

    with pytest.raises(eqx.EquinoxRuntimeError, match="an error of the user's own"):
        prnn.solve(own_error, XS, INIT, solver=prnn.Sequential())


def test_states_that_are_infinite_by_design():
    """A running maximum: the message says what to do, and it does it."""

    def maximum(h, x):
        return jnp.maximum(h, x)

    xs, start = jnp.full((5, 2), -jnp.inf), jnp.full(2, -jnp.inf)
    message = r"not finite.*infinite by design.*`throw=False`.*`jnp.finfo\(dtype\).min`"
    with pytest.raises(eqx.EquinoxRuntimeError, match=message):
        prnn.solve(maximum, xs, start)
    solution = prnn.solve(maximum, xs, start, throw=False)
    assert solution.result == prnn.RESULTS.nonfinite
    np.testing.assert_array_equal(solution.states, xs)
    assert jnp.all(prnn.solve(maximum, XS, jnp.full(2, jnp.finfo(XS.dtype).min)).states == XS)


def test_the_sequences_of_a_batch_that_failed_can_be_found():
    batch = jnp.stack([XS, XS * 1e200, XS]) / 9

    def run(xs, throw):
        return prnn.solve(step_of_the_failure, xs, INIT / 2, throw=throw)

    message = r"A state is not finite.*Of a batch, the `result` of `solve\(…, throw=False\)` tells"
    with pytest.raises(Exception, match=message):
        jax.vmap(lambda xs: run(xs, True))(batch)
    result = jax.vmap(lambda xs: run(xs, False))(batch).result
    np.testing.assert_array_equal(result == prnn.RESULTS.nonfinite, [False, True, False])


# --- layers ---------------------------------------------------------------------------------------

CELL = ELMAN
GRU = prnn.GRU(3, 4, key=jax.random.key(0))


@pytest.mark.parametrize(
    "message, make",
    [
        ("`cell` must be a pararnn.AbstractCell.*; got 'GRU'", lambda: prnn.RNN("GRU")),
        (r"`cell`.*Elman.*parentheses.*`Elman\(", lambda: prnn.RNN(prnn.Elman)),
        ("`cell`.*GRUCell.*parentheses", lambda: prnn.RNN(eqx.nn.GRUCell)),
        (
            "`solver` must be a solver instance such as.* None; got 'x'",
            lambda: prnn.RNN(CELL, solver="x"),
        ),
        (r"`solver`.*Newton.*parentheses.*`Newton\(", lambda: prnn.RNN(CELL, solver=prnn.Newton)),
        ("`adjoint`.*got 'x'", lambda: prnn.RNN(CELL, adjoint="x")),
        ("`adjoint`.*parentheses", lambda: prnn.RNN(CELL, adjoint=prnn.Newton)),
        (
            "`cell`.*got <function step.*`pararnn.solve.*A layer.*`init_state`",
            lambda: prnn.RNN(step),
        ),
        (r"`cell`.*got RNN\(…\)\.$", lambda: prnn.RNN(prnn.RNN(CELL))),
        (
            r"`rnn` must be a.*got Elman\(…\).*RNN\(cell",
            lambda: prnn.ResidualBlock(3, CELL, key=None),
        ),
        (r"`rnn` must be a pararnn.RNN; got 3", lambda: prnn.GatedBlock(3, 4, 3, key=None)),
        (r"`forward` must be a.*RNN\(cell", lambda: prnn.Bidirectional(CELL, prnn.RNN(CELL))),
        (r"`layers\[0\]`.*got Elman\(…\).*`pararnn.RNN\(cell", lambda: prnn.Stack([CELL])),
        (r"`layers\[0\]`.*the class GatedBlock.*parenth", lambda: prnn.Stack([prnn.GatedBlock])),
        (r"`layers` must be a list or tuple.*got RNN\(…\)", lambda: prnn.Stack(prnn.RNN(CELL))),
    ],
)
def test_making_a_layer(message, make):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("cell", [prnn.Elman, prnn.GRU, prnn.DiagonalGRU])
def test_inputs_of_a_layer(cell):
    rnn = prnn.RNN(cell(2, 4, key=jax.random.key(0)))
    for xs, shape in ((jnp.ones((5, 3)), r"\(5, 3\)"), (jnp.ones(5), r"\(5,\)")):
        with pytest.raises(ValueError, match=rf"`xs` must have shape.*\(L, 2\); got {shape}"):
            rnn(xs)
    with pytest.raises(ValueError, match=r"`xs` must have shape.*got \(7, 5, 2\).*use `jax.vmap`"):
        rnn(jnp.ones((7, 5, 2)))  # a batch, without vmap
    with pytest.raises(ValueError, match=r"`reset`.*\(5,\).*got bool of shape \(3,\)"):
        rnn(XS, reset=np.ones(3, bool))
    for xs, kind in (([INIT] * 5, "list"), ((XS, XS), "tuple"), ({"a": XS}, "dict")):
        with pytest.raises(TypeError, match=rf"`xs` must be one array.*got a {kind} .*`jnp.stack"):
            rnn(xs)
    message = r"`x` must be one time slice.*f64\[5,2\], which is a sequence of 5.*`rnn\(xs\)`"
    with pytest.raises(ValueError, match=message):
        rnn.step(None, XS)
    with pytest.raises(ValueError, match=r"`xs` must have shape.*\(1, 3\)"):
        rnn.step(None, jnp.ones(3))


@pytest.mark.parametrize("state", [jnp.ones(5), jnp.ones(3, jnp.float32), (jnp.ones(3),)], ids=str)
def test_state_of_a_layer(state):
    """The message must name what the user passed."""
    with pytest.raises(ValueError, match="`state`"):
        prnn.RNN(CELL)(XS, state)


def test_sizes_of_cells():
    key = jax.random.key(0)
    for cell in (prnn.Elman, prnn.GRU, prnn.DiagonalGRU):
        with pytest.raises(TypeError, match="`hidden_size` must be a Python int; got 3.0"):
            cell(2, 3.0, key=key)
        with pytest.raises(ValueError, match="`input_size` must be at least 1; got 0"):
            cell(0, 3, key=key)
    with pytest.raises(ValueError, match=r"`leak` must be in \(0, 1\]; got 0"):
        prnn.Elman(2, 3, leak=0.0, key=key)
    with pytest.raises(ValueError, match="`num_heads` must divide.*got 3 for 4"):
        prnn.DiagonalGRU(6, 4, num_heads=3, key=key)


# --- the step of a cell ---------------------------------------------------------------------------


def test_inputs_that_are_not_projected():
    us = GRU.project(jnp.ones((5, 3)))
    assert prnn.solve(GRU.step, us, GRU.init_state()).states.shape == (5, 4)
    # Three features could be taken for three gates.
    with pytest.raises(ValueError, match=r"`xs` must be what.*GRU.*`cell.project\(xs\)`.*f64\[3\]"):
        prnn.solve(GRU.step, jnp.ones((5, 3)), GRU.init_state())
    message = r"`step` failed.*state f64\[4\].*input f64\[7\].*`cell.project\(xs\)`"
    for step in (GRU.step, lambda h, x: GRU.step(h, x)):
        with pytest.raises(ValueError, match=message):
            prnn.solve(step, jnp.ones((5, 7)), GRU.init_state())
    # One array is what the steps of this cell consume.
    assert prnn.solve(CELL.step, CELL.project(XS), CELL.init_state()).states.shape == (5, 3)


def test_a_failing_step_tells_its_arguments():
    with pytest.raises(KeyError, match=r"`step` failed.*\{'a': f64\[2\]\} and an input f64\[2\]"):
        prnn.solve(lambda s, x: {"b": s["b"]}, XS, {"a": INIT})


class Custom(prnn.AbstractCell):
    """A cell that does what it is told."""

    initial: object = eqx.field(static=True, default=None)
    projected: object = eqx.field(static=True, default=None)

    def init_state(self):
        return None if self.initial is None else self.initial()

    def step(self, state, u):
        return 0.5 * state + u

    def project(self, xs):
        return xs if self.projected is None else self.projected(xs)


def zeros():
    return jnp.zeros(2)


@pytest.mark.parametrize(
    "message, cell",
    [
        (r"`init_state\(\)` of Custom must return.*got None. Did you forget `return`", Custom()),
        (r"`init_state\(\)` of Custom must return.*got \(\)", Custom(tuple)),
        (r"`cell.project\(xs\)` must keep.*of . inputs.*\(., 2\)", Custom(zeros, lambda x: x[1:])),
        (r"`us\['a'\]` of shape \(\)", Custom(zeros, lambda x: {"a": jnp.sum(x)})),
    ],
)
def test_cells_that_break_the_rules(message, cell):
    rnn = prnn.RNN(cell)
    for call in (rnn, rnn.solve, lambda xs: rnn.step(None, xs[0])):
        with pytest.raises(ValueError, match=message):
            call(XS)


@pytest.mark.parametrize("cell", [prnn.GRU, prnn.Elman, prnn.LSTM])
def test_inputs_of_another_dtype(cell):
    """What the user wrote is named, and what works is let through."""
    wide, narrow = (cell(2, 3, dtype=dtype, key=jax.random.key(0)) for dtype in (None, jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        rnn = prnn.RNN(narrow)
        message = (
            f"`xs` is float64, but the parameters of {cell.__name__} are float32.*"
            r"`xs.astype\(jnp.float32\)`.*`dtype=jnp.float64`"
        )
        for call in (rnn, rnn.solve, lambda xs: rnn.step(None, xs[0])):
            with pytest.raises(ValueError, match=message):
                call(XS)
        with pytest.raises(ValueError, match="keep the dtype.*float32.*float64.*cast what in `xs`"):
            prnn.solve(narrow.step, narrow.project(XS), narrow.init_state())
        ys, _ = prnn.RNN(wide)(XS.astype(jnp.float32))
        assert ys.dtype == jnp.float64


def test_inputs_that_are_no_arrays():
    rnn = prnn.RNN(CELL)
    with pytest.raises(TypeError, match="`xs` must be an array; got 'text'"):
        rnn("text")
    with pytest.raises(ValueError, match="`xs` must have a leading time axis"):
        rnn(3.0)
    with pytest.raises(ValueError, match=r"`xs\[0\]\[0\]` must have a leading time axis"):
        rnn([[1.0, 2.0], [3.0, 4.0]])
