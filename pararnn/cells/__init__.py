"""Recurrences with their parameters. They know nothing of solvers."""

from ._adapters import EquinoxGRU as EquinoxGRU
from ._adapters import EquinoxLSTM as EquinoxLSTM
from ._adapters import from_equinox as from_equinox
from ._base import AbstractCell as AbstractCell
from ._deltanet import DeltaNet as DeltaNet
from ._elman import Elman as Elman
from ._gru import GRU as GRU
from ._gru import DiagonalGRU as DiagonalGRU
from ._lmu import LMU as LMU
from ._lmu import LinearLMU as LinearLMU
from ._lru import LRU as LRU
from ._lstm import LSTM as LSTM
from ._lstm import DiagonalLSTM as DiagonalLSTM
from ._m2rnn import M2RNN as M2RNN
from ._minmax import ClampAlgebra as ClampAlgebra
from ._minmax import MinMax as MinMax
from ._minrnn import MinGRU as MinGRU
from ._minrnn import MinLSTM as MinLSTM
from ._parts import causal_convolution as causal_convolution
from ._plrnn import PiecewiseLinearRNN as PiecewiseLinearRNN
from ._rglru import RGLRU as RGLRU
from ._s5 import S4D as S4D
from ._s5 import S5 as S5
from ._selective_ssm import SelectiveSSM as SelectiveSSM
from ._slstm import SLSTM as SLSTM
