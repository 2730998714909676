"""Every shipped kind of cell: structure, iterations before and after training, agreement under all
solvers.

The task is to say whether the sum of the last eight inputs is positive; a linear readout of the
cell's outputs is trained with it by Adam. "iterations" are those of Newton's method over single
steps (DEER, ParaRNN), from its default guess.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from tqdm import tqdm

import pararnn as prnn
from pararnn.diagnostics import scan_states

from ._measure import Results, Row, markdown, parser, relative_error

INPUTS = 4
CELLS = {
    "Elman": lambda **k: prnn.Elman(INPUTS, 16, **k),
    "Elman, 4 heads, leaky": lambda **k: prnn.Elman(INPUTS, 16, num_heads=4, leak=0.5, **k),
    "GRU": lambda **k: prnn.GRU(INPUTS, 16, **k),
    "GRU, 4 heads": lambda **k: prnn.GRU(INPUTS, 16, num_heads=4, **k),
    "DiagonalGRU": lambda **k: prnn.DiagonalGRU(INPUTS, 16, **k),
    "LSTM": lambda **k: prnn.LSTM(INPUTS, 16, **k),
    "LSTM, 4 heads": lambda **k: prnn.LSTM(INPUTS, 16, num_heads=4, **k),
    "DiagonalLSTM": lambda **k: prnn.DiagonalLSTM(INPUTS, 16, **k),
    "SLSTM, 4 heads": lambda **k: prnn.SLSTM(INPUTS, 16, num_heads=4, **k),
    "MinMax": lambda **k: prnn.MinMax(INPUTS, 16, 16, **k),
    "M2RNN": lambda **k: prnn.M2RNN(INPUTS, 2, 4, 4, 16, **k),
    "PiecewiseLinearRNN": lambda **k: prnn.PiecewiseLinearRNN(INPUTS, 16, **k),
    "LRU": lambda **k: prnn.LRU(INPUTS, 16, 16, **k),
    "DeltaNet": lambda **k: prnn.DeltaNet(INPUTS, 2, 4, 4, 16, **k),
}
SOLVERS: dict[str, prnn.AbstractSolver] = {
    "Newton, 1": prnn.Newton(chunk_size=1),
    "Newton, 16": prnn.Newton(chunk_size=16),
    "QuasiNewton, 16": prnn.QuasiNewton(chunk_size=16),
    "Picard, 16": prnn.Picard(chunk_size=16),
    "Jacobi, 16": prnn.Jacobi(chunk_size=16),
    "LevenbergMarquardt, 16": prnn.LevenbergMarquardt(chunk_size=16),
    "Speculative, 16": prnn.Speculative(chunk_size=16, num_candidates=8),
}
EXACT = {"MinMax", "LRU", "DeltaNet"}  # cells whose steps compose exactly


def solve(cell, xs, solver):
    us, init = cell.project(xs), cell.init_state()
    solution = prnn.solve(cell.step, us, init, solver=solver, algebra=cell.algebra, throw=False)
    return solution, cell.readout(solution.states, us)


@eqx.filter_jit
def _differentiated(cell, xs, solver):
    """A solution, and the gradients of a loss of the outputs."""

    def loss(cell):
        solution, ys = solve(cell, xs, solver)
        return jnp.sum(jnp.sin(ys)), solution

    (_, solution), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(cell)
    return solution, gradients


@eqx.filter_jit
def _differentiated_scan(cell, xs):
    """The states of `lax.scan`, and the gradients of the same loss."""

    def loss(cell):
        us = cell.project(xs)
        states = scan_states(cell.step, us, cell.init_state())
        return jnp.sum(jnp.sin(cell.readout(states, us))), states

    (_, states), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(cell)
    return states, gradients


# --- parts ------------------------------------------------------------------------------------


def train(cell: prnn.AbstractCell, steps: int, length: int = 64, batch: int = 16):
    """The trained cell, and its accuracy on fresh inputs."""
    outputs = jax.eval_shape(lambda: solve(cell, jnp.zeros((1, INPUTS)), None)[1]).shape[-1]
    model = (cell, eqx.nn.Linear(outputs, 1, key=jax.random.key(1)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    moments = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def batch_of(key):
        xs = jax.random.normal(key, (batch, length, INPUTS))
        sums = jnp.cumsum(xs[..., 0], axis=1)
        window = sums.at[:, 8:].add(-sums[:, :-8])
        return xs, (window > 0).astype(jnp.float32)

    def logits(model, xs):
        cell, head = model
        return jax.vmap(jax.vmap(head))(jax.vmap(lambda x: solve(cell, x, None)[1])(xs))[..., 0]

    def loss(model, xs, targets):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits(model, xs), targets))

    @eqx.filter_jit
    def update(model, moments, key):
        gradients = eqx.filter_grad(loss)(model, *batch_of(key))
        updates, moments = optimizer.update(gradients, moments)
        return eqx.apply_updates(model, updates), moments

    for key in jax.random.split(jax.random.key(2), steps):
        model, moments = update(model, moments, key)
    xs, targets = batch_of(jax.random.key(3))
    accuracy = jnp.mean((eqx.filter_jit(logits)(model, xs) > 0) == (targets > 0))
    return model[0], float(accuracy)


@eqx.filter_jit
def _stats(cell, xs):
    return solve(cell, xs, prnn.Newton(chunk_size=1))[0].stats


def describe(name: str, steps: int, length: int) -> list[Row]:
    cell = CELLS[name](key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(4), (length, INPUTS))
    state = cell.init_state()
    structure = prnn.detect_structure(
        cell.step, state, jtu.tree_map(lambda u: u[0], cell.project(xs[:1]))
    )
    trained, accuracy = train(cell, steps)
    size = sum(x.size * (2 if jnp.iscomplexobj(x) else 1) for x in jtu.tree_leaves(state))

    def iterations(cell):
        stats = _stats(cell, xs)
        return f"{int(stats.iterations)}" + " (finished sequentially)" * bool(stats.fallback)

    return [
        {
            "cell": name,
            "state size": size,
            "tangents per sweep": structure.num_seeds(size),
            "structure": type(structure).__name__,
            "iterations at initialisation": iterations(cell),
            "after training": iterations(trained),
            "accuracy": accuracy,
        }
    ]


def million(length: int = 1_024_000, size: int = 8) -> list[Row]:
    """MinMax over a long sequence in one associative scan, against `lax.scan`."""
    cell = prnn.MinMax(INPUTS, size, size, key=jax.random.key(0))
    us = cell.project(jax.random.normal(jax.random.key(1), (length, INPUTS)))

    def states_by_solve(us):
        solver = prnn.AssociativeScan(algebra=cell.algebra)
        return prnn.solve(cell.step, us, cell.init_state(), solver=solver).states

    def states_by_scan(us):
        return scan_states(cell.step, us, cell.init_state())

    def differentiated(states_of):
        def loss(us):
            states = states_of(us)
            return jnp.sum(jnp.sin(states)), states

        (_, states), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(us)
        return states, gradients

    states, gradients = differentiated(states_by_solve)
    expected, exact = differentiated(states_by_scan)
    return [
        {
            "L": length,
            "largest state": float(jnp.max(jnp.abs(states))),
            "value error": relative_error(states, expected),
            "gradient error": relative_error(gradients, exact),
        }
    ]


def agreement(name: str, length: int) -> list[Row]:
    """Values and gradients under every solver, at the initial weights and four times those,
    against `lax.scan` and its automatic derivative."""
    rows = []
    solvers = SOLVERS | ({"AssociativeScan": prnn.AssociativeScan()} if name in EXACT else {})
    for dtype in (jnp.float32, jnp.float64):
        cell = CELLS[name](dtype=dtype, key=jax.random.key(0))
        xs = jax.random.normal(jax.random.key(4), (length, INPUTS), dtype)
        for scale in (1, 4):
            weights = jtu.tree_map(lambda x, s=scale: s * x if eqx.is_inexact_array(x) else x, cell)
            expected, exact = _differentiated_scan(weights, xs)
            for solver_name, solver in solvers.items():
                solution, gradients = _differentiated(weights, xs, solver)
                rows.append(
                    {
                        "cell": name,
                        "weights": f"x {scale}",
                        "dtype": jnp.dtype(dtype).name,
                        "solver": solver_name,
                        "successful": bool(solution.result == prnn.RESULTS.successful),
                        "iterations": int(solution.stats.iterations),
                        "finished sequentially": bool(solution.stats.fallback),
                        "value error": relative_error(solution.states, expected),
                        "gradient error": relative_error(gradients, exact),
                    }
                )
    return rows


PARTS = ("cells", "MinMax over a long stream", "agreement")


def main(argv: list[str] | None = None) -> None:
    command = parser("cells", __doc__, PARTS)
    command.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    command.add_argument("--steps", type=int, default=200, help="training steps")
    command.add_argument("--length", type=int, default=512, help="steps of the solves")
    args = command.parse_args(argv)
    measure: dict[str, Any] = {
        "cells": functools.partial(describe, steps=args.steps, length=args.length),
        "MinMax over a long stream": lambda name: million() if name == "MinMax" else [],
        "agreement": functools.partial(agreement, length=100),
    }
    results = Results(args.output / "cells.json", fresh=set(args.parts) == set(PARTS))
    for part in args.parts:
        jax.config.update("jax_enable_x64", part == "agreement")
        rows: list[Row] = []
        for name in tqdm(args.cells, desc=part):
            rows += measure[part](name)
            results.put(part, rows)
            # Each compiled program takes memory maps, whose number is limited per process.
            jax.clear_caches()
        print(f"\n{part}\n\n{markdown(rows) if rows else 'nothing'}")
