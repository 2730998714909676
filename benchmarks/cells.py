"""Every shipped cell: structure, iterations before and after training, agreement under all solvers.

The small task is to say whether the sum of the last eight inputs is positive; a linear readout of
the cell's outputs is trained with it by Adam. "iterations" are those of Newton's method over single
steps (DEER, ParaRNN), from its default guess.
"""

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from tqdm import tqdm

import pararnn as prnn

from ._measure import markdown, other_parts, relative_error, save, scan_states

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
EXACT = {"MinMax", "LRU", "DeltaNet"}


def solve(cell, xs, solver, throw=True):
    us, init = cell.project(xs), cell.init_state()
    solution = prnn.solve(cell.step, us, init, solver=solver, algebra=cell.algebra, throw=throw)
    return solution, cell.readout(solution.states, us)


@eqx.filter_jit
def iterations(cell, xs):
    stats = solve(cell, xs, prnn.Newton(chunk_size=1), throw=False)[0].stats
    return stats.iterations, stats.fallback


def train(cell: prnn.AbstractCell, steps: int, length: int = 64, batch: int = 16):
    """`(trained cell, accuracy on fresh inputs)`."""
    outputs = jax.eval_shape(lambda: solve(cell, jnp.zeros((1, INPUTS)), None)[1]).shape[-1]
    head = eqx.nn.Linear(outputs, 1, key=jax.random.key(1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    model = (cell, head)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

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
    def update(model, state, key):
        gradients = eqx.filter_grad(loss)(model, *batch_of(key))
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(model, updates), state

    for key in jax.random.split(jax.random.key(2), steps):
        model, state = update(model, state, key)
    xs, targets = batch_of(jax.random.key(3))
    accuracy = jnp.mean((eqx.filter_jit(logits)(model, xs) > 0) == (targets > 0))
    return model[0], float(accuracy)


def describe(name: str, steps: int, length: int) -> dict[str, Any]:
    cell = CELLS[name](key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(4), (length, INPUTS))
    state = cell.init_state()
    u = jtu.tree_map(lambda u: u[0], cell.project(xs[:1]))
    structure = prnn.detect_structure(cell.step, state, u)
    trained, accuracy = train(cell, steps)
    size = sum(x.size * (2 if jnp.iscomplexobj(x) else 1) for x in jtu.tree_leaves(state))
    before, after = iterations(cell, xs), iterations(trained, xs)

    def show(count, finished):
        return f"{int(count)}" + (" (finished sequentially)" if finished else "")

    return {
        "cell": name,
        "state size": size,
        "tangents per sweep": structure.num_seeds(size),
        "structure": type(structure).__name__,
        "iterations at initialisation": show(*before),
        "after training": show(*after),
        "accuracy": accuracy,
    }


def agreement(name: str, length: int) -> list[dict[str, Any]]:
    """Values, gradients and reports under every solver, at the initial weights and four times
    those, against the scan and its automatic derivative."""
    rows = []
    solvers = SOLVERS | ({"AssociativeScan": prnn.AssociativeScan()} if name in EXACT else {})
    for dtype in (jnp.float32, jnp.float64):
        cell = CELLS[name](dtype=dtype, key=jax.random.key(0))
        xs = jax.random.normal(jax.random.key(4), (length, INPUTS), dtype)
        scaled = jtu.tree_map(lambda x: 4 * x if eqx.is_inexact_array(x) else x, cell)

        @eqx.filter_jit
        def run(cell, xs, solver):
            def loss(cell):
                solution, ys = solve(cell, xs, solver, throw=False)
                return jnp.sum(jnp.sin(ys)), solution

            (_, solution), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(cell)
            return solution, gradients

        @eqx.filter_jit
        def by_scan(cell, xs):
            def loss(cell):
                us = cell.project(xs)
                states = scan_states(cell.step, us, cell.init_state())
                return jnp.sum(jnp.sin(cell.readout(states, us))), states

            (_, states), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(cell)
            return states, gradients

        for scale, weights in (("1", cell), ("4", scaled)):
            expected, exact_gradients = by_scan(weights, xs)
            for solver_name, solver in solvers.items():
                solution, gradients = run(weights, xs, solver)
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
                        "gradient error": relative_error(gradients, exact_gradients),
                    }
                )
    return rows


def million(length: int = 1_024_000, size: int = 8) -> list[dict[str, Any]]:
    """MinMax over a long stream in one associative scan, against the plain scan."""
    cell = prnn.MinMax(INPUTS, size, size, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (length, INPUTS))
    us = cell.project(xs)
    solver = prnn.AssociativeScan(algebra=cell.algebra)

    def total(us, solver):
        states = prnn.solve(cell.step, us, cell.init_state(), solver=solver).states
        return jnp.sum(jnp.sin(states)), states

    run = eqx.filter_jit(lambda us, solver: jax.value_and_grad(total, has_aux=True)(us, solver))
    (_, states), gradients = run(us, solver)

    @jax.jit
    def by_scan(us):
        def total(us):
            states = scan_states(cell.step, us, cell.init_state())
            return jnp.sum(jnp.sin(states)), states

        return jax.value_and_grad(total, has_aux=True)(us)

    (_, reference), exact = by_scan(us)
    return [
        {
            "L": length,
            "largest state": float(jnp.max(jnp.abs(states))),
            "value error": relative_error(states, reference),
            "gradient error": relative_error(gradients, exact),
        }
    ]


# What is measured of each cell, in this order.
PARTS: dict[str, Callable[[str, argparse.Namespace], list[dict[str, Any]]]] = {
    "cells": lambda name, args: [describe(name, args.steps, args.length)],
    "MinMax over a long stream": lambda name, args: million() if name == "MinMax" else [],
    "agreement": lambda name, args: agreement(name, 100),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cells",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--length", type=int, default=512, help="steps of the solves")
    parser.add_argument("--output", default="benchmarks/results", help="folder of the JSON file")
    args = parser.parse_args(argv)
    results = other_parts("cells", args.output, args.parts, PARTS)
    for part in args.parts:
        jax.config.update("jax_enable_x64", part == "agreement")
        results[part] = []
        for name in tqdm(args.cells, desc=part):
            results[part] += PARTS[part](name, args)
            save("cells", results, args.output)
            # Each compiled program takes memory maps, of which a process may have only so many.
            jax.clear_caches()
        print(f"\n{part}\n\n{markdown(results[part]) if results[part] else 'nothing'}")
    print(f"\nwritten to {args.output}/cells.json")


if __name__ == "__main__":
    main()
