"""The predicates of the stopping rule, one by one, with numbers made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.solvers import _convergence as rule

SCAN = prnn.scans.Sequential()


def floats(*numbers):
    return jnp.asarray(numbers, jnp.float32)


def flags(*values):
    return jnp.asarray(values, bool)


def scalar(number):
    return jnp.asarray(number, jnp.float32)


def measured(changes, *, beyond=None, defect=0.0, persistent=False, pinned=None):
    changes = floats(*changes)
    return rule.Measured(
        changes=changes,
        beyond=changes if beyond is None else floats(*beyond),
        defect=scalar(defect),
        persistent=jnp.asarray(persistent),
        pinned=jnp.zeros(changes.shape, bool) if pinned is None else flags(*pinned),
    )


def history(correction=np.inf, total=np.inf, **rest):
    fields = {"correction": scalar(correction), "total": scalar(total)}
    return rule.History.none()._replace(**fields, **rest)


def judge(now, before, *, first=False, quadratic=True, vouched=None):
    vouched = rule.Vouched() if vouched is None else vouched
    return rule.judge(
        now, vouched, before, first=jnp.asarray(first), quadratic=quadratic, scan=SCAN
    )


# --- is it right? -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, correction, tells",
    [(0.5, 10.0, True), (0.5, 100.0, True), (0.5, 101.0, False), (1.0, 1.0, False)],
)
def test_a_rate_is_that_of_small_shrinking_corrections(rate, correction, tells):
    assert rule.tells_a_rate(scalar(rate), scalar(correction)) == tells


def test_remaining_error_is_a_geometric_series():
    """8, 4, 2, … leaves 8; 9, 3, 1, … leaves 4.5."""
    np.testing.assert_allclose(rule.remaining_error(floats(8, 1), scalar(0.5)), [8, 1])
    got = rule.remaining_error(floats(9, 3), scalar(1 / 3))
    np.testing.assert_allclose(got, [4.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize("total, negligible", [(0.9, True), (1.0, True), (1.1, False)])
def test_negligible(total, negligible):
    assert rule.is_negligible(scalar(total)) == negligible


def test_rounding():
    assert rule.is_rounding(floats(0, 0, 0))
    assert not rule.is_rounding(floats(0, 1e-3, 0))


@pytest.mark.parametrize(
    "changes, defect, persistent, expected",
    [
        ((3, 9), 0.5, False, True),
        ((3, 11), 0.5, False, False),  # too large
        ((3, 9), 1.5, False, False),  # the defects are not small
        ((3, 9), 0.5, True, False),  # it drifts
    ],
)
def test_amplified_rounding(changes, defect, persistent, expected):
    now = measured(changes, defect=defect, persistent=persistent)
    assert rule.is_amplified_rounding(now) == expected


@pytest.mark.parametrize(
    "last, defect, proves",
    [(100, 9, True), (100, 11, False), (9, 0, False), (np.inf, 0, False), (10, 1, True)],
)
def test_a_linearization_proves_itself_on_a_large_correction(last, defect, proves):
    assert rule.proves_linearization(scalar(last), scalar(defect)) == proves


# --- does it go on? ---------------------------------------------------------------------------


def test_first_index():
    assert rule.first_index(flags(0, 0, 1, 1)) == 2
    assert rule.first_index(flags(0, 0)) == 2
    assert rule.first_index(jnp.zeros(0, bool)) == 0


def test_first_moved_leaves_out_what_is_exact_by_induction():
    changes = floats(5, 0.5, 5)
    assert rule.first_moved(changes, flags(0, 0, 0)) == 0
    assert rule.first_moved(changes, flags(1, 0, 0)) == 2
    assert rule.first_moved(changes, flags(1, 1, 1)) == 3


def test_mean_level_is_that_of_what_is_beyond_the_tolerance():
    changes = floats(np.e, np.e**3, 0.1, np.inf)
    np.testing.assert_allclose(rule.level_sums(changes[:3], flags(0, 0, 0)), (4, 3), rtol=1e-6)
    np.testing.assert_allclose(rule.level_sums(changes[:3], flags(1, 0, 0)), (3, 2), rtol=1e-6)
    np.testing.assert_array_equal(rule.level_sums(changes[:2], flags(1, 1)), (0, 0))
    assert np.isfinite(rule.level_sums(changes, flags(0, 0, 0, 0))[0])


@pytest.mark.parametrize(
    "front, level, nearer",
    [
        (3, 2.0, False),  # nothing new
        (4, 2.0, False),  # the one start that is guaranteed
        (5, 2.0, True),
        (3, 1.96, False),  # less than noise
        (3, 1.9, True),
    ],
)
def test_coming_nearer(front, level, nearer):
    before = history(front=jnp.asarray(3), level=scalar(2.0))
    assert rule.comes_nearer(jnp.asarray(front), scalar(level), before) == nearer


def test_patience_ends_and_starts_anew():
    before = history(5.0, 5.0, level=scalar(0.0), stalled=jnp.asarray(13))
    stuck = measured([5.0], beyond=[5.0])
    _, after = judge(stuck, before)
    assert after.stalled == 14 and after.is_patient
    _, after = judge(stuck, after)
    assert after.stalled == 15 and not after.is_patient
    assert after.restarted(jnp.asarray(True)).is_patient
    assert not after.restarted(jnp.asarray(False)).is_patient
    # A method that vouches for a descent is not stuck.
    _, after = judge(stuck, after, vouched=rule.Vouched(descended=True))
    assert after.stalled == 0


# --- all together -----------------------------------------------------------------------------


def test_the_first_correction_tells_nothing_unless_it_is_zero():
    error, _ = judge(measured([0.1, 0.1]), history(), first=True)
    assert np.all(np.isinf(error))
    error, after = judge(measured([0.0, 0.0]), history(), first=True)
    np.testing.assert_array_equal(error, 0)
    assert after.correction == 0 and after.total == 0


def test_quadratic_methods_take_the_largest_so_far():
    """Rate 0.1: of 1, 2, 1 arrive 1, 2, 2, of which a ninth is left."""
    now = measured([1.0, 2.0, 1.0], defect=5.0)
    error, after = judge(now, history(20.0, 30.0))
    np.testing.assert_allclose(error, np.array([1, 2, 2]) / 9, rtol=1e-5)
    assert after.trusted and after.correction == 2 and after.total == 4


def test_other_methods_add_up():
    """Rate max(2/20, 4/10) = 0.4: of 1, 2, 1 arrive 1, 3, 4, of which two thirds are left."""
    error, after = judge(measured([1.0, 2.0, 1.0]), history(20.0, 10.0), quadratic=False)
    np.testing.assert_allclose(error, np.array([1, 3, 4]) * 2 / 3, rtol=1e-5)
    assert not after.trusted


def test_what_is_exact_by_induction_has_no_error():
    now = measured([50.0, 50.0], pinned=[True, False])
    for quadratic in (True, False):
        error, _ = judge(now, history(40.0, 40.0), quadratic=quadratic)
        assert error[0] == 0 and np.isinf(error[1])


def test_amplified_rounding_needs_a_proof():
    now = measured([4.0, 5.0], defect=0.5)
    error, _ = judge(now, history(5.0, 9.0))
    assert np.all(np.isinf(error))
    error, after = judge(now, history(5.0, 9.0, proven=jnp.asarray(True)))
    np.testing.assert_array_equal(error, 0)
    assert after.proven


def test_rounding_is_rest_but_proves_nothing():
    now = measured([2.0, 2.0], beyond=[0.0, 0.0], defect=2.0)
    error, after = judge(now, history(2.0, 4.0))
    np.testing.assert_array_equal(error, 0)
    assert not after.trusted
    rejected = rule.Vouched(accepted=False)
    assert np.all(np.isinf(judge(now, history(2.0, 4.0), vouched=rejected)[0]))


def test_a_damped_correction_tells_no_rate():
    now, before = measured([1.0]), history(4.0, 4.0)
    assert np.isfinite(judge(now, before, quadratic=False)[0])
    damped = rule.Vouched(complete=False)
    assert np.isinf(judge(now, before, quadratic=False, vouched=damped)[0])


# --- is what is returned right? ---------------------------------------------------------------


@pytest.mark.parametrize(
    "kept, forgotten", [(0.0, True), (0.4, True), (0.6, False), (1.0, False), (np.inf, False)]
)
def test_defects_are_forgotten_where_chunks_contract(kept, forgotten):
    """Defects of half a tolerance, which add up to 0.5 / (1 - kept)."""
    assert rule.is_forgotten(floats(0.5, 0.5), scalar(kept)) == forgotten


def test_contradiction():
    no, yes, never = jnp.asarray(False), jnp.asarray(True), scalar(np.inf)
    norms, none = floats(0.6, 0.6, 0.2), floats(0, 0, 0)

    def contradicted(norms, beyond, kept, trusted):
        forgotten = rule.is_forgotten(norms, kept)
        added_up = jnp.cumsum(rule.that_add_up(forgotten, norms, beyond))
        return rule.contradicted(norms, added_up, trusted).tolist()

    # They add up beyond the tolerance from the second start on, unless they are forgotten, or the
    # corrections proved more.
    assert contradicted(norms, norms, never, no) == [False, True, True]
    assert contradicted(norms, none, scalar(0.1), no) == [False, False, False]
    assert contradicted(norms, norms, scalar(0.1), no) == [False, True, True]
    assert contradicted(norms, norms, never, yes) == [False, False, False]
    # A defect beyond the tolerance is one in any case.
    assert contradicted(floats(0.1, 1.5, 0), none, scalar(0.0), yes) == [False, True, False]
