"""The parts of the stopping rule, one by one, with numbers made by hand or by NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.solvers import _convergence as rule

SCAN = prnn.scans.Sequential()
draw = np.random.default_rng(0)


def unexplained(displaced, response, predicted, correction, rounding=0.0):
    rows = (displaced, response, predicted, rounding * np.ones_like(correction), np.abs(correction))
    return rule.unexplained(*(jnp.asarray(x, float) for x in rows), SCAN)


# --- the size of what a correction leaves ------------------------------------------------------


def test_displacements_follow_the_running_sum_of_the_defects():
    starts = jnp.asarray([[1.0, -2.0], [1.0, 0.0], [1.0, 4.0]])
    defects = jnp.asarray([[0.0, 0.0], [-3e-9, 1e-8], [1e-9, -3e-8]])
    got = rule.displacements(starts, defects, 1e-7 * jnp.abs(starts))
    # Of 8 tolerances of the start, and of 8 times the largest defect of the element at least.
    expected = 8 * np.array([[1e-7, 2e-7], [-1e-7, 3e-8], [-1e-7, -4e-7]])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # A large defect somewhere displaces no start by more than the largest of its tolerances.
    got = rule.displacements(starts, defects.at[2, 0].set(1.0), 1e-7 * jnp.abs(starts))
    np.testing.assert_allclose(got[:, 0], [8e-7, -8e-7, 8e-7])


def test_displacements_are_finite_where_defects_are_not():
    defects = jnp.asarray([[0.0], [jnp.nan], [jnp.inf], [1.0]])
    got = rule.displacements(jnp.ones((4, 1)), defects, jnp.full((4, 1), 1e-7))
    assert np.isfinite(got).all()


def test_what_a_correction_predicts_needs_no_bound():
    """An exact Jacobian, up to rounding: nothing is left, however long the memory."""
    displaced = draw.normal(size=(9, 3))
    correction = draw.normal(size=(9, 3))
    missed = np.abs(displaced) / 70 + 1e-3
    got = unexplained(displaced, displaced + missed, displaced, correction, rounding=1e-3)
    np.testing.assert_array_equal(got.error, 0)
    got = unexplained(displaced, displaced + missed, displaced, correction)
    assert np.all(got.error[1:] > 0)


def test_a_memory_without_a_derivative_adds_up():
    """A counter whose derivative is zero: what is left is the sum of all corrections before."""
    displaced, correction = np.ones((9, 2)), np.abs(draw.normal(size=(9, 2)))
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(correction, axis=0)[:-1]])
    got = unexplained(displaced, displaced, 0 * displaced, correction)
    np.testing.assert_allclose(got.error, sums)
    # Rounding that hides a tenth of a displacement does not make it leak.
    got = unexplained(displaced, 0.91 * displaced, 0 * displaced, correction)
    np.testing.assert_allclose(got.error, sums)


def test_a_memory_whose_derivative_is_nearly_right_adds_up():
    """A tenth too small: each correction leaves a tenth, of which nothing is forgotten."""
    displaced, correction = np.ones((9, 1)), np.ones((9, 1))
    got = unexplained(displaced, displaced, 0.9 * displaced, correction, rounding=0.01)
    np.testing.assert_allclose(got.error[:, 0], 0.1 * np.arange(9))


def test_remembered_rounding_is_a_random_walk():
    displaced, zero = np.ones((9, 1)), np.zeros((9, 1))
    got = unexplained(displaced, displaced, displaced, zero, rounding=0.5)
    np.testing.assert_allclose(got.rounding[:, 0], 0.5 * np.sqrt(np.arange(9)))
    got = unexplained(displaced, 0.5 * displaced, 0.5 * displaced, zero, rounding=0.5)
    np.testing.assert_allclose(got.rounding[-1, 0], 0.5 / np.sqrt(1 - 0.25), rtol=1e-4)


@pytest.mark.parametrize("keeps, predicts", [(0.5, 0.0), (0.7, 0.3), (0.8, -0.05), (3.0, 1.0)])
def test_a_leak_without_its_derivative_is_a_recurrence(keeps, predicts):
    displaced, correction = draw.normal(size=(2, 9, 3))
    got = unexplained(displaced, keeps * displaced, predicts * displaced, correction)
    retained, missed = (x if x < 0.9 else 1.0 for x in (abs(keeps), abs(keeps - predicts)))
    expected, left = np.zeros((9, 3)), np.zeros(3)
    for c in range(9):
        expected[c] = left
        left = retained * left + missed * np.abs(correction[c])
    np.testing.assert_allclose(got.error, expected)


def test_a_response_that_is_not_finite_is_a_full_memory():
    bad = np.array([[np.nan], [np.inf], [0.0]])
    got = unexplained(np.ones((3, 1)), bad, np.zeros((3, 1)), np.ones((3, 1)))
    np.testing.assert_array_equal(got.error, [[0.0], [1.0], [2.0]])


# --- does it go on? ----------------------------------------------------------------------------


def test_first_index():
    assert rule.first_index(jnp.asarray([False, False, True, True])) == 2
    assert rule.first_index(jnp.asarray([False, False])) == 2
    assert rule.first_index(jnp.zeros(0, bool)) == 0


def test_summary_of_the_chunks():
    errors = jnp.asarray([0.0, 0.5, np.e, np.e**3], jnp.float32)
    largest = jnp.asarray(7.0, jnp.float32)
    pinned = jnp.asarray([True, False, False, False])
    got = rule.summarize(errors, largest, pinned, OneDevice())
    assert (int(got.front), float(got.correction)) == (2, 7.0)
    np.testing.assert_allclose((got.level, got.largest), (4 / 3, np.e**3), rtol=1e-6)
    got = rule.summarize(jnp.zeros(4, jnp.float32), largest, jnp.ones(4, bool), OneDevice())
    assert (int(got.front), float(got.level), float(got.largest)) == (4, 0.0, 0.0)
    hopeless = rule.summarize(errors.at[3].set(jnp.inf), largest, pinned, OneDevice())
    assert np.isfinite(hopeless.level) and hopeless.largest == np.inf


@pytest.mark.parametrize(
    "front, level, descended, progresses",
    [
        (3, 2.0, False, False),  # nothing new
        (4, 2.0, False, False),  # the one start that is guaranteed
        (5, 2.0, False, True),
        (3, 1.96, False, False),  # less than noise
        (3, 1.9, False, True),
        (3, 2.0, True, True),  # by the method's own merit
    ],
)
def test_progress(front, level, descended, progresses):
    before = rule.Progress(jnp.asarray(3), jnp.asarray(2.0), jnp.asarray(7))
    after = before.updated(jnp.asarray(front), jnp.asarray(level), descended)
    assert after.stalled == (0 if progresses else 8)
    assert (after.front, after.level) == (front, min(level, 2.0))


def test_patience_ends():
    progress = rule.Progress(jnp.asarray(3), jnp.asarray(0.0), jnp.asarray(13))
    progress = progress.updated(jnp.asarray(4), jnp.asarray(0.0), False)
    assert progress.is_patient
    progress = progress.updated(jnp.asarray(5), jnp.asarray(0.0), False)
    assert not progress.is_patient
