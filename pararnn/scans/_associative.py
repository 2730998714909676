import dataclasses

import jax

from ._base import AbstractScan


@dataclasses.dataclass(frozen=True)
class Associative(AbstractScan):
    """`jax.lax.associative_scan`: a tree of logarithmic depth."""

    def prefixes(self, combine, elements, *, reverse=False):
        return jax.lax.associative_scan(jax.vmap(combine), elements, reverse=reverse)
