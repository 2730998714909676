"""Do the parallel solvers compute the same model, and the same gradients, as the sequential run?"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import pararnn as prnn
from pararnn.diagnostics import relative_error

from ._language_model import LanguageModel, bits_per_character, predict, with_solver
from ._text import Windows

# The largest differences that float32 arithmetic explains, relative to the largest magnitude.
LOGITS_TOLERANCE, GRADIENTS_TOLERANCE = 1e-5, 1e-4


class Agreement(NamedTuple):
    """One row of the table: how a solver compares with the sequential run.

    - `logits`, `gradients`: the largest difference in any array, relative to the largest magnitude
        in that array.
    - `iterations`, `steps_in_a_row`: for each block the most that any window needed. A sequential
        run makes as many steps in a row as the window is long.
    """

    solver: str
    logits: float
    gradients: float
    iterations: list[int]
    steps_in_a_row: list[int]


def compare_solvers(
    model: LanguageModel, windows: Windows, solvers: dict[str, prnn.AbstractSolver | None]
) -> list[Agreement]:
    """Measures solvers against `Sequential`, which also solves its derivative one step after
    another. Same weights, same text; the derivatives of the others are solved as the package
    chooses.

    **Arguments:**

    - `model`, `windows`: what to compute.
    - `solvers`: by their names in the table; `None` is the package's choice.
    """
    sequential = with_solver(model, prnn.Sequential(), adjoint=prnn.Sequential())
    expected_logits, expected_gradients, _ = _evaluate(sequential, windows)
    rows = []
    for name, solver in solvers.items():
        logits, gradients, stats = _evaluate(with_solver(model, solver), windows)
        rows.append(
            Agreement(
                name,
                relative_error(logits, expected_logits),
                relative_error(gradients, expected_gradients),
                [int(jnp.max(block.iterations)) for block in stats],
                [int(jnp.max(block.sequential_steps)) for block in stats],
            )
        )
    return rows


def report(
    title: str,
    model: LanguageModel,
    windows: Windows,
    solvers: dict[str, prnn.AbstractSolver | None],
) -> list[Agreement]:
    """Prints what `compare_solvers` finds, and ends the program if a solver disagrees."""
    rows = compare_solvers(model, windows, solvers)
    line = "  {:<28}{:>9}{:>11}   {:<12}{}".format
    print(f"{title}\n" + line("solver", "logits", "gradients", "iterations", "steps in a row"))
    for row in rows:
        iterations, steps = (", ".join(map(str, n)) for n in (row.iterations, row.steps_in_a_row))
        print(line(row.solver, f"{row.logits:.1e}", f"{row.gradients:.1e}", iterations, steps))
    for row in rows:
        check(row)
    return rows


def check(row: Agreement) -> None:
    """Ends the program if a solver differs by more than rounding."""
    if not (row.logits <= LOGITS_TOLERANCE and row.gradients <= GRADIENTS_TOLERANCE):
        raise SystemExit(
            f"error: {row.solver} does not agree with the sequential run: relative difference "
            f"{row.logits:.1e} in the logits (allowed: {LOGITS_TOLERANCE:.0e}), "
            f"{row.gradients:.1e} in the gradients (allowed: {GRADIENTS_TOLERANCE:.0e})."
        )


@eqx.filter_jit
def _evaluate(model: LanguageModel, windows: Windows):
    def loss(model):
        logits = predict(model, windows)
        return bits_per_character(logits, windows), logits

    # Accelerators round the factors of a product unless told otherwise; that would hide everything.
    with jax.default_matmul_precision("highest"):
        (_, logits), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        return logits, gradients, jax.vmap(model.solver_stats)(windows[:, :-1])
