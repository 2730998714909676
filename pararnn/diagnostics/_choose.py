"""The solver and the adjoint that a step, a cell or a layer would get, and why."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._algebra import AbstractAlgebra
from .._checks import ExplainedStep
from .._misc import num_steps
from .._platform import check_platform
from .._recurrence import Recurrence, precise
from .._select import Choice, choose, inner, time_axis
from ..adjoints import AbstractAdjoint
from ..sharding._mesh import TimeAxis, over_devices
from ..sharding._placement import mesh_context
from ..sharding._time import TimeShards
from ..solvers import AbstractSolver, TimeSharded
from ..structures import AbstractStructure
from ._arguments import AnyRecurrence, SolveArguments, check_batch_size, solve_arguments


def select_solver(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    structure: AbstractStructure | None = None,
    algebra: AbstractAlgebra | None = None,
    platform: str | None = None,
    batch_size: int | None = None,
) -> tuple[AbstractSolver, str]:
    """The solver that `solve(..., solver=None)` would use, or that a layer uses, and why.

    All its options are resolved, chunk size and scan included: passed to `solve` with the adjoint
    of [`pararnn.select_adjoint`][], it gives the program of `platform` on any platform.

    If `xs` is sharded along time, or the layer's solver is a [`pararnn.TimeSharded`][], it is a
    `TimeSharded` with the choice for the shard of one device. Nothing is run: the mesh, set or that
    of `xs`, may be abstract, with more devices than there are. For example, for 64 GPUs:

        mesh = jax.sharding.AbstractMesh((64,), ("time",))
        time = jax.NamedSharding(mesh, jax.P("time"))
        xs = jax.ShapeDtypeStruct((65536, 32), jnp.float32, sharding=time)
        solver, reason = select_solver(step, xs, init, platform="cuda")

    **Arguments:**

    - `recurrence`: a step function `step(state, x)`; or a cell or an [`pararnn.RNN`][].
    - `xs`, `init`: for a step function, as for [`pararnn.solve`][]; for a cell or a layer, the
        inputs of the layer, and `init` may be left out. Only shapes, dtypes and shardings matter,
        so `jax.ShapeDtypeStruct`s will do.
    - `structure`, `algebra`: as for [`pararnn.solve`][].
    - `platform`: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`; `None` is
        `jax.default_backend()`.
    - `batch_size`: how many such sequences there are at once. The choice of
        [`pararnn.ElementwiseNewton`][] depends on it; of another solver, the reason says how to
        measure whether it should, on one device.

    **Returns:**

    `(solver, reason)`.

    **Raises:**

    `ValueError` or `TypeError`, naming the argument; as `solve` does, for a `TimeSharded` where
    there is no mesh.
    """
    arguments, choice = _choose(
        recurrence,
        xs,
        init,
        structure=structure,
        algebra=algebra,
        platform=platform,
        batch_size=batch_size,
    )
    reason = choice.reason
    if inner(arguments.solver) is not None:
        reason = "The layer was made with this solver."
    layer = arguments.layer
    if layer is not None and layer.is_chunkwise:
        reason += (
            f" That is for the states: a call of the layer, which returns outputs, goes through "
            f"chunks of {layer.cell.chunk_size} steps by products of matrices."
        )
    return choice.solver, reason


def select_adjoint(
    recurrence: AnyRecurrence,
    xs: PyTree[Any],
    init: PyTree[Any] | None = None,
    *,
    structure: AbstractStructure | None = None,
    platform: str | None = None,
    batch_size: int | None = None,
) -> tuple[AbstractAdjoint, str]:
    """The adjoint that `solve(..., adjoint=None)` would use, or that a layer uses, and why.

    The arguments are those of [`pararnn.select_solver`][]; all options of the result are resolved,
    too. The choice depends on `batch_size`. If time is sharded, it is the adjoint of each shard,
    for `solve` beside that solver.

    **Returns:**

    `(adjoint, reason)`.

    **Raises:**

    `ValueError` or `TypeError`, naming the argument.
    """
    arguments, choice = _choose(
        recurrence, xs, init, structure=structure, platform=platform, batch_size=batch_size
    )
    if inner(arguments.adjoint) is not None:
        return choice.adjoint, "The layer was made with this adjoint."
    return choice.adjoint, choice.adjoint_reason


def _choose(
    recurrence, xs, init, *, structure=None, algebra=None, platform=None, batch_size=None
) -> tuple[SolveArguments, Choice]:
    check_batch_size(batch_size)
    platform = check_platform(platform)
    batch = 1 if batch_size is None else batch_size
    with mesh_context((xs, init, recurrence)):
        arguments = solve_arguments(
            recurrence, xs, init, structure=structure, algebra=algebra, abstract=True
        )
        arrays = arguments.xs, (arguments.layer, arguments.state)
        time = (
            time_axis(arguments.solver, arguments.adjoint, arrays)
            if num_steps(arguments.us)
            else None
        )
        if time is not None:
            return arguments, _choose_across(arguments, time, platform, batch)
    stated = Recurrence(
        arguments.step,
        arguments.us,
        arguments.init,
        structure=arguments.structure,
        algebra=arguments.algebra,
    )
    return arguments, choose(
        stated, arguments.solver, arguments.adjoint, platform=platform, batch=batch
    )


def _choose_across(arguments: SolveArguments, time: TimeAxis, platform: str, batch: int) -> Choice:
    """The choice for the shard of one device, made inside `shard_map` as by `solve`. It is only
    traced, so the mesh may be abstract."""
    choices: list[Choice] = []
    arrays, rest = eqx.partition(arguments.step, eqx.is_array)

    def choose_part(us, whole, real):
        arrays, init = whole
        step = precise(ExplainedStep(eqx.combine(arrays, rest)))
        shards = TimeShards(axis=time.axis)
        step, _, (us, init) = shards.convert_step(step, us, init, (us, init))
        part = Recurrence(
            step,
            us,
            init,
            structure=arguments.structure,
            algebra=arguments.algebra,
            row_shards=shards,
            mask=real,
        )
        solver, adjoint = inner(arguments.solver), inner(arguments.adjoint)
        choices.append(choose(part, solver, adjoint, platform=platform, batch=batch))
        return (), ()

    def choose_anywhere(us, whole):
        if time.mesh is None:
            return choose_part(us, whole, None)
        return over_devices(time, choose_part, us, whole)

    jax.eval_shape(choose_anywhere, arguments.us, (arrays, arguments.init))
    choice = choices[0]
    return choice._replace(solver=TimeSharded(time.axis, choice.solver))
