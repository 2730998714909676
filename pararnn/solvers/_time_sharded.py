import dataclasses

from .._one_device import AxisName
from .._platform import chosen_platform
from .._recurrence import Recurrence
from ..sharding._time import axis_names
from ._base import AbstractSolver, check_sharding
from ._fixed_point import Jacobi
from ._newton import Newton

# On a CPU, how many steps early the shard of a device starts. A perturbation that shrinks by a
# factor 0.9 per step has decayed to 1e-6 by then.
OVERLAP = 128


@dataclasses.dataclass(frozen=True)
class TimeSharded(AbstractSolver):
    """Solves a recurrence whose steps lie on several devices, along an axis of a mesh, as one.

    Each device has a part of the sequence, cut into chunks; the iteration is that of the `solver`,
    over the chunks of all devices. A sweep needs no communication; a correction exchanges one
    summary per device (for Newton's method a matrix of the structure and a vector, for Jacobi's
    iteration a vector from neighbour to neighbour), and nothing ever gathers the sequence. The
    sequential finish, where it is needed, goes from device to device.

    To be passed wherever a solver is. The mesh is the one that is set (`jax.set_mesh`), or the one
    on which the inputs lie, with automatic or explicit axes; a length that the number of devices
    does not divide is padded. Within `jax.shard_map` over the axis the inputs are those of the
    device, of the same number of steps on each; so are the states, while `init` and the final state
    are the same everywhere. A batch may lie along another axis of the mesh: `jax.vmap`, with or
    without `spmd_axis_name`.

    The derivative is solved for in the same way. `adjoint=None` chooses: on a CPU one pass over
    the steps of each device, [`pararnn.adjoints.OnePassAdjoint`][].

    **Arguments:**

    - `axis`: the name of the mesh axis, or a tuple of names.
    - `solver`: how to solve; `None` chooses. On a CPU that is [`pararnn.Jacobi`][] with one chunk
        per device, each of which starts 128 steps early: a recurrence that forgets its state within
        these does the work of `lax.scan` once, all devices side by side. One that does not is
        solved device after device.
    """

    axis: AxisName  # pyright: ignore[reportIncompatibleVariableOverride]
    solver: AbstractSolver | None = None

    runs_backwards = True
    supports_sharding = True

    def __post_init__(self):
        names = axis_names(self.axis)
        if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names) or not names:
            raise TypeError(
                f"`axis` must be the name of a mesh axis, or a tuple of names; got {self.axis!r}."
            )
        solver = self.solver
        if solver is None:
            return
        if not isinstance(solver, AbstractSolver) or solver.axis is not None:
            raise TypeError(
                "`solver` must be a solver instance such as Newton(), other than TimeSharded, or "
                f"None; got {solver!r}."
            )
        check_sharding("solver", solver)

    @property
    def inner(self):
        return self.solver

    def solve(self, recurrence, guess, report=None):
        return self._for(recurrence).solve(recurrence, guess, report)

    def solve_affine(self, recurrence):
        return self._for(recurrence).solve_affine(recurrence)

    def with_fallback(self):
        solver = self.solver
        return self if solver is None else TimeSharded(self.axis, solver.with_fallback())

    def resolved(self, recurrence, platform=None):
        solver = (
            default_sharded_solver(recurrence, platform) if self.solver is None else self.solver
        )
        return TimeSharded(self.axis, solver.resolved(recurrence, platform))

    def _for(self, recurrence: Recurrence) -> AbstractSolver:
        if recurrence.shards.axis != self.axis:
            raise ValueError(
                f"`adjoint` has a TimeSharded({self.axis!r}, …), but `solver` has not: both must "
                "cut time along the same axis."
            )
        return default_sharded_solver(recurrence) if self.solver is None else self.solver


def default_sharded_solver(recurrence: Recurrence, platform: str | None = None) -> AbstractSolver:
    """The solver of `TimeSharded(axis)` for a platform."""
    if chosen_platform(platform) == "cpu":
        return Jacobi(chunk_size=recurrence.length, overlap=OVERLAP)
    return Newton()
