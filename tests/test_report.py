"""The benchmarks' files: resumed, and reported as they are."""

import json
import pathlib

import jax
import pytest

from benchmarks import __main__, _plots, _solvers, _tables, report, sharded, speed
from benchmarks._measure import Results
from benchmarks.speed import Case


@pytest.mark.parametrize("file", report.FILES)
def test_the_tables_are_up_to_date(file):
    """If not: `python -m benchmarks report`."""
    text, blocks = (report.ROOT / file).read_text(), report.tables()
    assert report.rewritten(text, {name: blocks[name] for name in report.FILES[file]}) == text


def test_a_marker_that_is_missing_is_an_error():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    assert report.rewritten(text, {"x": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="begin y"):
        report.rewritten(text, {"y": "new"})


def test_solvers_are_read():
    assert _solvers.parse_solver("default") is None
    assert _solvers.parse_solver("Jacobi(64)").chunk_size == 64
    for wrong in ("Nothing", "Newton(x)", "os"):
        with pytest.raises(ValueError, match="`solvers`"):
            _solvers.parse_solver(wrong)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_presets_ask_each_question_once(platform):
    cases = list(speed.preset(platform))
    keys = [case.key() for case in cases]
    assert len(set(keys)) == len(keys)
    for case in cases:
        for solver in case.solvers:
            if solver != speed.EQUINOX:
                _solvers.parse_solver(solver.removesuffix(_solvers.NO_KERNELS))  # or it raises
    assert cases[0].question == "default against lax.scan"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A tiny run of the command, and its file."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--cells", "GRU", "--lengths", "16", "--widths", "4", "--solvers", "default"]
    options += ["equinox", "--project", "--repetitions", "2", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "copy_bandwidth", lambda _: {"bytes_per_second": [1e9, 1e9, 1e9]})
        speed.main(options)
    return folder, options


@pytest.mark.slow
def test_speed_measures_and_compares(measured):
    (path,) = measured[0].iterdir()
    content = json.loads(path.read_text())
    (record,) = content["cases"].values()
    assert {"date", "device", "jax", "pararnn"} <= content["environment"].keys()
    assert [row["name"] for row in record["rows"]] == ["lax.scan", "default", "equinox"]
    for row in record["rows"]:
        assert row["error"] < 1e-5 and row["gradient_error"] < 1e-4
    # 16 steps of 4 numbers of 4 bytes each, read and written.
    assert record["floor_bytes"] == {"forward": 2 * 256, "gradient": 3 * 256}


@pytest.mark.slow
def test_speed_continues_where_it_was(measured, monkeypatch, capsys):
    folder, options = measured
    (path,) = folder.iterdir()
    before = path.read_text()

    def interrupted(case, **_):
        assert case.cell == "Elman"  # the GRU is there
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "measure", interrupted)
    speed.main(options)
    with pytest.raises(SystemExit) as stop:
        speed.main(["--cells", "GRU", "Elman", *options[2:]])
    assert stop.value.code == 130 and "continues" in capsys.readouterr().out
    assert path.read_text() == before


@pytest.mark.slow
def test_speed_keeps_within_its_budget(measured, monkeypatch, capsys):
    folder, options = measured
    monkeypatch.setattr(speed, "measure", None)
    speed.main(["--cells", "Elman", *options[2:], "--budget", "-1"])
    assert "call again to continue" in capsys.readouterr().out


@pytest.mark.slow
def test_results_of_another_machine_are_not_mixed(measured, tmp_path):
    (path,) = measured[0].iterdir()
    content = json.loads(path.read_text())
    content["environment"]["device"] = "another"
    other = tmp_path / "speed-cpu.json"
    other.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another device"):
        Results(other)
    assert Results(other, fresh=True).content.keys() == {"environment"}


def test_plots_are_drawn(tmp_path):
    """One for each picture that is committed, but for that of a model that is gone."""
    contents = (report.load(name) for name in ("speed-cpu", "convergence", "gpu"))
    written = _plots.draw(*contents, tmp_path)
    assert {path.name for path in written} | {"scaling.png"} == {
        path.name for path in report.RESULTS.glob("*.png")
    }
    assert all(path.stat().st_size < 150_000 for path in written)


def test_batches_that_are_slower_than_the_scan_are_bold():
    def record(size, batch, ratio, memory):
        scan = {"name": "lax.scan", "gradient": {"temporary_bytes": 100}}
        measured = {"ratio": [ratio] * 3, "temporary_bytes": memory}
        rows = [scan, {"name": "default", "gradient": measured}]
        return {**Case("", "GRU", 1024, batch, size)._asdict(), "floor_bytes": {}, "rows": rows}

    records = [record(32, 1, 0.3, 20), record(32, 8, 1.2, 50), record(32, 64, 1.05, 101)]
    records += [record(128, 1, 0.5, 50)]  # no batch, no row
    header, _, line = _tables.batches({"cases": dict(enumerate(records))}).splitlines()
    assert [title.strip() for title in header.strip("| ").split("|")][:4] == (
        ["cell", "units", "L", "B = 1"]
    )
    assert [cell.strip() for cell in line.strip("| ").split("|")] == (
        ["GRU", "32", "1,024", "0.3 (0.3–0.3)", "**1.2 (1.2–1.2)**", "1.05 (1.05–1.05)"]
        + ["0.20", "0.50", "**1.01**"]
    )


def test_goals_that_are_missed_are_bold():
    def record(cell, length, ratio, memory):
        def row(name, ratio, memory):
            kinds = {"ratio": [ratio] * 3, "compile_seconds": 1.0, "temporary_bytes": memory}
            return {"name": name, "forward": kinds, "gradient": kinds}

        rows = [row("lax.scan", 1.0, 100), row("default", ratio, memory)]
        return {**Case("", cell, length)._asdict(), "rows": rows}

    records = [record("GRU", 4096, 0.7, 100), record("GRU", 1024, 9.0, 900)]  # too short to count
    records += [record("S5", 4096, 1.0, 120), record("S5", 65_536, 1.2, 90)]
    found = _tables.targets({"cases": dict(enumerate(records))}).splitlines()[2:]
    assert [line.strip("| ").split(" | ") for line in found] == [
        ["GRU", "0.7 (0.7–0.7)", "**0.7 (0.7–0.7)**", "1.00", "1.00", "1.00"],
        ["S5", "**1.2 (1.2–1.2)**", "**1.2 (1.2–1.2)**", "1.00", "1.00", "**1.20**"],
    ]


def test_a_sharded_problem_agrees():
    case = {"cell": "Elman", "size": 4, "length": 512, "solver": "Newton", "dtype": "float32"}
    found = sharded.errors(case, jax.device_count())
    assert found["value error"] <= 1e-5 and found["gradient error"] <= 1e-4
    assert found["iterations"] > 0 and not found["finished sequentially"]


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_explains_each_benchmark_in_a_line(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    explained = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    programs = pathlib.Path(__main__.__file__).parent.glob("[a-z]*.py")
    assert explained.keys() == {path.stem for path in programs}
    assert all(len(line) <= 100 for line in lines)


def test_an_unknown_benchmark(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "chess"])
    with pytest.raises(SystemExit) as exit:
        __main__.main()
    assert exit.value.code == 2
    assert "error: unknown benchmark 'chess'" in capsys.readouterr().err
