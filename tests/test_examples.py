"""The examples run from the command line to the files they promise."""

import json
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import char_lm, compare_cells, custom_cell
from examples._agreement import Agreement, check
from examples._cells import CELLS
from examples._language_model import LanguageModel, load
from examples._text import all_windows, load_text

pytestmark = pytest.mark.slow

TINY = "--width 8 --depth 1 --length 20 --batch 2 --steps 3 --sample 5".split()


def test_char_lm(tmp_path, capsys):
    char_lm.main([*TINY, "--output", str(tmp_path)])
    text, (printed, progress) = load_text(), capsys.readouterr()
    assert "bits per character before training" in printed
    assert "\nCompiling, " in printed.split("Relative difference")[0]
    assert progress.startswith("training: 0 of 3 steps, ") and "\r" not in progress
    assert progress.splitlines()[0].endswith(", compiling")

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    losses = metrics["loss"] + list(metrics["held_out"].values())
    assert len(metrics["loss"]) == 3 and all(map(math.isfinite, losses))
    assert abs(metrics["bits_per_character"]["untrained"] - math.log2(len(text.vocabulary))) < 1
    assert [row["solver"] for row in metrics["agreement"]["before"]] == ["newton", "jacobi", "auto"]

    model, hyperparameters = load(tmp_path / "model.eqx")
    assert hyperparameters["vocabulary"] == text.vocabulary
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert bool(jnp.all(jnp.isfinite(model(jnp.asarray(text.held_out[:16])))))


@pytest.mark.parametrize("cell", ["diagonal-gru", "gru", "elman"])
def test_streaming_gives_the_numbers_of_the_parallel_call(cell):
    text = load_text()
    model = LanguageModel(cell, text.vocabulary, 8, 2, key=jax.random.key(0))
    tokens, state, streamed = jnp.asarray(text.train[:12]), None, []
    for token in tokens:
        logits, state = eqx.filter_jit(model.step)(state, token)
        streamed.append(logits)
    np.testing.assert_allclose(jnp.stack(streamed), model(tokens), rtol=1e-5, atol=1e-5)


def test_windows_predict_every_character_once():
    tokens = np.arange(11, dtype=np.int32)
    windows = all_windows(tokens, 5)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), tokens[1:])


@pytest.mark.parametrize("logits, gradients", [(2e-5, 0.0), (0.0, 2e-4), (math.nan, 0.0)])
def test_disagreement_ends_the_program(logits, gradients):
    with pytest.raises(SystemExit, match="newton does not agree"):
        check(Agreement("newton", logits, gradients, [1], [1]))


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        char_lm.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "--temperature" in printed and "(default: diagonal-gru)" in printed


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--width 0", "--width: must be a whole number, at least 1; got '0'"),
        ("--steps 1e3", "--steps: must be a whole number"),
        ("--lr nan", "--lr: must be a number above 0; got 'nan'"),
        ("--seed 4294967296", "--seed: must be a whole number, at least 0 and at most"),
        ("--cell nothing", "--cell: invalid choice: 'nothing'"),
        ("--chunk-size 4", "--chunk-size: needs --solver newton"),
        ("--length 1000000", "--length: must be at most"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        char_lm.main(flags.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_output_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        char_lm.main(["--output", str(tmp_path / "file")])
    assert "--output: " in capsys.readouterr().err


def test_custom_cell_does_what_it_says(capsys):
    """Newton has to finish sequentially where a network tracks a state; Speculative need not."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        custom_cell.never_forgets(300)
    printed = capsys.readouterr().out
    said = re.findall(r"(\w+): \d+ iterations, (\d+) steps .* sequentially: (\w+)", printed)
    (newton, steps, finished), (speculative, few, unfinished) = said
    assert (newton, finished, speculative, unfinished) == ("Newton", "True", "Speculative", "False")
    assert int(steps) >= 290 and int(few) <= 150  # nearly all of 300


def test_cells_are_compared(tmp_path, capsys):
    small = "--steps 2 --parameters 9000 --depth 1 --length 20 --batch 2".split()
    small += ["--output", str(tmp_path)]
    compare_cells.main(["--cells", "elman", *small])
    before = json.loads((tmp_path / "cells.json").read_text())["rows"]
    compare_cells.main(["--cells", "elman", "min-gru", *small])
    rows = json.loads((tmp_path / "cells.json").read_text())["rows"]
    assert list(rows) == ["elman", "min-gru"] and rows["elman"] == before["elman"]
    for row in rows.values():
        assert 8000 < row["parameters"] < 10_000 and len(row["loss"]) == 2
        assert row["bits_per_character"] < 10 and row["seconds_per_step"] > 0
    assert capsys.readouterr().out.count("| min-gru |") == 1
    assert (tmp_path / "cells.png").exists()
    with pytest.raises(SystemExit, match="other options"):
        compare_cells.main(["--cells", "elman", *small, "--lr", "0.1"])
    compare_cells.main(["--cells", "lru", *small, "--budget", "1e-9"])
    assert "The budget is spent before lru" in capsys.readouterr().out


def test_every_cell_of_the_examples_is_made():
    for name, make in CELLS.items():
        cell = make(32, jax.random.key(0))
        us = jax.eval_shape(cell.project, jax.ShapeDtypeStruct((8, 32), jnp.float32))
        states = jax.eval_shape(
            lambda us, cell=cell: jax.vmap(cell.step)(
                jax.tree.map(lambda h: jnp.stack([h] * 8), cell.init_state()), us
            ),
            us,
        )
        ys = jax.eval_shape(cell.readout, states, us)
        assert ys.shape == (8, 32) and ys.dtype == jnp.float32, name
