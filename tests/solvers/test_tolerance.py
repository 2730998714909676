"""In which units errors are judged, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pararnn.solvers._tolerance import SAMPLES, Tolerance

SIZE = 3
GRAIN = float(np.finfo(np.float64).eps) ** 0.8
draw = np.random.default_rng(0)


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (1, 4), (1, 9), (2, 3), (3, 2), (5, 1)])
def test_the_largest_of_several_disturbances_counts(samples, rows):
    """Those of the rows around it too, relative to their largest elements, if there are fewer than
    `SAMPLES`."""
    tolerance = Tolerance(jnp.zeros(SIZE), None, 0.0)
    values, images = draw.normal(size=(2, rows, SIZE))
    disturbed = images + GRAIN * draw.normal(size=(samples, rows, SIZE))
    moved = np.abs(disturbed - images).max(0)
    reach = -(-SAMPLES // samples)
    first = np.arange(rows) - (reach - 1) // 2
    largest = np.abs(images).max(1, keepdims=True)
    relative = moved / largest
    near = [relative[max(i, 0) : i + reach].max(0) for i in first] * largest
    effect = tolerance.effect(*map(jnp.asarray, (images, disturbed)))
    np.testing.assert_allclose(effect, near, rtol=1e-6)


def test_scale_of_each_element():
    """Its own magnitude and what disturbances of the states before make of it, at most what is
    granted to the largest element; but rounding that a network amplifies is granted up to four
    times of that."""
    tolerance = Tolerance(jnp.zeros(SIZE), None, 0.0)
    values = np.array([[1.0, 1e-3, -4.0]])

    def scale(*effect):
        got = tolerance.scale(jnp.asarray(values), GRAIN * jnp.asarray([effect]))
        return np.asarray(got)[0] / GRAIN

    np.testing.assert_allclose(scale(0.5, 1e-4, 0.0), [1.5, 1.1e-3, 4.0])
    np.testing.assert_allclose(scale(9.0, 9.0, 9.0), [4.0, 4.0, 4.0])
    ulps = 8 * np.finfo(float).eps / GRAIN  # rounding is 8 units in the last place
    np.testing.assert_allclose(scale(9 / ulps, 1e3 / ulps, 0.0), [9.0, 16.0, 4.0])


def test_norm_is_infinite_where_a_difference_is_not_finite():
    tolerance = Tolerance(jnp.zeros(2), None, 1e-3)
    differences = jnp.asarray([[2e-3, 0.0], [jnp.nan, 0.0], [0.0, -jnp.inf]])
    np.testing.assert_allclose(tolerance.norm(differences, 0 * differences), [2, np.inf, np.inf])
    empty = tolerance.norm(jnp.zeros((3, 0)), jnp.zeros((3, 0)))
    np.testing.assert_array_equal(empty, 0)
