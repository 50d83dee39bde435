"""One job's process: its own folders and share of the machine, and what its log says."""

import json
import shutil
import sys
import types
from dataclasses import replace

import distributed
import pytest

from bdlib import files, grid, job
from tests import batch


@pytest.fixture
def todo(tmp_path):
    batch.write_notebook(tmp_path / "notebooks", "02_awm", "pass")
    (run,) = grid.plan([tmp_path / "notebooks" / "02_awm.ipynb"], "quick", {}, {}, tmp_path / "out")
    return job.notebook(run, grid.source(run.notebook), "batch", 3, None)


def test_every_process_has_its_own_folders_and_its_share_of_the_cores(todo, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = job.environment(todo, tmp_path)
    assert found["IPYTHONDIR"] == str(tmp_path / "ipython") and found["JUPYTER_RUNTIME_DIR"] == str(
        tmp_path / "jupyter"
    )
    assert {found[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
    assert found["PYTHONPATH"].split(":")[0] == str(batch.ROOT)


@pytest.mark.parametrize("given", ["store", "s3://bucket/store"])
def test_store_and_datasets_lie_where_runall_was_told(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDLIB_HOME", given)
    monkeypatch.delenv("BDLIB_DATA", raising=False)
    wanted = given if "://" in given else str(tmp_path / "store")
    assert job.told_places() == {"BDLIB_HOME": wanted}
    todo = job.Job("model", "a model", "batch", grid.package_hash(), 1, None)
    monkeypatch.setenv("BDLIB_HOME", "/the/worker/has/another")
    assert job.environment(todo, tmp_path)["BDLIB_HOME"] == wanted


def test_a_worker_elsewhere_takes_its_own_threads(todo, tmp_path, monkeypatch):
    todo = job.Job("model", "a model", "batch", grid.package_hash(), None, None)
    monkeypatch.setattr(job, "cores", lambda: 16)
    assert job.environment(todo, tmp_path)["OMP_NUM_THREADS"] == "16"
    monkeypatch.setenv("BDLIB_THREADS", "4")
    assert job.environment(todo, tmp_path)["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("name", "visible", "seen"), [(0, None, "0"), (1, None, "1"), (2, None, "0"), (1, "5,7", "7")])
def test_each_embedded_worker_sees_a_gpu_of_its_own(monkeypatch, name, visible, seen):
    monkeypatch.setattr(distributed, "get_worker", lambda: types.SimpleNamespace(name=name))
    monkeypatch.setattr(job, "gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert job.gpu() == {"CUDA_VISIBLE_DEVICES": seen}


def test_a_worker_of_another_cluster_keeps_the_gpus_that_it_was_given(monkeypatch):
    monkeypatch.setattr(distributed, "get_worker", lambda: types.SimpleNamespace(name="tcp://there:1"))
    monkeypatch.setattr(job, "gpus", lambda: 2)
    assert job.gpu() == {}


def test_a_job_of_another_version_is_not_started(todo, monkeypatch):
    monkeypatch.setattr(grid, "package_hash", lambda: "newer")
    outcome = job.do(todo, "{}", None, print)
    assert not outcome.well and "another version of bdlib" in outcome.error


@pytest.mark.parametrize(
    ("changed", "said"), [({"version": "older"}, "bdlib here is not the grid's"), ({"key": "older"}, "stored rows")]
)
def test_code_or_rows_edited_since_the_plan_end_a_job_before_its_notebook_runs(
    todo, tmp_path, monkeypatch, changed, said
):
    put_shown(todo)
    todo = replace(todo, **changed)
    monkeypatch.setattr(grid, "package_hash", lambda: todo.version)  # of this process alone
    outcome = job.do(todo, grid.source(tmp_path / "notebooks" / "02_awm.ipynb"), None, print)
    assert not outcome.well and said in outcome.error and outcome.tries == 1
    left = {path.name for path in files.place(todo.folder).iterdir()}
    assert left - {".lock"} == {"begun.json", "failed.json", "log.txt"}, "nothing of an older try"


def test_a_model_of_edited_code_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "package_hash", lambda: "older")
    outcome = job.do(
        job.Job("model", "m", "batch", "older", 1, None, {}, folder=str(tmp_path / "m")), None, None, print
    )
    assert not outcome.well and "bdlib here is not the grid's" in outcome.error


def put_shown(todo):
    """What an older try left for people."""
    for name in ("executed.ipynb", "executed.html", "log.txt"):
        path = files.place(todo.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of last week")


@pytest.mark.parametrize("finished", [False, True], ids=["not finished", "finished by another process"])
def test_a_run_without_its_model_shows_the_models_log_and_nothing_older(todo, finished):
    put_shown(todo)
    folder = files.place(todo.folder)
    if finished:
        (folder / "rows.csv").write_text("")
        files.write_json(folder / "done.json", {"key": todo.key})
    model = job.Outcome(
        False, 9.0, "RuntimeError: no", log="models/abc/log.txt", traceback="Traceback\nRuntimeError: no"
    )
    outcome = job.do(todo, "{}", model, print)
    assert outcome == replace(model, seconds=0.0, error="its model could not be made: RuntimeError: no")
    note = json.loads((folder / "failed.json").read_text())
    assert note["log"] == model.log and note["traceback"] == model.traceback and note["key"] == todo.key
    assert [(folder / name).exists() for name in ("executed.ipynb", "executed.html", "log.txt")] == 3 * [finished]


@pytest.mark.parametrize("ends", ["true", "false"])
def test_a_log_that_cannot_be_written_changes_not_how_the_job_ended(todo, monkeypatch, ends):
    (files.place(todo.folder) / "log.txt").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", shutil.which(ends))
    outcome = job.do(todo, "{}", None, print)
    assert outcome.well == (ends == "true") and outcome.log == ""
    assert (files.place(todo.folder) / "failed.json").exists() == (ends == "false")


def test_what_a_log_says(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"\x1b[31mExecuting:   0%| | 0/24 [00:00<?]\rExecuting:  29%|### | 7/24 [00:02<00:05]")
    assert job.cells_done(log) == (7, 24)
    log.write_bytes(b"")
    assert job.cells_done(log) == (0, 0)
    text = job.plain("a\rb\rc\n\x1b[31mValueError\x1b[0m: no\nafterwards\n")
    assert text == "c\nValueError: no\nafterwards\n"
    assert job.last_error(text, 1) == "ValueError: no"
    assert job.last_error("only this\n", 1) == "only this"
    assert job.last_error("", -9) == "the process ended with status -9"


def test_a_failure_that_cannot_even_be_noted_is_said(todo, tmp_path):
    (tmp_path / "out").write_text("in the way")
    outcome = job.failed(todo, job.Outcome(False, 1.0, "ValueError: no"))
    assert outcome.error.startswith("ValueError: no (and ") and "Not a directory" in outcome.error
