"""Sweeps of a user's step as one kernel of an accelerator."""

from ._registry import register_rule as register_rule
from ._sweep import fused_sweep as fused_sweep
from ._sweep import unsupported as unsupported
