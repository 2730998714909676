"""Recurrences with their parameters. They know nothing of solvers."""

from ._adapters import EquinoxGRU as EquinoxGRU
from ._adapters import EquinoxLSTM as EquinoxLSTM
from ._adapters import from_equinox as from_equinox
from ._base import AbstractCell as AbstractCell
from ._deltanet import DeltaNet as DeltaNet
from ._elman import Elman as Elman
from ._gru import GRU as GRU
from ._gru import DiagonalGRU as DiagonalGRU
from ._lru import LRU as LRU
from ._lstm import LSTM as LSTM
from ._lstm import DiagonalLSTM as DiagonalLSTM
from ._m2rnn import M2RNN as M2RNN
from ._minmax import ClampAlgebra as ClampAlgebra
from ._minmax import MinMax as MinMax
from ._parts import causal_convolution as causal_convolution
from ._plrnn import PiecewiseLinearRNN as PiecewiseLinearRNN
from ._slstm import SLSTM as SLSTM
