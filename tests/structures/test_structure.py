"""The arithmetic of structured matrices against the same with full ones in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems import normal

import pararnn as prnn

# Name, structure, number of state elements, and the groups that it stands for.
CASES = {
    "diagonal": (prnn.Diagonal(), 5, [[i] for i in range(5)]),
    "one element": (prnn.Diagonal(), 1, [[0]]),
    "dense": (prnn.Dense(), 5, [[0, 1, 2, 3, 4]]),
    "dense, large": (prnn.Dense(), 9, [list(range(9))]),
    "contiguous": (prnn.BlockDiagonal.contiguous(3, 2), 6, [[0, 1], [2, 3], [4, 5]]),
    "large blocks": (prnn.BlockDiagonal.contiguous(2, 6), 12, [list(range(6)), list(range(6, 12))]),
    "interleaved": (prnn.BlockDiagonal.interleaved(3, 2), 6, [[0, 3], [1, 4], [2, 5]]),
    "unequal": (prnn.BlockDiagonal(((3,), (0, 2, 5), (1, 4))), 6, [[3], [0, 2, 5], [1, 4]]),
    "backwards": (prnn.BlockDiagonal(((3, 1), (2, 0))), 4, [[3, 1], [2, 0]]),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
BATCHES = [(), (2,), (0,), (3, 2)]


def mask(size, groups):
    out = np.zeros((size, size))
    for group in groups:
        out[np.ix_(group, group)] = 1
    return out


def matrices(case, seed, batch=(), dtype=np.float64):
    """Random full matrices with the zeros of the structure, and their stored form, obtained
    from their products with the seeds."""
    structure, size, groups = case
    full = np.asarray(normal(seed, (*batch, size, size), dtype)) * mask(size, groups).astype(dtype)
    seeds = structure.seeds(size, np.dtype(dtype))
    assert seeds.shape == (structure.num_seeds(size), size) and seeds.dtype == dtype
    images = np.einsum("...ij,sj->...si", full, seeds)
    return full, structure.compress(jnp.asarray(images))


def close(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


@over_cases
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_arithmetic(case, batch):
    structure, size, _ = case
    a, stored_a = matrices(case, 0, batch)
    b, stored_b = matrices(case, 1, batch)
    v = np.asarray(normal(2, (*batch, size)))

    @jax.jit
    def run(a, b, v):
        transposed = structure.transpose(a)
        return (
            structure.apply(a, v),
            structure.apply(transposed, v),
            structure.diagonal(a),
            structure.to_dense(a),
            structure.to_dense(transposed),
            structure.to_dense(structure.compose(a, b)),
        )

    expected = (
        np.einsum("...ij,...j->...i", a, v),
        np.einsum("...ji,...j->...i", a, v),
        np.diagonal(a, axis1=-2, axis2=-1),
        a,
        np.swapaxes(a, -1, -2),
        a @ b,
    )
    for got, want in zip(run(stored_a, stored_b, jnp.asarray(v)), expected, strict=True):
        close(got, want)


@dataclasses.dataclass(frozen=True)
class Minimal(prnn.AbstractStructure):
    """A structure with the required methods only, for the defaults of the others."""

    full: prnn.AbstractStructure

    def num_seeds(self, size):
        return self.full.num_seeds(size)

    def seeds(self, size, dtype):
        return self.full.seeds(size, dtype)

    def compress(self, tangents):
        return self.full.compress(tangents)

    def apply(self, matrix, vector):
        return self.full.apply(matrix, vector)

    def compose(self, later, earlier):
        return self.full.compose(later, earlier)

    def to_dense(self, matrix):
        return self.full.to_dense(matrix)


@over_cases
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_defaults(case, batch):
    structure, size, groups = case
    a, stored = matrices(case, 0, batch)
    positive, _ = matrices(case, 1, batch)
    positive = positive @ np.swapaxes(positive, -1, -2) + np.eye(size)
    seeds = structure.seeds(size, np.dtype("float64"))
    stored_positive = structure.compress(jnp.einsum("...ij,sj->...si", positive, seeds))
    minimal = Minimal(structure)
    close(minimal.diagonal(stored), np.diagonal(a, axis1=-2, axis2=-1))
    close(minimal.to_dense(minimal.transpose(stored)), np.swapaxes(a, -1, -2))
    eye = minimal.to_dense(minimal.identity(stored))
    close(eye, np.broadcast_to(np.eye(size), (*batch, size, size)))
    inverse = minimal.to_dense(minimal.inverse(stored_positive))
    np.testing.assert_allclose(inverse, np.linalg.inv(positive), rtol=1e-10, atol=1e-11)


@over_cases
def test_products_stay_in_the_structure(case):
    """What padding adds must never show."""
    structure, size, groups = case
    full, stored = matrices(case, 0)
    power, stored_power = full, stored
    for _ in range(3):
        power, stored_power = power @ full, structure.compose(stored_power, stored)
    close(structure.to_dense(stored_power), power)
    assert np.all(np.asarray(structure.to_dense(stored_power))[mask(size, groups) == 0] == 0)
    ones = structure.apply(stored_power, jnp.ones(size))
    close(ones, power.sum(axis=1))


@over_cases
def test_float32(case):
    structure, size, _ = case
    full, stored = matrices(case, 0, dtype=np.float32)
    assert stored.dtype == np.float32
    out = structure.apply(stored, jnp.ones(size, jnp.float32))
    np.testing.assert_allclose(out, full.sum(axis=1), rtol=1e-5, atol=1e-6)


@over_cases
def test_few_seeds(case):
    structure, size, groups = case
    assert structure.num_seeds(size) == max(map(len, groups))


@over_cases
def test_hashable(case):
    structure, size, groups = case
    assert hash(structure) == hash(structure)
    assert structure == structure
    structure.check(size)
    others = [other for other, *_ in CASES.values() if other is not structure]
    assert all(structure != other or type(structure) is type(other) for other in others)


def test_equal_groups_are_equal_structures():
    assert prnn.BlockDiagonal.contiguous(2, 1) == prnn.BlockDiagonal(((0,), (1,)))
    assert prnn.BlockDiagonal.interleaved(1, 3) == prnn.BlockDiagonal.contiguous(1, 3)


@pytest.mark.parametrize(
    "name", ["contiguous", "interleaved", "unequal", "backwards", "large blocks", "dense"]
)
def test_restriction(name):
    """The part of a matrix that another structure holds."""
    structure, size, groups = case = CASES[name]
    full, stored = matrices(case, 0, (2,))
    close(prnn.Diagonal().restrict(structure, stored), np.diagonal(full, axis1=-2, axis2=-1))
    dense, stored_dense = matrices((prnn.Dense(), size, [list(range(size))]), 1, (2,))
    if isinstance(structure, prnn.BlockDiagonal):
        part = structure.restrict(prnn.Dense(), stored_dense)
        close(structure.to_dense(part), dense * mask(size, groups))


@over_cases
def test_everything_is_part_of_a_dense_matrix(case):
    structure, _, _ = case
    full, stored = matrices(case, 0, (2,))
    close(prnn.Dense().restrict(structure, stored), full)


def test_a_part_that_holds_more_is_padded_with_zeros():
    part = prnn.BlockDiagonal.contiguous(2, 2).restrict(prnn.Diagonal(), jnp.arange(1.0, 5.0))
    np.testing.assert_array_equal(part, [np.diag([1.0, 2.0]), np.diag([3.0, 4.0])])


@pytest.mark.parametrize(
    "groups, message",
    [
        ((), "at least one group"),
        (((0,), ()), "no empty ones"),
        (((0, 1), (1, 2)), "exactly once"),
        (((0, 2),), "exactly once"),
        (((1, 2),), "exactly once.* from 1 to 2"),
        (((-1, 0),), "exactly once"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(ValueError, match=f"`groups`.*{message}"):
        prnn.BlockDiagonal(groups)


def test_wrong_size():
    with pytest.raises(ValueError, match="`structure`.*6 elements.*has 4"):
        prnn.BlockDiagonal.contiguous(3, 2).check(4)
    prnn.Diagonal().check(4)
    prnn.Dense().check(4)
