"""The derivative of the states of a solve: the ways to it."""

from ._base import AbstractAdjoint as AbstractAdjoint
from ._base import AbstractLinearAdjoint as AbstractLinearAdjoint
from ._clipped import ClippedAdjoint as ClippedAdjoint
from ._linear_solve import LinearSolveAdjoint as LinearSolveAdjoint
from ._one_pass import OnePassAdjoint as OnePassAdjoint
from ._wrapped import as_adjoint as as_adjoint
from ._wrapped import default_adjoint as default_adjoint
