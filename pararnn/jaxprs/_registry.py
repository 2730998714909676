"""The rule of each primitive, JAX's or a user's: how it carries dependence."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex_core
import numpy as np
import scipy.sparse as sp

from ._patterns import (
    Pattern,
    Rule,
    affordable,
    all_to_all,
    elementwise,
    num_columns,
    num_elements,
)
from ._primitives import Kind, primitive
from ._rules import RULES
from ._walk import ENTERED

_registered: dict[str, Rule] = {}


def register_rule(primitive: jex_core.Primitive | str, rule: Rule) -> None:
    """Registers how a primitive of your own carries dependence, for [`pararnn.detect_structure`][]
    and whatever detects the structure of a step.

    Without a rule, every element of a primitive's results depends on every element of its operands:
    sound, but a step that uses it is dense. The rule is called where the primitive has *tangents*
    among its operands, that is, where your derivative rule (`jax.interpreters.ad`) binds it or
    another primitive of yours. It is trusted: a rule that omits a dependence makes solvers that
    rely on the structure slow, or unable to converge. [`pararnn.verify`][] finds such a rule.

    ```python
    swish = jax.extend.core.Primitive("my_swish")
    ...
    pararnn.jaxprs.register_rule(swish, pararnn.jaxprs.elementwise)
    ```

    A rule of your own returns boolean matrices, elements of a value × elements of the state. Here
    result `i` is element `i - 1` of the operand, cyclically:

    ```python
    def shifted(eqn, patterns):
        (pattern,) = patterns
        return [pattern[np.roll(np.arange(pattern.shape[0]), 1)]]
    ```

    **Arguments:**

    - `primitive`: the primitive (`jax.extend.core.Primitive`) or its name.
    - `rule`: `rule(eqn, patterns) -> patterns`, from one [`pararnn.jaxprs.Pattern`][] for each of
        the operands `eqn.invars`, of which at least one is not `None`, to one for each of the
        results `eqn.outvars`. Use [`pararnn.jaxprs.elementwise`][] if each element of a result
        depends only on the elements in the same place. A rule may read shapes and `eqn.params`; it
        must not change its arguments.

    Register before steps are traced: compiled steps do not change. A primitive with effects makes a
    step dense, whatever its rule.

    **Raises:**

    `TypeError` for arguments of another type, `ValueError` for a name that has a rule already, a
    user's or JAX's. When a step is analysed, `ValueError` if the rule returns anything but patterns
    of the right shapes.
    """
    name = check_rule(primitive, rule, "rule(eqn, patterns)")
    if name in ENTERED or name in RULES or name in _registered:
        raise ValueError(
            f"`primitive`: there is a rule for `{name}` already. Rules are looked up by the "
            "primitive's name: if this is another primitive, rename it."
        )
    _registered[name] = rule


def check_rule(primitive: Any, rule: Any, form: str) -> str:
    """The name of the primitive; raises a `TypeError` unless it is one, and `rule` a function of
    the `form` that the message shows."""
    name = primitive.name if isinstance(primitive, jex_core.Primitive) else primitive
    if not isinstance(name, str):
        raise TypeError(
            "`primitive` must be a `jax.extend.core.Primitive` or the name of one; got "
            f"{primitive!r}."
        )
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(f"`rule` must be a function `{form}`; got {rule!r}.")
    return name


def carry(eqn: jex_core.JaxprEqn, patterns: list[Pattern]) -> Sequence[Pattern]:
    """The patterns of the results of an equation, by the rule of its primitive."""
    name = eqn.primitive.name
    if name not in _registered:
        return RULES.get(name, all_to_all)(eqn, patterns)
    try:
        outputs = _registered[name](eqn, list(patterns))
    except Exception as error:
        error.add_note(f"The rule registered for the primitive `{name}` failed.")
        raise
    _check(eqn, outputs, next(num_columns(p) for p in patterns if p is not None))
    return [None if p is None else _clean(p) for p in outputs]


def combines_elements(eqn: jex_core.JaxprEqn) -> bool:
    """Whether an element of a result may combine several elements of one operand, as those of
    `dot_general`, convolutions, reductions and cumulative operations do. True for primitives of
    which nothing is known. Enter an equation that calls or repeats a jaxpr instead."""
    name = eqn.primitive.name
    if name in _registered:
        return _registered[name] is not elementwise
    return primitive(name).kind not in (Kind.ELEMENTWISE, Kind.MOVE)


def _clean(pattern: sp.csr_array) -> sp.csr_array:
    """Removes stored zeros and repeated entries: loops compare numbers of entries."""
    pattern = pattern.copy()
    pattern.sum_duplicates()
    pattern.eliminate_zeros()
    return affordable(pattern)


def _check(eqn: jex_core.JaxprEqn, outputs: Any, width: int) -> None:
    """Raises a `ValueError` unless there is a pattern for each result of the equation."""
    subject = f"The rule registered for the primitive `{eqn.primitive.name}`"
    if not isinstance(outputs, (list, tuple)):
        raise ValueError(
            f"{subject} must return a list of patterns, one for each result; got a "
            f"{type(outputs).__name__}."
        )
    if len(outputs) != len(eqn.outvars):
        raise ValueError(
            f"{subject} must return one pattern for each of the {len(eqn.outvars)} results; got "
            f"{len(outputs)}."
        )
    for i, (pattern, var) in enumerate(zip(outputs, eqn.outvars, strict=True)):
        if pattern is None:
            continue
        expected = (num_elements(var), width)
        if not isinstance(pattern, sp.csr_array):
            got = f"a {type(pattern).__name__}"
        elif pattern.dtype != np.bool_ or pattern.shape != expected:
            got = f"one of dtype {pattern.dtype} and shape {pattern.shape}"
        else:
            continue
        raise ValueError(
            f"{subject} must return, for result {i}, None or a boolean `scipy.sparse.csr_array` "
            f"of shape {expected}, the elements of the result × those of the state; got {got}."
        )
