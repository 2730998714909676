"""What judges a recurrence and a solver, and the measuring that it is made of."""

from .._misc import previous_states as previous_states
from .._norms import relative_error as relative_error
from .._recurrence import scan_states as scan_states
from ._agreement import Agreement as Agreement
from ._benchmark import benchmark as benchmark
from ._benchmark import tune as tune
from ._choose import select_adjoint as select_adjoint
from ._choose import select_solver as select_solver
from ._compare import Spread as Spread
from ._compare import compare as compare
from ._compare import interleaved as interleaved
from ._compare import ratio as ratio
from ._compare import spread as spread
from ._compare import temporary_bytes as temporary_bytes
from ._lyapunov import Lyapunov as Lyapunov
from ._lyapunov import lyapunov as lyapunov
from ._measurements import Benchmark as Benchmark
from ._verify import Verification as Verification
from ._verify import verify as verify
