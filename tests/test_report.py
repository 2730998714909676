"""The benchmarks' files: resumed, and reported as they are."""

import json
import pathlib

import pytest

from benchmarks import __main__, _cases, _plots, report, speed
from benchmarks._cases import Case


@pytest.mark.parametrize("file", report.FILES)
def test_the_tables_are_up_to_date(file):
    """If not: `python -m benchmarks report`."""
    text, blocks = (report.ROOT / file).read_text(), report.tables(report.RESULTS)
    assert report.rewritten(text, {name: blocks[name] for name in report.FILES[file]}) == text


def test_a_marker_that_is_missing_is_an_error():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    assert report.rewritten(text, {"x": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="begin y"):
        report.rewritten(text, {"y": "new"})


def test_crossover():
    slow, fast, noise = (2.0, 2.1), (0.5, 0.6), (0.9, 1.1)
    assert _plots.crossover([(1000, *slow), (4000, *fast)]) == pytest.approx(2000)
    assert _plots.crossover([(1000, *fast), (4000, *fast)]) == pytest.approx(1000)
    assert _plots.crossover([(1000, *noise), (4000, *fast)]) == pytest.approx(4000)
    assert _plots.crossover([(1000, *fast), (4000, *noise)]) is None
    assert _plots.crossover([]) is None


def test_solvers_are_read():
    assert _cases.parse_solver("default") is None
    assert _cases.parse_solver("Jacobi(64)").chunk_size == 64
    for wrong in ("Nothing", "Newton(x)", "os"):
        with pytest.raises(ValueError, match="`solvers`"):
            _cases.parse_solver(wrong)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_presets_ask_each_question_once(platform):
    cases = list(_cases.preset(platform))
    keys = [case.key() for case in cases]
    assert len(set(keys)) == len(keys)
    for case in cases:
        for solver in case.solvers:
            if solver != _cases.EQUINOX:
                _cases.parse_solver(solver.removesuffix(_cases.NO_KERNELS))  # or it raises
    assert cases[0].question == "default against lax.scan"


def test_expected_seconds_grow_with_the_length():
    done = [(Case("", "GRU", 1000), 2.0)]
    assert speed.seconds_expected(Case("", "GRU", 4000), done) == pytest.approx(8)
    assert speed.seconds_expected(Case("", "GRU", 500), done) == pytest.approx(2)
    assert speed.seconds_expected(Case("", "GRU", 500), []) == 0


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
def test_speed_goes_on_where_it_was(measured, monkeypatch, capsys):
    folder, options = measured
    (path,) = folder.iterdir()
    before = path.read_text()

    def interrupted(case, **_):
        assert case.cell == "Elman"  # the GRU is there
        raise KeyboardInterrupt

    monkeypatch.setattr(_cases, "measure", interrupted)
    speed.main(options)
    with pytest.raises(SystemExit) as stop:
        speed.main(["--cells", "GRU", "Elman", *options[2:]])
    assert stop.value.code == 130 and "goes on" in capsys.readouterr().out
    assert path.read_text() == before


@pytest.mark.slow
def test_speed_keeps_within_its_budget(measured, monkeypatch, capsys):
    folder, options = measured
    monkeypatch.setattr(_cases, "measure", None)
    speed.main(["--cells", "Elman", *options[2:], "--budget", "-1"])
    assert "did not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_results_of_another_machine_are_not_mixed(measured, tmp_path):
    (path,) = measured[0].iterdir()
    content = json.loads(path.read_text())
    content["environment"]["device"] = "another"
    other = tmp_path / "speed-cpu.json"
    other.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another device"):
        speed.Results(other, False)
    assert speed.Results(other, True).content["cases"] == {}


def test_plots_are_drawn(tmp_path):
    for platform in report.PLATFORMS:
        content = report.load(report.RESULTS, platform)
        if content is not None:
            (tmp_path / f"speed-{platform}.json").write_text(json.dumps(content))
    written = report.draw(tmp_path)
    assert written and all(path.stat().st_size < 150_000 for path in written)


def test_batches_that_are_slower_than_the_scan_are_bold():
    def record(size, batch, ratio, memory):
        scan = {"name": "lax.scan", "gradient": {"temporary_bytes": 100}}
        measured = {"ratio": [ratio] * 3, "temporary_bytes": memory}
        rows = [scan, {"name": "default", "gradient": measured}]
        return {**Case("", "GRU", 1024, batch, size)._asdict(), "floor_bytes": {}, "rows": rows}

    records = [record(32, 1, 0.3, 20), record(32, 8, 1.2, 50), record(32, 64, 1.05, 101)]
    records += [record(128, 1, 0.5, 50)]  # no batch, no row
    header, _, line = report.batches_table({"cases": dict(enumerate(records))}).splitlines()
    assert [title.strip() for title in header.strip("| ").split("|")][:4] == (
        ["cell", "units", "L", "B = 1"]
    )
    assert [cell.strip() for cell in line.strip("| ").split("|")] == (
        ["GRU", "32", "1,024", "0.3 (0.3–0.3)", "**1.2 (1.2–1.2)**", "1.05 (1.05–1.05)"]
        + ["0.20", "0.50", "**1.01**"]
    )


def test_goals_that_are_missed_are_bold():
    def record(cell, size, length, ratio, seconds):
        row = {"name": "default", "forward": {"ratio": [ratio] * 3, "seconds": [seconds] * 3}}
        case = Case("", cell, length, 1, size)._asdict()
        return {**case, "floor_bytes": {"forward": 10**9}, "rows": [row, row]}

    records = [
        record("DiagonalGRU", 64, 4096, 1 / 700, 1.0),
        record("DiagonalGRU", 64, 262_144, 1 / 900, 1.0),  # too long to count
        record("GRU", 64, 65_536, 1 / 50, 1.0),
        record("DiagonalGRU", 1024, 65_536, 1 / 600, 0.005),
    ]
    content = {"cases": dict(enumerate(records)), "copy": {"bytes_per_second": [1e12] * 3}}
    diagonal, dense, floor = report.goals_table(content).splitlines()[2:]
    assert "| 700× |" in diagonal and "| **50×** |" in dense
    assert "| **5** |" in floor


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
