"""Sweeps: how the steps of all chunks of a recurrence are run."""

from ._base import AbstractSweep as AbstractSweep
from ._base import Rows as Rows
from ._fused import Fused as Fused
from ._scanned import Scanned as Scanned
from ._unrolled import Unrolled as Unrolled
