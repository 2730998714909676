"""Every task against an answer worked out in plain Python, one sequence and one step at a time."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import _tracking, tables
from examples.tasks import TASKS, __main__, make_group
from examples.tasks import _recall as recall
from examples.tasks._train import Options, advance, start

pytestmark = pytest.mark.slow

BATCH, LENGTH = 7, 29

sample = jax.jit(lambda task, *args: task(*args), static_argnums=(0, 2, 3))


def draw(task, length=LENGTH, seed=0, batch=BATCH):
    result = jax.tree.map(np.asarray, sample(task, jax.random.key(seed), batch, length))
    assert result.targets.shape == result.mask.shape == (batch, length)
    assert result.mask.dtype == np.bool_ and result.mask.any()
    assert 0 <= result.targets.min() and result.targets.max() < task.outputs
    if task.tokens:
        assert result.inputs.shape == (batch, length)
        assert 0 <= result.inputs.min() and result.inputs.max() < task.inputs
    return result


# Each gives the answer at every step of one sequence, None where there is none.


def parity(xs):
    return [sum(xs[: t + 1]) % 2 for t in range(len(xs))]


def arithmetic(xs):
    answers, text = [], "0+"
    for x in xs:
        if x < 5:
            text = str(eval(text + str(x)))  # one operator at a time: no precedence
            answers.append(int(text) % 5)
        else:
            text += "+-*"[x - 5]
            answers.append(None)
    return answers


def product(generators):
    """Follows where each point goes, the newest generator applied first."""

    def answers(xs):
        size = len(generators[0])
        rows = []
        for t in range(len(xs)):
            images = []
            for point in range(size):
                for x in reversed(xs[: t + 1]):
                    point = generators[x][point]
                images.append(point)
            rows.append(tuple(images))
        return rows

    return answers


def mqar(xs):
    values, answers = {}, []
    for t, x in enumerate(xs):
        answers.append(values.get(x))
        if t % 2 == 1 and x > 16:
            values[xs[t - 1]] = x - 17
    return answers


def hops(xs):
    def hop(i):
        found = [j for j in range(1, i + 1) if xs[j - 1] == xs[i]]
        return found[-1] if found else None

    answers = []
    for i in range(len(xs)):
        first = hop(i)
        second = None if first is None else hop(first)
        answers.append(None if second is None else xs[second])
    return answers


def keep(xs):
    return [None] * 2 + [xs[2]] * (len(xs) - 2)


def latch(xs):
    answers, last = [], 0
    for x in xs:
        last = x or last
        answers.append(last)
    return answers


def induction(xs):
    assert xs.count(16) == 2 and xs[-1] == 16
    return [None] * (len(xs) - 1) + [xs[xs.index(16) + 1]]


GENERATORS = {
    "s3": ((1, 0, 2), (1, 2, 0)),
    "a5": ((1, 2, 0, 3, 4), (1, 2, 3, 4, 0), (1, 0, 3, 2, 4)),
    "s5": ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0)),
}
TRUTH = {
    "parity": parity,
    "arithmetic": arithmetic,
    **{name: product(generators) for name, generators in GENERATORS.items()},
    "mqar": mqar,
    "k-hop": hops,
    "keep-nth": keep,
    "latch": latch,
    "induction": induction,
}


def test_every_task_is_tested():
    assert {*TRUTH, "digits"} == set(TASKS)


@pytest.mark.parametrize("name", TRUTH)
def test_against_brute_force(name):
    task = TASKS[name]
    batch = draw(task)
    elements = make_group(name.upper()).elements.tolist() if name in GENERATORS else None
    for xs, targets, mask in zip(*(x.tolist() for x in batch), strict=True):
        for expected, target, answered in zip(TRUTH[name](xs), targets, mask, strict=True):
            assert (expected is not None) == answered
            if answered and elements is not None:
                assert elements[target] == list(expected)
            elif answered:
                assert target == expected


@pytest.mark.parametrize("name", TRUTH)
def test_seeded(name):
    task = TASKS[name]
    first, again, other = draw(task), draw(task), draw(task, seed=1)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (first.inputs != other.inputs).any()


def test_tokens_are_spread_evenly():
    """The largest deviation of 1,500 draws from the expected count is within five sigma."""
    for name in ("parity", "s3", "a5", "s5", "k-hop", "keep-nth"):
        inputs = draw(TASKS[name], length=30, batch=50).inputs
        p = 1 / TASKS[name].inputs
        counts = np.bincount(inputs.ravel(), minlength=TASKS[name].inputs)
        assert np.abs(counts - 1500 * p).max() <= 5 * np.sqrt(1500 * p * (1 - p)), name


def test_every_key_is_asked_once():
    batch = draw(TASKS["mqar"], length=24)
    assert (batch.mask.sum(1) == 4).all()
    for xs, mask in zip(batch.inputs, batch.mask, strict=True):
        assert sorted(xs[mask]) == sorted(xs[:8:2]) and len(set(xs[mask])) == 4


def test_symbols_come_at_the_given_rate():
    inputs = draw(recall.latch(symbols=9, every=10), length=2000).inputs
    expected, sigma = inputs.size / 10, np.sqrt(inputs.size * 0.09)
    assert abs((inputs > 0).sum() - expected) <= 5 * sigma


@pytest.mark.parametrize("name, length", [("mqar", 3), ("keep-nth", 2), ("induction", 2)])
def test_too_short(name, length):
    with pytest.raises(ValueError, match=r"`length` must be at least \d+ for .*; got"):
        TASKS[name](jax.random.key(0), 2, length)


@pytest.mark.parametrize("name, length", [("mqar", 4), ("keep-nth", 3), ("induction", 3)])
def test_shortest(name, length):
    batch = draw(TASKS[name], length=length)
    for xs, targets, mask in zip(*(x.tolist() for x in batch), strict=True):
        answers = TRUTH[name](xs)
        assert [a for a in answers if a is not None] == np.array(targets)[mask].tolist()


def test_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    task = TASKS["digits"]
    batch, held_out = draw(task, length=64), task.held_out()
    assert held_out.inputs.shape == (360, 64, 1) and held_out.inputs.dtype == jnp.float32
    for some in (batch, held_out):
        assert np.asarray(some.mask).sum() == len(some.inputs) == np.asarray(some.mask)[:, -1].sum()
        for image, targets in zip(np.asarray(some.inputs), np.asarray(some.targets), strict=True):
            assert known[(16 * image[:, 0]).astype(np.float64).tobytes()] == targets[-1]
    rows = {x.tobytes() for x in np.asarray(held_out.inputs)}
    seen = draw(task, length=64, batch=3000).inputs
    assert not rows & {x.tobytes() for x in seen}
    with pytest.raises(ValueError, match="`length` must be 64 for digits; got 65"):
        task(jax.random.key(0), 2, 65)


# --- the command line -----------------------------------------------------------------------------

TINY = "--width 4 --batch 4 --steps 20 --length 6".split()


def test_command(tmp_path, capsys):
    words = ["k-hop", *TINY, *"--cell elman --solver sequential --conv 2 --mlp".split()]
    words += ["--output", str(tmp_path)]
    __main__.main([*words, "--eval-lengths", "9"])
    printed = capsys.readouterr().out
    assert "accuracy at length 6: " in printed and "accuracy at length 9: " in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["accuracy"]) == {"6", "9"}
    assert all(0 <= x <= 1 for x in result["accuracy"].values())
    assert result["options"]["task"] == "k-hop" and result["options"]["lengths"] == [6]

    with pytest.raises(SystemExit, match="error: .* seed=0, not 1"):
        __main__.main([*words, "--seed", "1", "--resume"])
    with pytest.raises(SystemExit, match="error: `steps` must be at least 20, .*; got 10"):
        __main__.main([*words, "--steps", "10", "--resume"])


def test_nothing_to_resume(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(SystemExit, match="error: There is nothing to resume: .*missing"):
        __main__.main(["parity", *TINY, "--resume", "--output", str(missing)])
    with pytest.raises(SystemExit, match="error: There is nothing to resume: .*missing.digits"):
        tables.main(["digits", "--resume", "--runs", str(missing), "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        __main__.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for name, task in TASKS.items():
        assert f"  {name}" in printed and task.description in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ("chess", "invalid choice: 'chess'"),
        ("parity --length 0", "--length: must be a whole number, at least 1; got '0'"),
        ("digits --length 32", "--length: must be 64 for digits"),
        ("parity --cell mlp", "--cell: invalid choice: 'mlp'"),
    ],
)
def test_bad_flags(words, message, capsys):
    with pytest.raises(SystemExit) as exit:
        __main__.main(words.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


# --- tables ---------------------------------------------------------------------------------------


def test_table(tmp_path, capsys, monkeypatch):
    """Seeds are tried until one reaches the target; the best one is written."""
    options = Options("parity", "elman", width=4, batch=4, steps=20, lengths=(3,))
    scores = iter(2 * [0.25, 0.75, 0.5, 0.75])
    tests = {"3": (TASKS["parity"], 3)}
    rows = [tables.Row(options, tests, seeds=3), tables.Row(options, tests, target=0.5, seeds=3)]
    monkeypatch.setitem(tables.TABLES, "digits", lambda: rows)
    monkeypatch.setattr(tables, "evaluate", lambda *_, **__: next(scores))
    words = ["digits", "--output", str(tmp_path / "a"), "--runs", str(tmp_path / "b")]
    tables.main(words)

    printed = capsys.readouterr().out
    assert "| parity | elman | 3 | 75.00 % | 1 | 3 | 20 |" in printed
    found = json.loads((tmp_path / "a/digits.json").read_text())["rows"]
    assert [row["accuracy"] for row in found] == [{"3": 0.75}, {"3": 0.75}]
    assert [row["options"]["seed"] for row in found] == [1, 0]
    assert [row["seeds tried"] for row in found] == [3, 1]
    assert [step for step, *_ in found[0]["curve"]] == [20]
    assert (tmp_path / "a/digits.png").read_bytes().startswith(b"\x89PNG")

    # Stopped before the second seed: that one begins, the others are not trained again.
    shutil.rmtree(tmp_path / "b/digits/parity-elman-1")
    kept = (tmp_path / "b/digits/parity-elman-2/metrics.jsonl").read_text()
    tables.main([*words, "--resume"])
    again = json.loads((tmp_path / "a/digits.json").read_text())["rows"]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in found]
    assert (tmp_path / "b/digits/parity-elman-2/metrics.jsonl").read_text() == kept


def test_each_length_has_its_share_of_the_steps():
    options = Options(
        "parity", "elman", width=4, batch=4, steps=60, lengths=(2, 3, 4), threshold=2, shares=True
    )
    state, seen = start(options), []
    while state.step < options.steps:
        state, metrics = advance(state, options)
        seen.append(metrics["length"])
    assert seen == [2, 3, 4] and state.stage == 2


def test_tracking_table(tmp_path):
    """What is not there yet is a dash."""
    rows = [
        {
            "options": {"task": task, "cell": cell},
            "accuracy": {"128": 1.0, "2048": 0.5},
        }
        for task, cell in (("parity", "gru"), ("s3", "gru"), ("a5", "lru"))
    ]
    lines = _tracking.table(rows).splitlines()
    assert lines[0].startswith("| cell | parity: theory | at 128 | at 2,048 | S3: theory |")
    assert "| gru | yes | 100.0 % | 50.0 % | yes | 100.0 % | 50.0 % | yes | – | – |" in lines
    assert "| lru | no | – | – | no | – | – | no | 100.0 % | 50.0 % |" in lines
    assert lines[-1] == "| chance |  | 50.0 % | 50.0 % |  | 16.7 % | 16.7 % |  | 1.7 % | 1.7 % |"
    assert len({line.count("|") for line in lines}) == 1
    _tracking.plot(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tracking_covers_its_tasks():
    rows = {(row.options.cell, row.options.task) for row in tables.tracking()}
    assert rows == {(cell, task) for cell in _tracking.THEORY for task in _tracking.TASKS}
    assert all(TASKS[task].outputs == count for task, count in _tracking.TASKS.items())


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_can_be_built(name):
    """Every model of every table, without training it."""
    for row in tables.TABLES[name]():
        state = jax.eval_shape(lambda: eqx.filter(start(row.options).model, eqx.is_array))  # noqa: B023
        assert jax.tree.leaves(state)
        assert row.tests and 0 < row.target <= 1
