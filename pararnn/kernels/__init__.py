"""Kernels of an accelerator, generated from a user's step."""

from ._registry import register_rule as register_rule
from ._sweep import fused_sweep as fused_sweep
from ._sweep import unsupported as unsupported
