"""The derivative of the states of a solve: the ways to it."""

from ._base import AbstractAdjoint as AbstractAdjoint
from ._base import AbstractLinearAdjoint as AbstractLinearAdjoint
from ._clipped import ClippedAdjoint as ClippedAdjoint
from ._linear_solve import LinearSolveAdjoint as LinearSolveAdjoint
from ._one_pass import OnePassAdjoint as OnePassAdjoint
