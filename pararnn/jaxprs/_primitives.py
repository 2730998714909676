"""The table of JAX's primitives: which elements they combine, what they cost, whether they round.

Structure detection, counting, the kernels and Monte Carlo arithmetic all read it. Primitives that
call or repeat a jaxpr are not in it: `_walk.py` enters those.
"""

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """How the elements of a result come from those of the operands."""

    ELEMENTWISE = "from the elements in the same place"
    MOVE = "from one element in any place"
    REDUCTION = "from the elements along some axes"
    CUMULATIVE = "from the elements before it along an axis"
    CONTRACTION = "from the elements along the contracted axes of two operands"
    OTHER = "from any elements"


class Cost(enum.Enum):
    """The work and the memory traffic of a primitive."""

    FREE = "neither: the compiler uses the operand where it is"
    COPY = "reads the operands and writes the results, without arithmetic"
    SLICE = "reads only the elements that it returns"
    UPDATE = "reads and writes only the elements that are updated"
    COMPUTE = "reads the operands, computes, and writes the results"


class Primitive(NamedTuple):
    """A row of the table.

    **Fields:**

    - `kind`: which elements of the operands an element of a result combines.
    - `cost`: work and memory traffic.
    - `exact`: it rounds no floating-point number.
    - `linear`: it is linear over the reals, jointly in its inexact operands: the real and imaginary
        parts of complex operands do not mix.
    """

    kind: Kind = Kind.OTHER
    cost: Cost = Cost.COMPUTE
    exact: bool = False
    linear: bool = False


def _rows(
    names: str, kind: Kind, cost: Cost = Cost.COMPUTE, *, exact: bool = False, linear: bool = False
) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), Primitive(kind, cost, exact, linear))


_PRIMITIVES = {
    # Moves.
    **_rows(
        "broadcast_in_dim expand_dims reshape squeeze",
        Kind.MOVE, Cost.FREE, exact=True, linear=True,
    ),
    **_rows(
        "concatenate pad rev split stack tile transpose unstack",
        Kind.MOVE, Cost.COPY, exact=True, linear=True,
    ),
    **_rows("dynamic_slice gather slice", Kind.MOVE, Cost.SLICE, exact=True, linear=True),
    **_rows("dynamic_update_slice scatter", Kind.MOVE, Cost.UPDATE, exact=True, linear=True),
    # Elementwise.
    **_rows(
        "name pcast pvary reshard sharding_constraint stop_gradient",
        Kind.ELEMENTWISE, Cost.FREE, exact=True, linear=True,
    ),
    **_rows(
        "copy copy_p optimization_barrier select_n",
        Kind.ELEMENTWISE, Cost.COPY, exact=True, linear=True,
    ),
    **_rows("complex imag real", Kind.ELEMENTWISE, Cost.COPY, exact=True),
    **_rows("convert_element_type reduce_precision", Kind.ELEMENTWISE, Cost.COPY),
    **_rows("neg", Kind.ELEMENTWISE, exact=True, linear=True),
    **_rows("add add_any sub", Kind.ELEMENTWISE, linear=True),
    **_rows(
        "abs and ceil clamp clz conj eq floor ge gt is_finite le lt max min ne not or "
        "population_count round shift_left shift_right_arithmetic shift_right_logical sign xor",
        Kind.ELEMENTWISE, exact=True,
    ),
    **_rows(
        "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma div "
        "erf erf_inv erfc exp exp2 expm1 igamma igammac integer_pow lgamma log log1p log2 logistic "
        "mul nextafter one_minus_square polygamma pow regularized_incomplete_beta rem rsqrt sin "
        "sinh sqrt square tan tanh zeta",
        Kind.ELEMENTWISE,
    ),
    # Over several elements.
    **_rows("reduce_sum", Kind.REDUCTION, linear=True),
    **_rows("reduce_prod", Kind.REDUCTION),
    **_rows(
        "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_xor",
        Kind.REDUCTION, exact=True,
    ),
    **_rows("scatter-add", Kind.REDUCTION, Cost.UPDATE, linear=True),
    **_rows("cumsum", Kind.CUMULATIVE, linear=True),
    **_rows("cumlogsumexp cumprod", Kind.CUMULATIVE),
    **_rows("cummax cummin", Kind.CUMULATIVE, exact=True),
    **_rows("conv_general_dilated dot_general ragged_dot_general", Kind.CONTRACTION),
    # Others of which something is known.
    **_rows("sort", Kind.OTHER, exact=True),
    **_rows("bitcast_convert_type iota", Kind.OTHER, Cost.COPY, exact=True),
}  # fmt: skip


def primitive(name: str) -> Primitive:
    """The row of a primitive. One that is not in the table may combine any elements, and rounds."""
    return _PRIMITIVES.get(name, Primitive())


def names(kind: Kind) -> list[str]:
    """The primitives of a kind."""
    return [name for name, row in _PRIMITIVES.items() if row.kind is kind]
