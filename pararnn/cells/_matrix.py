"""Cells whose state is one matrix per head, written by keys and values and read by queries."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import AbstractChunkedCell, check_attention
from ._parts import init_linear, split_heads, zero_state


class AbstractMatrixCell(AbstractChunkedCell):
    """A cell with linear maps from inputs to queries, keys and values, and from what the queries
    read to outputs. Its state has shape `(num_heads, key_size, value_size)`, unless the cell says
    otherwise."""

    weight_q: Float[Array, "num_heads*key_size input_size"]
    weight_k: Float[Array, "num_heads*key_size input_size"]
    weight_v: Float[Array, "num_heads*value_size input_size"]
    weight_o: Float[Array, "output_size num_heads*value_size"]
    input_size: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)

    def _init_maps(
        self,
        sizes: tuple[int, int, int, int, int | None],
        dtype: Any,
        keys: Iterable[PRNGKeyArray],
        *,
        num_blocks: int = 1,
    ) -> None:
        """Set the fields above.

        **Arguments:**

        - `sizes`: `(input_size, num_heads, key_size, value_size, output_size)`, which are checked;
            `None` is an `output_size` of `input_size`.
        - `keys`: four.
        - `num_blocks`: into how many blocks on the diagonal the maps of inputs fall; divides their
            sizes.
        """
        output_size = check_attention(*sizes)
        self.input_size, self.num_heads, self.key_size, self.value_size, _ = sizes
        keys_size, values_size = self.num_heads * self.key_size, self.num_heads * self.value_size
        block = self.input_size // num_blocks
        shapes = [(keys_size, block), (keys_size, block), (values_size, block)]
        shapes.append((output_size, values_size))
        weights = [init_linear(key, *s, dtype) for key, s in zip(keys, shapes, strict=True)]
        self.weight_q, self.weight_k, self.weight_v, self.weight_o = weights

    def init_state(self) -> Any:
        return zero_state((self.num_heads, self.key_size, self.value_size), self.weight_k)

    def _heads(self, xs: Float[Array, "L input_size"]) -> list[Float[Array, "L num_heads size"]]:
        """Queries, keys and values of each head, for all steps."""
        maps = (self.weight_q, self.weight_k, self.weight_v)
        return [split_heads(xs @ weight.T, self.num_heads) for weight in maps]
