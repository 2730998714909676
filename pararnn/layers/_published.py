"""The blocks of published models, as functions that put cells into the blocks of this package."""

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from ..cells import MLSTM, SLSTM, DeltaNet, SelectiveSSM
from ..solvers import AbstractSolver
from ._blocks import GatedBlock, ResidualBlock
from ._rnn import RNN


def mamba_block(
    width: int,
    *,
    expand: int = 2,
    state_size: int = 16,
    solver: AbstractSolver | None = None,
    dropout: float = 0.0,
    dtype: Any = None,
    key: PRNGKeyArray,
) -> GatedBlock:
    """The block of Mamba (Gu, Dao, *Mamba: linear-time sequence modeling with selective state
    spaces*, 2023): a [`pararnn.GatedBlock`][] around a [`pararnn.SelectiveSSM`][], which has the
    short convolution inside.

    **Arguments:**

    - `width`, `dropout`, `dtype`, `key`: as for [`pararnn.GatedBlock`][].
    - `expand`: how many times as many features the cell has.
    - `state_size`: the number of state elements for each of these.
    - `solver`: as for [`pararnn.RNN`][].
    """
    key_cell, key_block = jax.random.split(key)
    inner_size = expand * width
    cell = SelectiveSSM(inner_size, state_size, dtype=dtype, key=key_cell)
    rnn = RNN(cell, solver=solver)
    return GatedBlock(width, inner_size, rnn, dropout=dropout, dtype=dtype, key=key_block)


def mlstm_block(
    width: int,
    *,
    expand: int = 2,
    num_heads: int = 4,
    conv_width: int = 4,
    block_size: int = 4,
    solver: AbstractSolver | None = None,
    dropout: float = 0.0,
    dtype: Any = None,
    key: PRNGKeyArray,
) -> GatedBlock:
    r"""The mLSTM block of xLSTM, with its projection up before the recurrence (Beck et al.,
    *xLSTM: Extended long short-term memory*, 2024). With $u = W_x n$ and
    $c = \mathrm{SiLU}(\mathrm{conv}(u))$,

    $$y = x + W_o \left((\mathrm{norm}(\mathrm{mLSTM}(q, k, v)) + D ⊙ c)
    ⊙ \mathrm{SiLU}(W_g n)\right).$$

    $q$ and $k$ are block-diagonal maps of $c$, $v$ is one of $u$, the norm is of each head, and
    $D$, the learnable skip, starts at 1. The block's gate replaces the cell's output gate. Input
    and forget gates are affine maps of $u$, as in the paper's formulas.

    Where this departs from the authors' code (the package xlstm, 2.0.6): there the gates see
    $q$, $k$ and $v$ of all heads, and the convolution has a bias; the norm before is an RMS
    norm, as in all blocks here, where it takes the mean out as well; and linear maps start as
    all others here, where it scales them by width and depth.

    **Arguments:**

    - `width`, `dropout`, `dtype`, `key`: as for [`pararnn.GatedBlock`][].
    - `expand`: how many times as many features the cell has.
    - `num_heads`: divides these, and so does
    - `block_size`: the size of the blocks of the maps to $q$, $k$ and $v$.
    - `conv_width`: how many inputs the convolution spans; with 0, there is none, and $c = u$.
    - `solver`: as for [`pararnn.RNN`][].

    **Raises:**

    `ValueError` if `num_heads` or `block_size` does not divide `expand * width`.
    """
    key_cell, key_block = jax.random.split(key)
    inner_size = expand * width
    for name, size in (("num_heads", num_heads), ("block_size", block_size)):
        if size < 1 or inner_size % size:
            raise ValueError(f"`{name}` must divide `expand * width`, {inner_size}; got {size}.")
    cell = MLSTM(
        inner_size,
        num_heads,
        inner_size // num_heads,
        inner_size // num_heads,
        conv_width=conv_width,
        num_blocks=inner_size // block_size,
        bare=True,
        dtype=dtype,
        key=key_cell,
    )
    rnn = RNN(cell, solver=solver)
    return GatedBlock(width, inner_size, rnn, dropout=dropout, dtype=dtype, key=key_block)


def slstm_block(
    width: int,
    *,
    num_heads: int = 4,
    conv_width: int = 4,
    depth: int | float = 0.0,
    solver: AbstractSolver | None = None,
    dropout: float = 0.0,
    dtype: Any = None,
    key: PRNGKeyArray,
) -> ResidualBlock:
    """The sLSTM block of xLSTM, with its projection up behind the recurrence (Beck et al.,
    *xLSTM: Extended long short-term memory*, 2024).

    The maps of inputs fall into heads as those of the state do, the outputs are normed head by
    head, and the MLP, whose gate has the activation GELU (here in the form with tanh), has
    4/3 of the `width`, rounded up. The convolution, which the paper leaves open, is seen by the
    input and the forget gate, as in the paper's figure.

    Where this departs from the authors' code (the package xlstm, 2.0.6): the convolution has no
    bias; norms before branches are RMS norms, as in all blocks here, where it takes the mean
    out as well; linear maps start as all others here, where it scales them by width and depth;
    and its MLP is rounded up to a multiple of 64.

    **Arguments:**

    - `width`, `dropout`, `dtype`, `key`: as for [`pararnn.ResidualBlock`][].
    - `num_heads`: divides the `width`.
    - `conv_width`: how many inputs the convolution spans; with 0, there is none.
    - `depth`: where in a network the block stands, from 0 for the first to 1 for the last one,
        as for [`pararnn.SLSTM`][].
    - `solver`: as for [`pararnn.RNN`][].
    """
    key_cell, key_block = jax.random.split(key)
    cell = SLSTM(
        width,
        width,
        num_heads=num_heads,
        num_blocks=num_heads,
        conv_width=conv_width,
        normed=True,
        depth=depth,
        dtype=dtype,
        key=key_cell,
    )
    return ResidualBlock(
        width,
        RNN(cell, solver=solver),
        mlp_size=-(-4 * width // 3),
        activation=jax.nn.gelu,
        dropout=dropout,
        dtype=dtype,
        key=key_block,
    )


def gated_deltanet_block(
    width: int,
    *,
    num_heads: int = 4,
    key_size: int | None = None,
    value_size: int | None = None,
    conv_width: int = 4,
    negative_eigenvalues: bool = False,
    norm_eps: float = 1e-5,
    mlp_size: int | None = None,
    solver: AbstractSolver | None = None,
    dropout: float = 0.0,
    dtype: Any = None,
    key: PRNGKeyArray,
) -> ResidualBlock:
    """The block of gated DeltaNet (Yang, Kautz, Hatamizadeh, *Gated delta networks: improving
    Mamba2 with delta rule*, ICLR 2025): queries, keys and values through a short convolution
    and SiLU, queries and keys of unit length, the outputs normed head by head, gated and
    projected. Each head has weights of its own for its norm, and convolutions have no bias.

    **Arguments:**

    - `width`, `mlp_size`, `dropout`, `dtype`, `key`: as for [`pararnn.ResidualBlock`][].
    - `num_heads`, `negative_eigenvalues`, `norm_eps`: as for [`pararnn.DeltaNet`][].
    - `key_size`, `value_size`: of each head; `None` is as in the authors' code, where keys have
        3/4 of the `width` in all, and values are twice as long as keys.
    - `conv_width`: how many inputs the convolution spans; with 0, there is none.
    - `solver`: as for [`pararnn.RNN`][].
    """
    key_cell, key_block = jax.random.split(key)
    key_size = max(1, 3 * width // (4 * num_heads)) if key_size is None else key_size
    cell = DeltaNet(
        width,
        num_heads,
        key_size,
        2 * key_size if value_size is None else value_size,
        negative_eigenvalues=negative_eigenvalues,
        conv_width=conv_width,
        output_gate=True,
        norm_eps=norm_eps,
        dtype=dtype,
        key=key_cell,
    )
    rnn = RNN(cell, solver=solver)
    return ResidualBlock(width, rnn, mlp_size=mlp_size, dropout=dropout, dtype=dtype, key=key_block)
