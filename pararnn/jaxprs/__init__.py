"""Analysis of jaxprs: the dependence of outputs on inputs, and costs."""

from ._patterns import Pattern as Pattern
from ._patterns import Rule as Rule
from ._patterns import all_to_all as all_to_all
from ._patterns import elementwise as elementwise
from ._registry import register_rule as register_rule
