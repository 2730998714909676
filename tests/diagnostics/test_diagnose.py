"""verify, lyapunov, benchmark and tune: they must find what is wrong, and agree with theory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.diagnostics import _compare

L, D = 64, 3
W = 0.6 * jax.random.normal(jax.random.key(0), (D, D))
XS = jax.random.normal(jax.random.key(1), (L, D))


def _step(h, x):
    return jnp.tanh(W @ h + x)


def test_verify_accepts_a_right_solver():
    verification = prnn.verify(_step, XS, jnp.zeros(D), solver=prnn.Newton(chunk_size=8))
    assert verification and verification.structure_ok and not verification.fallback
    assert verification.value_error < 1e-10 and verification.gradient_error < 1e-9
    assert "agrees" in str(verification)


def test_verify_catches_a_wrong_structure():
    verification = prnn.verify(
        _step, XS, jnp.zeros(D), solver=prnn.Newton(), structure=prnn.Diagonal()
    )
    assert not verification and not verification.structure_ok
    assert "structure" in str(verification) and "DISAGREES" in str(verification)


def test_verify_accepts_a_right_structure():
    a = jnp.array([0.2, 0.5, 0.7])
    verification = prnn.verify(
        lambda h, x: jnp.tanh(a * h + x), XS, jnp.zeros(D), structure=prnn.Diagonal()
    )
    assert verification


def test_verify_reports_failure():
    solver = prnn.Newton(chunk_size=1, max_iters=1, fallback=False)
    verification = prnn.verify(lambda h, x: jnp.tanh(3 * h * x), XS, jnp.ones(D), solver=solver)
    assert not verification and "did not converge" in verification.result


def test_lyapunov_of_a_linear_system_is_its_spectral_radius():
    rates = jnp.array([0.5, 0.9, 0.3])
    xs = jax.random.normal(jax.random.key(0), (2000, D))
    estimate = prnn.lyapunov(lambda h, x: rates * h + x, xs, jnp.zeros(D))
    assert estimate.exponent == pytest.approx(np.log(0.9), abs=1e-3)
    assert "contractive" in str(estimate)


def test_lyapunov_of_the_logistic_map_is_log_two():
    xs = jnp.zeros(20_000)
    estimate = prnn.lyapunov(lambda h, x: 4 * h * (1 - h), xs, jnp.asarray(0.3))
    assert estimate.exponent == pytest.approx(np.log(2), abs=0.02)
    assert "chaotic" in str(estimate)


def test_lyapunov_at_the_extremes():
    xs = jnp.zeros(40)
    assert prnn.lyapunov(lambda h, x: 0 * h + x, xs, jnp.ones(2)).exponent == -np.inf
    with pytest.raises(ValueError, match="`xs`"):
        prnn.lyapunov(_step, XS[:0], jnp.zeros(D))


@pytest.mark.parametrize("gradient", [False, True])
def test_tune_returns_one_that_agrees(gradient, tmp_path):
    wrong = prnn.Newton(chunk_size=1, max_iters=1, fallback=False)
    solvers = [prnn.Jacobi(chunk_size=16), wrong]
    tuning = prnn.tune(
        _step,
        XS,
        jnp.zeros(D),
        solvers=solvers,
        gradient=gradient,
        repetitions=2,
        progress=False,
    )
    assert [row.agrees for row in tuning.rows] == [True, True, False]
    assert tuning.solver in (prnn.Sequential(), solvers[0])
    assert "discarded" in str(tuning)
    tuning.plot(str(tmp_path / "tuning.png"))
    assert (tmp_path / "tuning.png").stat().st_size > 1000


class _Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, h, x):
        return self.weight @ h + x


@pytest.fixture(scope="module")
def measured():
    """A linear step as a module, whose counts are known."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield prnn.benchmark(
        _Linear(W), XS, jnp.zeros(D), solvers=[None, prnn.Jacobi(chunk_size=16)], repetitions=3
    )
    jax.config.update("jax_disable_most_optimizations", before)


def test_benchmark_measures_time_with_its_spread(measured):
    assert [row.name for row in measured.rows] == ["default", "Jacobi(chunk_size=16)"]
    for row in (measured.baseline, *measured.rows):
        for cost in (row.forward, row.gradient):
            seconds, ratio = cost.seconds, cost.ratio
            assert 0 < seconds.lower <= seconds.median <= seconds.upper
            assert 0 < ratio.lower <= ratio.median <= ratio.upper
            assert cost.compile_seconds > 0 and cost.temporary_bytes >= 0
    assert measured.baseline.forward.ratio == (1, 1, 1)


def test_benchmark_counts(measured):
    default, jacobi = measured.rows
    step = L * (2 * D * D + D)  # a product and a sum
    assert measured.baseline.forward.flops == step
    assert default.sequential_steps == L and default.iterations == 0
    assert jacobi.iterations >= 1 and 16 <= jacobi.sequential_steps < 2 * L
    assert jacobi.forward.flops >= jacobi.iterations * step
    assert all(row.gradient.flops > row.forward.flops for row in measured.rows)


def test_benchmark_checks_values_and_gradients(measured):
    for row in measured.rows:
        assert row.agrees and row.error < 1e-10 and row.gradient_error < 1e-9


def test_benchmark_prints_and_plots(measured, tmp_path):
    text = str(measured)
    assert "forward + gradient / ms" in text and "lax.scan" in text and "Gflop" in text
    assert measured.solver in (None, prnn.Jacobi(chunk_size=16))
    measured.plot(str(tmp_path / "benchmark.png"))
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_benchmark_refuses_nothing_to_measure():
    with pytest.raises(ValueError, match="`xs`"):
        prnn.benchmark(_step, XS[:0], jnp.zeros(D))
    with pytest.raises(ValueError, match="`repetitions`"):
        prnn.benchmark(_step, XS, jnp.zeros(D), repetitions=0)


def test_nothing_that_disagrees_is_recommended():
    wrong = prnn.Newton(chunk_size=1, max_iters=1, fallback=False)
    result = prnn.benchmark(
        _step,
        XS,
        jnp.zeros(D),
        solvers=[wrong],
        gradient=False,
        costs=False,
        repetitions=1,
        progress=False,
    )
    assert not result.rows[0].agrees and result.solver == prnn.Sequential()
    assert result.rows[0].forward.flops is None


# --- deadline -------------------------------------------------------------------------------------

MANY = [prnn.Jacobi(chunk_size=c) for c in (4, 8, 16, 32)]


def interrupting(monkeypatch, at):
    """An interrupt from the keyboard while the program of that number is compiled."""
    compiled, seen = _compare._compiled, []

    def spy(*args):
        seen.append(args)
        if len(seen) in at:
            raise KeyboardInterrupt
        return compiled(*args)

    monkeypatch.setattr(_compare, "_compiled", spy)


def tuned(**options):
    options = {"solvers": MANY, "repetitions": 2, "progress": False, **options}
    return prnn.tune(_step, XS, jnp.zeros(D), **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_budget_ends_early_and_says_so():
    short = tuned(budget=0.0)
    assert [row.solver for row in short.rows] == [prnn.Sequential()]
    assert short.left_out == tuple(f"Jacobi(chunk_size={c})" for c in (4, 8, 16, 32))
    text = " ".join(str(short).split())
    assert "Not measured, for want of time: Jacobi(chunk_size=4), Jacobi(chunk_size=8)" in text
    whole = tuned(budget=600.0, solvers=MANY[:1])
    assert len(whole.rows) == 2 and not whole.left_out and "want of time" not in str(whole)
    for budget, error in ((-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="`budget` must be"):
            tuned(budget=budget)


def test_an_interrupt_returns_what_there_is(monkeypatch):
    with monkeypatch.context() as patch:
        interrupting(patch, {4})
        found = tuned()
    assert [row.name for row in found.rows] == ["Sequential()", "Jacobi(chunk_size=4)"]
    assert len(found.left_out) == 3 and found.rows[1].agrees and str(found)
    for row in found.rows:
        assert row.forward.seconds.median > 0
    with monkeypatch.context() as patch:  # while the gradient is compiled
        interrupting(patch, {4})
        found = tuned(solvers=MANY[:1], gradient=True)
    for row in (found.baseline, found.rows[0]):
        assert row.gradient is None and row.gradient_error is None
    assert found.solver is not None and "forward + gradient" not in str(found)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, {2})  # before there is anything to compare
        tuned()


def test_an_interrupt_while_runs_are_timed():
    deadline, calls = _compare.Deadline(), []

    def run():
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return jnp.zeros(())

    fast = {"a": run, "b": lambda: jnp.zeros(())}
    times = _compare.interleaved(fast, 10**6, warm_up=False, deadline=deadline)
    assert deadline.interrupted and 1 <= len(times["a"]) == len(times["b"]) < 6


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [None, False, True])
def test_interrupts_that_are_raised(interrupted):
    """Where nobody asked for deadline, nothing was timed yet, or it is the second."""
    deadline = None if interrupted is None else _compare.Deadline()
    if deadline is not None:
        deadline.interrupted = interrupted
    with pytest.raises(KeyboardInterrupt):
        _compare.interleaved({"a": interrupt}, warm_up=False, deadline=deadline)


def test_progress_tells_what_is_measured(capsys):
    tuned(progress=True, solvers=MANY[:1])
    text = capsys.readouterr().err
    assert "tune" in text and "Jacobi(chunk_size=4)" in text
