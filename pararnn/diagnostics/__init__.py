"""Diagnostics of a recurrence and its solvers."""

from .._recurrence import scan_states as scan_states
from ._agreement import Agreement as Agreement
from ._agreement import Error as Error
from ._agreement import relative_error as relative_error
from ._benchmark import benchmark as benchmark
from ._benchmark import tune as tune
from ._choose import select_adjoint as select_adjoint
from ._choose import select_solver as select_solver
from ._compare import Spread as Spread
from ._compare import temporary_bytes as temporary_bytes
from ._lyapunov import Lyapunov as Lyapunov
from ._lyapunov import lyapunov as lyapunov
from ._measurements import Benchmark as Benchmark
from ._rows import Measurement as Measurement
from ._rows import Row as Row
from ._verify import Verification as Verification
from ._verify import verify as verify
