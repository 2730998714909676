"""Structures of a step's Jacobian: what is known of its zeros, and how it is found."""

from ._base import AbstractStructure as AbstractStructure
from ._block_diagonal import BlockDiagonal as BlockDiagonal
from ._dense import Dense as Dense
from ._detection import detect_structure as detect_structure
from ._detection import is_affine as is_affine
from ._diagonal import Diagonal as Diagonal
