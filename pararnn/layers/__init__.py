"""Equinox modules that put cells and solvers together."""

from ._blocks import AbstractBlock as AbstractBlock
from ._blocks import ResidualBlock as ResidualBlock
from ._gated_block import GatedBlock as GatedBlock
from ._minmax_block import MinMaxBlock as MinMaxBlock
from ._rnn import RNN as RNN
from ._stack import Bidirectional as Bidirectional
from ._stack import Stack as Stack
from ._torch import TorchRNN as TorchRNN
from ._torch import from_torch as from_torch
