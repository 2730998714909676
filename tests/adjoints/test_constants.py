"""Constants that a step closes over, in programs whose compiler learns late that they are: XLA's
CPU library for reductions crashes on some of them. In a process of its own, which may crash."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
import jax.numpy as jnp
import pararnn as prnn

SIZE, LENGTH = 60, 64
CLIPPED = prnn.ClippedAdjoint(1e9)
ADJOINTS = {"one pass": prnn.Sequential(), "newton": prnn.Newton(), "clipped": CLIPPED}

def final(adjoint, x, ys, start):
    ones = jnp.ones((SIZE, SIZE))
    def step(state, y):
        return state + x * (y + ones)
    return prnn.solve(step, ys, start, adjoint=adjoint, throw=False).final

def in_pieces(adjoint, x, ys):
    def part(state, y):
        return final(adjoint, x, y, state), None
    start = jnp.zeros((SIZE, SIZE))
    return jax.lax.scan(jax.checkpoint(part), start, ys.reshape(8, -1))[0].mean()

def at_once(adjoint, x, ys):
    return final(adjoint, x, ys, jnp.zeros((SIZE, SIZE))).mean()

for name, adjoint in ADJOINTS.items():
    for function in (in_pieces,) if name == "one pass" else (in_pieces, at_once):
        gradient = jax.jit(jax.grad(function, 1), static_argnums=0)
        print(name, float(gradient(adjoint, 1.0, jnp.arange(LENGTH) / LENGTH)), flush=True)
"""


def test_sums_over_steps_with_constants():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment = kept | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["one pass", "newton", "newton", "clipped", "clipped"]
    # The derivative of `x * sum(y + 1)`.
    expected = 64 + sum(range(64)) / 64
    assert [float(value) for _, value in lines] == pytest.approx([expected] * 5, rel=1e-5)
