"""Selects solver and adjoint from platform, structure and shapes; rejects invalid combinations."""

import math
from typing import Any, NamedTuple

from jaxtyping import PyTree

from ._misc import is_symbolic
from ._platform import chosen_platform, kernels_enabled
from ._recurrence import Recurrence
from ._step_properties import listed
from ._tracing import on_mesh
from .adjoints import AbstractAdjoint, ClippedAdjoint, LinearSolveAdjoint, OnePassAdjoint
from .adjoints._wrapped import as_adjoint, default_adjoint
from .sharding._mesh import TimeAxis, find_time_axis, time_axis_of
from .solvers import AbstractSolver, AssociativeScan, ElementwiseNewton, Newton, Sequential
from .solvers._base import check_sharding
from .solvers._time_sharded import default_sharded_solver
from .sweeps import Fused
from .sweeps._default import uses_kernel, why_no_kernel

# Beyond this many state elements a dense Newton correction costs more than the sweeps that it
# saves.
_MAX_DENSE_SIZE = 128
# A dense Jacobian of more elements than this is replaced by its elementwise part, if that takes at
# most so many tangents.
_MIN_MIXED_SIZE, _FEW_SEEDS = 16, 4
# The arithmetic of the choice, for a large accelerator: products of float32 per second; what a step
# of a loop takes to launch, and in a kernel; what a parallel solve takes in all, but products; and
# how many times it makes every step, six of them for the verdict.
_FLOPS, _STEP_SECONDS, _KERNEL_SECONDS = 5e13, 16e-6, 1e-6
_OVERHEAD_SECONDS, _SWEEPS = 1e-3, 16
# The derivative makes each step once more, and pulls the states' and the parameters' cotangents.
_BACKWARD = 3
# Shorter sequences are over before a parallel solve has begun.
_MIN_LENGTH = 64


def inner(policy: Any) -> Any:
    """The solver inside `TimeSharded`; any other solver or adjoint itself."""
    return policy.inner if isinstance(policy, AbstractSolver) else policy


def time_axis(
    solver: AbstractSolver | None,
    adjoint: AbstractSolver | AbstractAdjoint | None,
    arrays: tuple[PyTree[Any], PyTree[Any]],
) -> TimeAxis | None:
    """The mesh axis along which time is sharded: that of `solver` or `adjoint`, or without a solver
    that of the inputs; `None` for one device.

    Raises a `ValueError` if they contradict each other.

    **Arguments:**

    - `solver`, `adjoint`: as passed by the user.
    - `arrays`: the inputs of the recurrence, and the state before the first step.
    """
    named = [policy.axis for policy in (solver, adjoint) if policy is not None]
    axes = {axis for axis in named if axis is not None}
    if len(axes) > 1:
        raise ValueError(f"`solver` and `adjoint` cut time along different axes: {axes}.")
    if not axes and not on_mesh(arrays):
        return None
    lies = time_axis_of(arrays[0])
    if not axes and lies is not None and solver is not None:
        raise ValueError(
            "`xs` is sharded along its leading axis, which is time, over the mesh axis "
            f"{lies!r}. Use `solver=pararnn.TimeSharded({lies!r}, {type(solver).__name__}(…))`; or "
            "shard a batch of sequences instead, and use `jax.vmap`."
        )
    axis = next(iter(axes), lies)
    return None if axis is None else find_time_axis(axis, arrays)


class Choice(NamedTuple):
    """Solver and adjoint with all options resolved, so that nothing depends on the platform any
    more; and the reasons."""

    solver: AbstractSolver
    adjoint: AbstractAdjoint
    reason: str
    adjoint_reason: str


def choose(
    recurrence: Recurrence,
    solver: AbstractSolver | None = None,
    adjoint: AbstractSolver | AbstractAdjoint | None = None,
    *,
    platform: str | None = None,
    batch: int = 1,
) -> Choice:
    """Replaces `None` by defaults, replaces adjoints that the step does not support, and resolves
    all options.

    Raises a `ValueError` for a step that exchanges values with other sequences and anything but
    one step after another: under `jax.vmap`, loops that turn a different number of times for each
    sequence let one that is done meet the others at any of its steps; and the derivative's
    recurrence is not one for each sequence.

    **Arguments:**

    - `recurrence`: the problem; its arrays may be abstract.
    - `solver`, `adjoint`: as passed by the user.
    - `platform`: `None` is that of JAX.
    - `batch`: the number of sequences under `jax.vmap`, a hint.
    """
    platform = chosen_platform(platform)
    _check_shared_axes(recurrence, solver=solver, adjoint=adjoint)
    for name, policy in (("solver", solver), ("adjoint", adjoint)):
        if policy is not None and recurrence.shards.is_sharded:
            check_sharding(name, policy)
    if is_symbolic(recurrence.length):
        return _choose_for_any_length(recurrence, solver, adjoint)
    reason = "It was asked for."
    if solver is None:
        solver, reason = _select_solver(recurrence, platform, batch)
    adjoint, adjoint_reason = _select_adjoint(recurrence, adjoint, platform, batch)
    return Choice(
        solver.resolved(recurrence, platform),
        adjoint.resolved(recurrence, platform, batch),
        reason,
        adjoint_reason,
    )


def _choose_for_any_length(
    recurrence: Recurrence,
    solver: AbstractSolver | None,
    adjoint: AbstractSolver | AbstractAdjoint | None,
) -> Choice:
    """The choice for a symbolic length, as of an export: one step after another."""
    if recurrence.shards.is_sharded or not (solver is None or solver.stepwise):
        name = "TimeSharded" if solver is None else type(solver).__name__
        raise ValueError(
            f"`xs` has the symbolic length {recurrence.length}, but `solver={name}(…)` cuts a "
            "sequence into parts, whose number must be known when the program is traced. Export "
            "with `solver=None` or `solver=pararnn.Sequential()`, or a program for each length."
        )
    reason = "The length is symbolic, and only steps can be made without knowing it."
    # An adjoint that was asked for counts if there is a derivative; most exports have none.
    chosen = OnePassAdjoint(1) if adjoint is None else as_adjoint(adjoint)
    if chosen.stepwise:
        chosen = OnePassAdjoint(1)
    solver = Sequential() if solver is None else solver
    return Choice(solver, chosen, reason, reason)


def _check_shared_axes(recurrence: Recurrence, **policies: AbstractSolver | AbstractAdjoint | None):
    if recurrence.shards.is_sharded and recurrence.shared_axes:
        raise ValueError(
            f"`step` exchanges values along {listed(recurrence.shared_axes)}: the sequences of a "
            "batch must go through their steps together, which cannot lie on several devices."
        )
    for name, value in policies.items():
        if value is None or value.stepwise or not recurrence.shared_axes:
            continue
        raise ValueError(
            f"`{name}={type(value).__name__}(…)` treats each sequence by itself, but "
            f"`step` exchanges values along {listed(recurrence.shared_axes)}: use `{name}=None` or "
            f"`{name}=pararnn.Sequential()`. To solve such a recurrence in parallel, make "
            "the batch an axis of the state, and reduce over it."
        )


def _mixes(recurrence: Recurrence) -> bool:
    """Whether the Jacobian is too dense for Newton's method, but its elementwise part is not."""
    if recurrence.algebra is not None or recurrence.is_affine:
        return False  # such as a delta rule, which remembers through its products alone
    seeds, size = recurrence.structure.num_seeds(recurrence.size), recurrence.size
    if seeds <= (_MIN_MIXED_SIZE if seeds == size else _MAX_DENSE_SIZE):
        return False
    part = recurrence.elementwise.structure
    if part is None:  # a state without gates
        return size > _MAX_DENSE_SIZE
    return part.num_seeds(size) <= _FEW_SEEDS


def _estimate(
    recurrence: Recurrence, platform: str, batch: int, factor: int = 1
) -> tuple[float, float, str]:
    """About how many seconds the steps take one after another and in parallel, and a sentence that
    says so. A step takes `factor` times its operations."""
    length, per_step = recurrence.length, factor * batch * recurrence.flops / _FLOPS
    kernel = uses_kernel(recurrence.step, recurrence.init, recurrence.xs, platform)
    step_seconds = _KERNEL_SECONDS if kernel else _STEP_SECONDS
    sequential = length * (step_seconds + per_step)
    parallel = _OVERHEAD_SECONDS + _SWEEPS * length * per_step
    rows = f"{batch} sequences" if batch > 1 else "a sequence"
    sentence = (
        f"By arithmetic, {length} steps of {rows} take about {1e3 * sequential:.3g} ms one "
        f"after another and {1e3 * parallel:.3g} ms in parallel."
    )
    return sequential, parallel, sentence


def _select_solver(recurrence: Recurrence, platform: str, batch: int) -> tuple[AbstractSolver, str]:
    length, size = recurrence.length, recurrence.size
    where = f" on each of {recurrence.shards.count} devices" if recurrence.shards.is_sharded else ""
    if recurrence.shards.is_sharded and platform == "cpu":
        return default_sharded_solver(recurrence, platform), (
            "On CPU devices, the part of each starts 128 steps early: if the state is forgotten by "
            "then, all devices together do the work of one pass of `lax.scan`."
        )
    if platform == "cpu":
        return Sequential(), (
            "On a CPU, one pass of `lax.scan` is near the machine's limit; parallel sweeps do the "
            "same work several times. The backward pass has its own choice (`adjoint`)."
        )
    if recurrence.shared_axes:
        return Sequential(), (
            f"The step exchanges values along {listed(recurrence.shared_axes)}: the sequences of a "
            "batch are one coupled recurrence, and must go through their steps together."
        )
    if not recurrence.has_tangents:
        return Sequential(), (
            "The step has no derivative in forward mode (a `jax.custom_vjp`, a callback, or a "
            "primitive without a rule), which Newton's method needs. If the recurrence forgets its "
            "state, Jacobi() solves it in parallel without one."
        )
    unweighed = ""
    if batch > 1 and not recurrence.shards.is_sharded:
        unweighed = (
            f" A batch of {batch} is not taken into account: where it keeps the device busy, "
            f"Sequential() can be faster; `tune(…, batch_size={batch})` measures it."
        )
    if recurrence.algebra is not None:
        solver = AssociativeScan(algebra=recurrence.algebra)
        return solver, "The cell's steps compose exactly: one associative scan." + unweighed
    if length < _MIN_LENGTH:
        return Sequential(), f"The sequence is short: {length} steps{where}."
    if recurrence.is_affine:
        return AssociativeScan(), (
            "The step is affine in the state: one associative scan solves it without iterating."
            + unweighed
        )
    structure = recurrence.structure
    seeds = structure.num_seeds(size)
    if _mixes(recurrence):
        sequential, parallel, estimate = _estimate(recurrence, platform, batch)
        dense = f"The Jacobian takes {seeds} tangents. "
        if sequential <= parallel:
            return Sequential(), dense + estimate
        solver = ElementwiseNewton().resolved(recurrence, platform)
        assert solver.chunk_size is not None
        return solver, (
            f"{platform}: {dense}ElementwiseNewton drops those that mix the elements, over "
            f"{math.ceil(length / solver.chunk_size)} chunks of {solver.chunk_size} steps{where}. "
            + estimate
        )
    if seeds == size > _MAX_DENSE_SIZE:
        return Sequential(), (
            f"The Jacobian is dense with {size} state elements: each step is a matrix product that "
            "keeps the device busy, and chunk Jacobians would cost that many times more."
        )
    solver = Newton().resolved(recurrence, platform)
    chunk_size = solver.chunk_size
    assert chunk_size is not None
    reason = (
        f"{platform}: the Jacobian is {type(structure).__name__} with {seeds} tangents per sweep; "
        f"Newton over {math.ceil(length / chunk_size)} chunks of {chunk_size} steps{where}"
    )
    if solver.overlap:
        reason += f", which start {solver.overlap} steps early: if the state is forgotten by then"
        reason += ", no tangents are needed"
    if solver.sweep_method == Fused():
        reason += ", in one kernel"
    elif kernels_enabled(platform):
        why = why_no_kernel(recurrence.step, recurrence.init, recurrence.xs)
        reason += f". There is no kernel: {why}"
    return solver, reason + "." + unweighed


def _default_adjoint(
    recurrence: Recurrence, platform: str, batch: int
) -> tuple[AbstractAdjoint, str]:
    chosen = default_adjoint(platform)
    if chosen.stepwise:
        return chosen, f"{platform}: one pass over the steps, which stores no Jacobians."
    if recurrence.has_tangents and _mixes(recurrence):
        sequential, parallel, estimate = _estimate(recurrence, platform, batch, _BACKWARD)
        if sequential <= parallel:
            return OnePassAdjoint(), f"{platform}: one pass over the steps. {estimate}"
        return LinearSolveAdjoint(ElementwiseNewton()), (
            f"{platform}: the derivative's recurrence is linear; ElementwiseNewton drops the "
            f"tangents that mix the elements of a state, and iterates. {estimate}"
        )
    return chosen, (
        f"{platform}: the derivative's recurrence is linear, and one correction of Newton's method."
    )


def _select_adjoint(
    recurrence: Recurrence,
    adjoint: AbstractSolver | AbstractAdjoint | None,
    platform: str,
    batch: int,
) -> tuple[AbstractAdjoint, str]:
    if recurrence.shared_axes:
        return OnePassAdjoint(), (
            f"The step exchanges values along {listed(recurrence.shared_axes)}: the sequences of a "
            "batch must go through their steps together."
        )
    reason = "It was asked for."
    if adjoint is None:
        chosen, reason = _default_adjoint(recurrence, platform, batch)
    else:
        chosen = as_adjoint(adjoint)
    if recurrence.shards.is_sharded and chosen.stepwise and not recurrence.has_all_tangents:
        chosen = LinearSolveAdjoint(default_sharded_solver(recurrence, platform))
    backward = chosen.backward_solver
    if backward is None or recurrence.has_all_tangents:
        return chosen, reason
    # There is no map from tangents to tangents to solve with and to transpose; but what flows back
    # can be solved for.
    reason = "The step has no derivative in forward mode: only what flows back can be solved for."
    if adjoint is None and not recurrence.shards.is_sharded:
        return OnePassAdjoint(), reason
    return ClippedAdjoint(math.inf, backward), reason
