"""The README's examples run as they stand, as a user would run them."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text()
_FLAGS = os.environ.get("XLA_FLAGS", "")
_EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", _README, re.S))
_CHECKS = {
    "train": "start = 0.3 * jax.random.normal(jax.random.key(1), (8, 8))\n"
    "assert loss(w) < 0.8 * loss(start), (loss(w), loss(start))",
    "report": "assert solution.result == prnn.RESULTS.successful",
    "layer": "assert ys.shape == (100, 32) and batched[0].shape == (4, 100, 32)\n"
    "assert jnp.allclose(y, ys[0], atol=1e-6)",
    "torch": "assert ys.shape == (100, 32) and batched[0].shape == (4, 100, 32)\n"
    "assert jnp.allclose(y, ys[0], atol=1e-6)",
    "own": "assert prnn.verify(cell, xs, solver=prnn.Newton()).ok\nassert ys.shape == (100, 2, 8)",
    "solver": "assert prnn.verify(rnn, jnp.ones((300, 4)))",
    "training": "assert ys.shape == (100, 16) and y.shape == (16,)",
    "time": "assert jax.device_count() == 2 and ys.sharding.spec[0] == 'time'\n"
    "alone = prnn.RNN(rnn.cell)(jax.device_get(xs))\n"
    "for a, b in zip(jax.device_get((ys, final)), alone):\n"
    "    assert jnp.allclose(a, b, atol=1e-6)",
    "devices": "assert jax.device_count() == 2\n"
    "for a, b in zip(*map(jax.tree.leaves, ((value, grads), jax.jit(by_hand)(weights, xs)))):\n"
    "    assert jnp.allclose(jax.device_get(a), jax.device_get(b), atol=1e-6)",
}


def test_all_python_blocks_are_examples():
    assert _README.count("```python") == len(_EXAMPLES)
    assert _EXAMPLES.keys() == _CHECKS.keys()


def test_pages_show_what_is_run_here():
    for page in (_ROOT / "docs").glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            assert block in _EXAMPLES.values(), page.name


def test_first_example_is_short():
    assert len([line for line in _EXAMPLES["train"].splitlines() if line.strip()]) <= 15


# Runs examples one after another, each in a namespace of its own, and says which failed.
_RUNNER = """
import json, sys, traceback
failed = {}
for name, source in json.load(sys.stdin).items():
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[name] = traceback.format_exc()
sys.exit("\\n".join(f"{name}: {error}" for name, error in failed.items()) or None)
"""


@pytest.mark.parametrize("part", [0, 1])
def test_examples(part):
    """Half of them in one process, as it takes longer to start one than to run most of them."""
    programs = {name: f"{_EXAMPLES[name]}\n{_CHECKS[name]}" for name in [*_EXAMPLES][part::2]}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUNNER],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"{_FLAGS} --xla_force_host_platform_device_count=2",
        },
    )
    assert result.returncode == 0, result.stderr


def test_the_metadata_name_one_home():
    urls = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    assert f"repository-code: {urls['Homepage']}\n" in (_ROOT / "CITATION.cff").read_text()
