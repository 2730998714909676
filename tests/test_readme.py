"""The README's examples run as they stand, as a user would run them."""

import tomllib

import pages

_README = (pages.ROOT / "README.md").read_text()
_EXAMPLES = {block.name: block for block in pages.blocks_of(_README)}
_CHECKS = {
    "train": "start = 0.3 * jax.random.normal(jax.random.key(1), (8, 8))\n"
    "assert loss(w) < 0.8 * loss(start), (loss(w), loss(start))",
    "layer": "assert ys.shape == (100, 32) and batched[0].shape == (4, 100, 32)\n"
    "assert jnp.allclose(y, ys[0], atol=1e-6)",
}


def test_all_python_blocks_are_examples():
    assert _README.count("```python") == len(_EXAMPLES)
    assert _EXAMPLES.keys() == _CHECKS.keys()


def test_first_example_is_short():
    assert len([line for line in _EXAMPLES["train"].code.splitlines() if line.strip()]) <= 15


def test_examples():
    """Each by itself; in one process, since JAX takes long to start."""
    checked = [block._replace(check=_CHECKS[name]) for name, block in _EXAMPLES.items()]
    pages.run("README.md", checked, alone=True)


def test_the_metadata_name_one_home():
    urls = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    assert f"repository-code: {urls['Homepage']}\n" in (pages.ROOT / "CITATION.cff").read_text()
