"""In which units errors are judged, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import pararnn as prnn
from pararnn.solvers._tolerance import SAMPLES, Tolerance

SIZE = 3
GRAIN = float(np.finfo(np.float64).eps) ** 0.8
draw = np.random.default_rng(0)


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (1, 4), (1, 9), (2, 3), (3, 2), (5, 1)])
def test_the_largest_of_several_disturbances_counts(samples, rows):
    """Those of the rows around it too, if there are fewer than `SAMPLES`."""
    tolerance = Tolerance(jnp.zeros(SIZE), prnn.Dense(), prnn.scans.Sequential(), None, 0.0)
    values, images = draw.normal(size=(2, rows, SIZE))
    disturbed = images + GRAIN * draw.normal(size=(samples, rows, SIZE))
    moved = np.abs(disturbed - images).max(0)
    reach = -(-SAMPLES // samples)
    first = np.arange(rows) - (reach - 1) // 2
    near = [moved[max(i, 0) : i + reach].max(0) for i in first]
    most = GRAIN * np.abs(values).max()
    expected = np.minimum(most, GRAIN * np.abs(values) + near)
    got = tolerance.fine(
        *map(jnp.asarray, (values, images, disturbed)), tolerance.most(jnp.asarray(values))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)
