"""Prefix scans of associative operations, and linear recurrences."""

from ._associative import Associative as Associative
from ._base import AbstractScan as AbstractScan
from ._linear import linear_recurrence as linear_recurrence
from ._radix import Radix as Radix
from ._sequential import Sequential as Sequential
