"""Draws the pictures of the documentation, with the package: `python docs/_scripts/pictures.py`.

Each function `draw_NAME` makes `docs/pictures/NAME.svg`; names on the command line draw only these.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

import pararnn as prnn

_FOLDER = pathlib.Path(__file__).parents[1] / "pictures"
_RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
_LENGTH, _CHUNK = 64, 8
_BLUE, _ORANGE, _GREY = "#3f51b5", "#ff6e40", "#9e9e9e"


# --- starts that move into place ---------------------------------------------------------------


def forgetful(h, x):
    return 0.99 * jnp.tanh(h) + 0.15 * x


def latch(h, x):
    return jnp.tanh(3 * h * x)


def sequential(step, xs, init):
    return prnn.solve(step, xs, init, solver=prnn.Sequential()).states


def from_starts(step, xs, starts):
    """Every chunk from a start of its own."""

    def run(start, xs):
        return jax.lax.scan(lambda h, x: (step(h, x),) * 2, start, xs)[1]

    return jax.vmap(run)(starts, xs.reshape(-1, _CHUNK)).reshape(-1)


def after(step, xs, init, solver, iterations):
    """The states that so many iterations make."""
    options = {"max_iters": iterations, "fallback": False, "chunk_size": _CHUNK}
    solver = type(solver)(**{**vars(solver), **options})
    return prnn.solve(step, xs, init, solver=solver, throw=False).states


def show_chunks(axis, states, expected, color=_BLUE):
    """Chunk by chunk, in front of the true states; those that are right in another colour."""
    axis.plot(expected, color=_GREY, lw=3, alpha=0.5)
    for first in range(0, _LENGTH, _CHUNK):
        times = np.arange(first, first + _CHUNK)
        right = np.allclose(states[times], expected[times], atol=1e-3)
        axis.plot(times, states[times], color=color if right else _ORANGE, lw=1.3)
        axis.plot(times[:1], states[times[:1]], "o", color=color if right else _ORANGE, ms=3)
    axis.set(xticks=range(0, _LENGTH + 1, _CHUNK), xticklabels=[], yticks=[])
    axis.grid(axis="x", alpha=0.4)


def draw_sweeps():
    """The same recurrence by two methods, iteration by iteration."""
    xs = jax.random.normal(jax.random.key(3), (_LENGTH,))
    init = jnp.asarray(1.5)
    expected = sequential(forgetful, xs, init)
    guess = from_starts(forgetful, xs, jnp.full(_LENGTH // _CHUNK, init))
    figure, axes = plt.subplots(4, 2, figsize=(9, 6), sharey=True, layout="constrained")
    solvers = (prnn.Newton(), prnn.Jacobi())
    for column, solver in zip(axes.T, solvers, strict=True):
        column[0].set_title(type(solver).__name__)
        for k, axis in enumerate(column):
            states = after(forgetful, xs, init, solver, k) if k else guess
            show_chunks(axis, states, expected)
    for k, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(f"{k} corrections" if k != 1 else "1 correction")
    figure.supxlabel("time; a mark where a chunk starts")
    return figure


def draw_speculation():
    """A latch: corrections are of no use, candidates are."""
    xs = jnp.where(jax.random.bernoulli(jax.random.key(5), 0.3, (_LENGTH,)), -1.0, 1.0)
    init = jnp.asarray(1.0)
    expected = sequential(latch, xs, init)
    figure, axes = plt.subplots(4, 1, figsize=(9, 6), sharey=True, layout="constrained")
    for axis, k in zip(axes[:2], (1, 2), strict=True):
        show_chunks(axis, after(latch, xs, init, prnn.Newton(), k), expected)
        axis.set_ylabel(f"Newton, {k}")
    for sign in (1.0, -1.0):
        states = from_starts(latch, xs, jnp.full(_LENGTH // _CHUNK, sign))
        show_chunks(axes[2], states, expected)
    axes[2].set_ylabel("candidates")
    speculative = prnn.Speculative(num_candidates=2)
    show_chunks(axes[3], after(latch, xs, init, speculative, 1), expected)
    axes[3].set_ylabel("Speculative, 1")
    figure.supxlabel("time; a mark where a chunk starts")
    return figure


# --- structures --------------------------------------------------------------------------------


def draw_structures():
    """Which entries of a step's Jacobian are not zero, and what detection makes of them."""
    key = jax.random.key(0)
    cells = {
        "DiagonalGRU": prnn.DiagonalGRU(4, 12, key=key),
        "DiagonalLSTM": prnn.DiagonalLSTM(4, 6, key=key),
        "Elman, 4 heads": prnn.Elman(4, 12, num_heads=4, key=key),
        "GRU": prnn.GRU(4, 12, key=key),
    }
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), layout="constrained")
    for axis, (name, cell) in zip(axes, cells.items(), strict=True):
        u = jax.tree.map(lambda x: x[0], cell.project(jnp.ones((1, 4))))
        leaves, tree = jax.tree.flatten(cell.init_state())
        sizes = np.cumsum([0] + [leaf.size for leaf in leaves])

        def step(vector, cell=cell, u=u, tree=tree, sizes=sizes):
            parts = [vector[a:b] for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
            new = cell.step(jax.tree.unflatten(tree, parts), u)
            return jnp.concatenate(jax.tree.leaves(new))

        jacobian = jax.jacfwd(step)(jax.random.normal(key, (12,)))
        structure = prnn.detect_structure(cell.step, cell.init_state(), u)
        seeds = structure.num_seeds(12)
        axis.imshow(np.abs(jacobian) > 0, cmap="Blues", vmin=0, vmax=1.4)
        plural = "tangent" if seeds == 1 else "tangents"
        axis.set(title=name, xlabel=f"{type(structure).__name__}\n{seeds} {plural}")
        axis.set(xticks=[], yticks=[])
    return figure


# --- memory of trained networks ----------------------------------------------------------------


def draw_gates():
    """What is left of a disturbance, and what of it the gates miss, step by step."""
    rows = json.loads((_RESULTS / "trained.json").read_text())["gates"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(9, 2.9), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        found = [row for row in rows if row["network"] == name]
        steps, left, missed = ([row[k] for row in found] for k in ("steps", "left", "missed"))
        axis.fill_between(steps, missed, left, color=_BLUE, alpha=0.15, lw=0)
        axis.plot(steps, left, color=_BLUE, lw=1.8, label="left of a disturbance")
        axis.plot(steps, missed, color=_ORANGE, lw=1.3, label="missed by the gates")
        axis.axvline(16, color=_GREY, lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", ylim=(1e-4, 1), title=name)
        axis.set_xticks((1, 16, 256), labels=("1", "16", "256"))
        axis.minorticks_off()
    axes[0].legend(loc="lower left", fontsize=7, frameon=False)
    figure.supxlabel("steps; dotted: one chunk")
    return figure


# --- the decision ------------------------------------------------------------------------------


def box(axis, x, y, text, *, width, answer=False):
    style = {"facecolor": _BLUE, "edgecolor": _BLUE} if answer else {"facecolor": "white"}
    corner = (x - width / 2, y - 0.32)
    axis.add_patch(FancyBboxPatch(corner, width, 0.64, boxstyle="round,pad=0.05", **style))
    color = "white" if answer else "black"
    axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)


def arrow(axis, begin, end, text, *, beside):
    axis.annotate("", end, begin, arrowprops={"arrowstyle": "->", "lw": 1.2})
    x, y = (begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2
    horizontal = {"ha": "left", "va": "center"} if beside else {"ha": "center", "va": "bottom"}
    axis.text(x + (0.08 if beside else 0), y, text, fontsize=8, **horizontal)


def draw_decision():
    """Questions downwards, answers to the right."""
    questions = [
        (
            "On a CPU, or is the device\nbusy with a batch already?",
            "Sequential(), the default",
        ),
        ("Do the steps compose exactly:\naffine ones, or clamps?", "AssociativeScan()"),
        ("Is it chaotic:\nan exponent above 0?", "Sequential()"),
        ("Does it keep switching between\nstates that it never forgets?", "Speculative()"),
        ("Does it forget within\na chunk?", "Jacobi(), or Newton() with overlap"),
        ("Do Newton's first corrections\nexplode?", "LevenbergMarquardt()"),
        ("Dense, but gated:\na GRU, an LSTM, an sLSTM?", "ElementwiseNewton()"),
        ("Too many state elements for\nproducts of dense Jacobians?", "QuasiNewton()"),
    ]
    figure, axis = plt.subplots(figsize=(7.5, 9.6), layout="constrained")
    for i, (question, answer) in enumerate(questions):
        y = -1.3 * i
        box(axis, 0, y, question, width=3.1)
        box(axis, 4.6, y, answer, width=3.2, answer=True)
        arrow(axis, (1.62, y), (2.92, y), "yes", beside=False)
        arrow(axis, (0, y - 0.4), (0, y - 0.92), "no", beside=True)
    box(axis, 0, -1.3 * len(questions), "Newton()", width=3.1, answer=True)
    axis.set(xlim=(-1.8, 6.4), ylim=(-1.3 * len(questions) - 0.5, 0.5))
    axis.axis("off")
    return figure


def main(args=None):
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("names", nargs="*", help="which (default: all)")
    parser.add_argument("--folder", type=pathlib.Path, default=_FOLDER)
    options = parser.parse_args(args)
    matplotlib.rcParams.update({"svg.hashsalt": "pararnn", "font.size": 9})
    for name, draw in list(globals().items()):
        picture = name.removeprefix("draw_")
        if picture != name and (not options.names or picture in options.names):
            path = options.folder / f"{picture}.svg"
            figure = draw()
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            print(path)


if __name__ == "__main__":
    main()
