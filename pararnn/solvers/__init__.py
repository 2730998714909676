"""The methods: hyperparameters of one iteration. They know step functions, never cells."""

from ._base import AbstractSolver as AbstractSolver
from ._base import Report as Report
from ._base import SolverOutput as SolverOutput
from ._chunks import Chunks as Chunks
from ._chunks import Point as Point
from ._convergence import StepReport as StepReport
from ._damped import LevenbergMarquardt as LevenbergMarquardt
from ._elementwise import ElementwiseNewton as ElementwiseNewton
from ._exact import AssociativeScan as AssociativeScan
from ._fixed_point import Jacobi as Jacobi
from ._fixed_point import Picard as Picard
from ._iteration import Correction as Correction
from ._linearization import Linearization as Linearization
from ._newton import Newton as Newton
from ._newton import QuasiNewton as QuasiNewton
from ._sequential import Sequential as Sequential
from ._shooting import AbstractIterativeSolver as AbstractIterativeSolver
from ._speculative import Speculative as Speculative
from ._time_sharded import TimeSharded as TimeSharded
