"""Equinox modules that put cells and solvers together."""

from ._base import AbstractLayer as AbstractLayer
from ._blocks import GatedBlock as GatedBlock
from ._blocks import ResidualBlock as ResidualBlock
from ._minmax_block import minmax_block as minmax_block
from ._published import gated_deltanet_block as gated_deltanet_block
from ._published import mamba_block as mamba_block
from ._published import mlstm_block as mlstm_block
from ._published import slstm_block as slstm_block
from ._rnn import RNN as RNN
from ._stack import Bidirectional as Bidirectional
from ._stack import Stack as Stack
from ._torch import from_torch as from_torch
