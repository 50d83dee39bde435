"""What is known of runs: their states, the time that is left, all rows of an output folder, and the page."""

import json
import re

import pandas as pd
import pytest

import bdlib
import runall
from bdlib import grid, locks, page, results, runs
from tests import batch
from tests.test_results import row


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    batch.write_notebook(tmp_path / "notebooks", "00_backdoors", "pass")
    monkeypatch.setattr(runall, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


@pytest.fixture(params=["disk", "object store"])
def out(request, tmp_path):
    return tmp_path / "out" if request.param == "disk" else request.getfixturevalue("bucket") / "out"


def planned(notebooks, out, **axes):
    return grid.plan([notebooks / "00_backdoors.ipynb"], "quick", axes, {}, out)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def finish(run, seconds=60.0, **changes):
    put(run.folder / "rows.csv", results.table([row() | changes]).to_csv(index=False))
    put(run.folder / "done.json", json.dumps({"key": run.key, "parameters": run.parameters, "seconds": seconds}))


def fail(run):
    note = {
        "key": run.key,
        "seconds": 3.0,
        "error": "ValueError: <b>no</b>",
        "traceback": "Traceback ...\nValueError: <b>no</b>",
        "log": "models/0 a/log.txt",
    }
    put(run.folder / "failed.json", json.dumps(note))


def test_states(notebooks, out):
    done, damaged, other, without, running, failed, stale, missing = planned(notebooks, out, seed=list(range(8)))
    for run in (done, damaged, other, without):
        finish(run)
    put(damaged.folder / "done.json", '{"key": ')
    put(other.folder / "done.json", json.dumps({"key": "of another version", "seconds": 1.0}))
    (without.folder / "rows.csv").unlink()
    fail(failed)
    put(stale.folder / "failed.json", json.dumps({"key": "of another version"}))
    with locks.hold(running.folder / ".lock"):
        found = runs.states([done, damaged, other, without, running, failed, stale, missing], runs.Listing(out))
    words = [found[run.folder].word for run in (done, damaged, other, without, running, failed, stale, missing)]
    assert words == ["done", "missing", "missing", "missing", "running", "failed", "missing", "missing"]
    assert found[done.folder].seconds == 60 and found[failed.folder].error == "ValueError: <b>no</b>"
    assert runs.states([done], runs.Listing(out))[done.folder].word == "done"


def test_nothing_is_known_of_a_folder_that_is_not_there(notebooks, out):
    (run,) = planned(notebooks, out)
    assert (
        runs.states([run], runs.Listing(out))[run.folder] == runs.State("missing")
        and runs.estimates(runs.Listing(out)) == {}
    )


@pytest.mark.parametrize("name", ["o [1]", "a::b", "ä *"])
def test_an_output_folder_may_have_any_name(notebooks, tmp_path, name):
    out = tmp_path / name
    run, _ = planned(notebooks, out, seed=[0, 1])
    finish(run)
    there = runs.Listing(out)
    assert [state.word for state in runs.states(planned(notebooks, out, seed=[0, 1]), there).values()] == [
        "done",
        "missing",
    ]
    assert len(runs.collect(out)) == len(runs.rows([run.folder]))


def test_estimates_are_of_the_runs_most_alike(notebooks, out):
    for run, seconds in zip(planned(notebooks, out, seed=[0, 1, 2]), (10.0, 20.0, 90.0), strict=True):
        finish(run, seconds)
    (digits,) = planned(notebooks, out, dataset=["digits"])
    finish(digits, 5.0)
    (damaged,) = planned(notebooks, out, seed=[9])
    put(damaged.folder / "done.json", "{")
    known = runs.estimates(runs.Listing(out))
    assert runs.estimate(planned(notebooks, out, seed=[7])[0], known) == 20
    assert runs.estimate(digits, known) == 5
    assert runs.estimate(planned(notebooks, out, attack=["badnets"], dataset=["cifar10"])[0], known) == 15
    assert runs.estimate(planned(notebooks, out)[0], {}) is None


def test_status_counts_and_dry_run_lists(notebooks, tmp_path, capsys):
    out = tmp_path / "out"
    done, failed, _ = planned(notebooks, out, seed=[0, 1, 2])
    finish(done, 200.0)
    fail(failed)
    arguments = ["--out", str(out), "--seed", "0", "1", "2", "--workers", "2"]
    assert runall.main([*arguments, "--status"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"done +1\nrunning +0\nfailed +1\nmissing +1\n", shown) and "ValueError: <b>no</b>" in shown
    assert "time left: about 3 min with 2 at once" in shown
    assert runall.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert (
        "would run  00_backdoors signs blended budget=200 seed=2  about 3 min" in shown
        and "2 runs to do, 1 finished" in shown
    )
    assert runall.main([*arguments, "--dry-run", "--only-failed"]) == 0
    shown = capsys.readouterr().out
    assert "seed=1" in shown and "seed=2" not in shown
    empty = ["--out", str(tmp_path / "empty"), "--dry-run", "--only-failed"]
    assert runall.main(empty) == 0 and "0 runs to do, 0 finished before" in capsys.readouterr().out
    assert runall.main([*arguments, "--dry-run", "--force"]) == 0
    assert "3 runs to do" in capsys.readouterr().out and (done.folder / "done.json").exists(), (
        "a dry run changes nothing"
    )


def test_the_time_left_says_what_it_does_not_know(notebooks, tmp_path, capsys):
    assert runall.main(["--out", str(tmp_path / "out"), "--status"]) == 0
    assert "time left: unknown, as no run like the 1 to do is finished" in capsys.readouterr().out


def test_collect_takes_the_rows_of_every_finished_run(notebooks, tmp_path, capsys):
    out = tmp_path / "out"
    first, second, half, bare = planned(notebooks, out, seed=[0, 1, 2, 3])
    finish(first, seed=0)
    finish(second, seed=1)
    finish(bare, seed=3)
    (bare.folder / "rows.csv").unlink()
    put(half.folder / "rows.csv", "paper")
    (deeper,) = planned(notebooks, out / "figures" / "budgets", seed=[4])
    finish(deeper, 7.0, seed=4)
    assert runs.estimates(runs.Listing(out)) == runs.estimates(runs.Listing(out / "figures")) | {
        ("00_backdoors",): 60.0,
        ("00_backdoors", "quick", "signs"): 60.0,
    }
    assert runall.main(["--out", str(out), "--collect"]) == 0
    assert "3 rows" in capsys.readouterr().out
    table, parquet = results.load(out / "all_rows.csv"), pd.read_parquet(out / "all_rows.parquet")
    assert sorted(table["seed"]) == [0, 1, 4] and list(parquet.columns) == results.COLUMNS and len(parquet) == 3
    assert runall.main(["--out", str(tmp_path / "empty"), "--collect"]) == 0
    assert "0 rows" in capsys.readouterr().out


def test_an_output_of_another_version_is_refused_unless_told(out):
    runs.claim(out, mixed=False)
    runs.claim(out, mixed=False)
    put(out / "version.json", '{"bdlib": "0.0.1"}')
    with pytest.raises(ValueError, match=r"holds runs of bdlib 0\.0\.1, this is .*--mix-versions"):
        runs.claim(out, mixed=False)
    runs.claim(out, mixed=True)
    assert json.loads((out / "version.json").read_text()) == {"bdlib": bdlib.__version__}


def test_shards_are_the_whole_grid_and_share_no_model(notebooks, tmp_path):
    whole = planned(notebooks, tmp_path / "out", seed=[0, 1, 2, 3, 4], budget=[10, 20])
    parts = [grid.shard(whole, part, 3) for part in (1, 2, 3)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in whole)
    models = [{run.model for run in part} for part in parts]
    assert [len(part) for part in models] == [2, 2, 1] and not set.intersection(*models)
    with pytest.raises(ValueError, match="shard 6/6 holds no run: the grid has 5 models"):
        grid.shard(whole, 6, 6)


def test_a_notebook_becomes_a_page_once(notebooks, out):
    (run,) = planned(notebooks, out)
    page.of_notebook(run.folder)
    assert not (run.folder / "executed.html").exists(), "papermill wrote nothing"
    put(run.folder / "executed.ipynb", run.notebook.read_text()[:-20])
    page.of_notebook(run.folder)
    assert not (run.folder / "executed.html").exists(), "half a notebook"
    put(run.folder / "executed.ipynb", run.notebook.read_text())
    page.of_notebook(run.folder)
    text = (run.folder / "executed.html").read_text()
    assert "poison_rate" in text
    put(run.folder / "executed.html", "here already")
    page.of_notebook(run.folder)
    assert (run.folder / "executed.html").read_text() == "here already"


def test_the_page_shows_rows_failures_and_figures_and_escapes_what_it_shows(notebooks, out):
    done, failed, _ = planned(notebooks, out, seed=[0, 1, 2])
    finish(done)
    put(done.folder / "log.txt", "the log")
    fail(failed)
    whole = planned(notebooks, out, seed=[0, 1, 2])
    rows = runs.rows([done.folder])
    page.write(out, whole, runs.states(whole, runs.Listing(out)), rows, pages=[done.place], figures=["signs a.png"])
    text = (out / "index.html").read_text()
    assert "1 of 3 runs done" in text and "1 failed" in text and "ValueError: &lt;b&gt;no&lt;/b&gt;" in text
    assert re.findall(r'href="([^"]+)/executed.html"', text) == [done.place]
    assert re.findall(r'href="([^"]+/log.txt)"', text) == [f"{done.place}/log.txt", "models/0%20a/log.txt"]
    assert "figures/signs%20a.png" in text and "torch 2" in text and "Python 3" in text
    assert text.count("<tr>") == 2 + len(rows) + len(whole) and "http" not in text.replace("<!doctype html>", "")
