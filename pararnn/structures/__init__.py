"""Structures of a step's Jacobian: its zero pattern, and detecting it."""

from ._base import AbstractStructure as AbstractStructure
from ._block_diagonal import BlockDiagonal as BlockDiagonal
from ._dense import Dense as Dense
from ._detection import detect_structure as detect_structure
from ._detection import is_affine as is_affine
from ._diagonal import Diagonal as Diagonal
