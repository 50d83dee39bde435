"""The grid on Dask: every model once and before its runs, on threads of one process and on workers that share an object store."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import distributed
import psutil
import pytest

import runall
from bdlib import grid, job, schedule
from tests import batch

ALOUD = {"threads": 1, "timeout": None, "on_start": print, "on_model": print, "tell": print}


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    batch.write_notebook(tmp_path / "notebooks", "02_awm", batch.TRAIN)
    monkeypatch.setattr(runall, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def sixty(notebooks, out):
    return planned(notebooks, out, attack=["badnets", "blended"], seed=[0, 1, 2], budget=list(range(10, 110, 10)))


def planned(notebooks, out, **axes):
    return grid.plan([notebooks / "02_awm.ipynb"], "quick", axes, {}, out)


def carry_out(runs, workers=2, **changes):
    """The outcomes by run, the models that were made, and the number of them that was told at the start."""
    told, models, outcomes = [], [], {}
    with schedule.cluster(workers, None) as client:
        options = {"threads": 1, "timeout": None, "on_start": told.append, "tell": lambda at: None} | changes
        for run, outcome in schedule.run_all(runs, client, on_model=lambda *model: models.append(model), **options):
            outcomes[run.folder] = outcome
    return outcomes, models, told


def test_sixty_runs_over_six_models_make_each_model_once_and_first(notebooks, tmp_path, monkeypatch):
    order = []

    def once(todo, source, tell):
        order.append((todo.kind, todo.setting or todo.parameters))
        return job.Outcome(True, 1.0), False

    monkeypatch.setattr(job, "once", once)
    runs = sixty(notebooks, tmp_path / "out")
    outcomes, models, told = carry_out(runs)
    assert len(runs) == 60 and told == [6] and len(models) == 6
    assert len(outcomes) == 60 and all(outcome.well for outcome in outcomes.values())
    made = [(chosen["attack"], chosen["seed"]) for kind, chosen in order if kind == "model"]
    assert len(made) == len(set(made)) == 6
    seen = set()
    for kind, chosen in order:
        if kind == "model":
            seen.add((chosen["attack"], chosen["seed"]))
        else:
            assert (chosen["attack"], chosen["seed"]) in seen, "a run started before its model was made"
    executed = [chosen["out"] for kind, chosen in order if kind == "notebook"]
    assert len(executed) == len(set(executed)) == 60


@pytest.mark.parametrize("shared", [True, False], ids=["models shared by ten runs", "a model each"])
def test_runs_start_in_the_order_given(notebooks, tmp_path, monkeypatch, shared):
    order = []

    def once(todo, source, tell):
        order.append(todo.folder)
        time.sleep(0.01)
        return job.Outcome(True), False

    monkeypatch.setattr(job, "once", once)
    runs = sixty(notebooks, tmp_path / "out")[:: 1 if shared else 10]
    carry_out(runs, workers=1)
    executed = [folder for folder in order if "models" not in folder]
    wanted = [str(run.folder) for run in runs]
    late = [abs(wanted.index(folder) - place) for place, folder in enumerate(executed)]
    assert max(late) == 0


@pytest.mark.parametrize("shared", [True, False], ids=["one model for all", "a model each"])
def test_no_worker_is_idle_while_runs_wait(notebooks, tmp_path, monkeypatch, shared):
    """Three workers, and runs that end only when three of them run.  Dask guesses far too little for a run, as it does for hours."""
    monkeypatch.setitem(distributed.config["distributed"]["scheduler"], "unknown-task-duration", "1ms")
    three = threading.Barrier(3, timeout=20)

    def once(todo, source, tell):
        if todo.kind == "notebook":
            three.wait()
        return job.Outcome(True), False

    monkeypatch.setattr(job, "once", once)
    axes = {"budget": list(range(10, 100, 10))} if shared else {"seed": list(range(9))}
    outcomes, _, told = carry_out(planned(notebooks, tmp_path / "out", attack=["badnets"], **axes), workers=3)
    assert told == [int(shared)] and len(outcomes) == 9 and all(outcome.well for outcome in outcomes.values())


def test_a_model_that_cannot_be_made_fails_its_runs_and_no_other(notebooks, tmp_path, monkeypatch):
    def once(todo, source, tell):
        broken = todo.kind == "model" and todo.setting["attack"] == "blended"
        return job.Outcome(not broken, 1.0, "RuntimeError: no" if broken else ""), False

    monkeypatch.setattr(job, "once", once)
    runs = sixty(notebooks, tmp_path / "out")
    outcomes, _, _ = carry_out(runs)
    for run in runs:
        outcome = outcomes[run.folder]
        assert outcome.well == (run.parameters["attack"] == "badnets")
        assert outcome.well or outcome.error == "its model could not be made: RuntimeError: no"


def test_a_model_of_one_run_is_no_task_of_its_own(notebooks, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "once", lambda *_: (job.Outcome(True), False))
    runs = planned(notebooks, tmp_path / "out", attack=["badnets"], seed=[0, 1])
    assert carry_out(runs)[2] == [0]


def test_an_edit_while_the_grid_runs_gives_no_run_the_key_of_other_code(notebooks, tmp_path, monkeypatch):
    ran = []

    def once(todo, source, tell):
        ran.append((todo, source))
        batch.write_notebook(notebooks, "02_awm", "print('edited')")
        return job.Outcome(True), False

    monkeypatch.setattr(job, "once", once)
    carry_out(planned(notebooks, tmp_path / "out", seed=[0, 1]), workers=1)
    assert len(ran) == 2 and ran[0][1] == ran[1][1]
    assert all(todo.key == grid.key(source, todo.parameters) for todo, source in ran)


def test_closing_the_iterator_stops_what_runs(notebooks, tmp_path, monkeypatch):
    seen = []

    def once(todo, source, tell):
        deadline = time.monotonic() + (0 if todo.parameters["seed"] == 0 else 30)
        while time.monotonic() < deadline and todo.batch not in job.stopped:
            time.sleep(0.05)
        seen.append(todo.batch in job.stopped)
        return job.Outcome(True), False

    monkeypatch.setattr(job, "once", once)
    runs = planned(notebooks, tmp_path / "out", attack=["badnets"], seed=[0, 1])
    start = time.monotonic()
    with schedule.cluster(2, None) as client:
        ended = schedule.run_all(runs, client, **ALOUD)
        next(ended)
        ended.close()
    assert seen == [False, True] and time.monotonic() - start < 25


def test_an_embedded_cluster_does_not_chat_of_the_connections_that_it_closes():
    logging.getLogger("distributed").setLevel(logging.INFO)
    with schedule.cluster(1, None):
        pass
    assert not logging.getLogger("distributed.batched").isEnabledFor(logging.INFO)


def test_the_dashboard_is_for_this_host_alone_and_where_it_is_said_to_be():
    with schedule.cluster(1, None) as client:
        port = urlsplit(client.dashboard_link).port
        assert urllib.request.urlopen(client.dashboard_link, timeout=10).status == 200
        found = [at.laddr.ip for at in psutil.net_connections("tcp") if at.status == "LISTEN" and at.laddr.port == port]
    assert found == ["127.0.0.1"]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(job, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [schedule.threads(workers, None) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    assert schedule.threads(None, "tcp://there:8786") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert schedule.threads(2, None) == 3


def test_by_default_there_are_as_many_workers_as_the_cores_allow(monkeypatch):
    monkeypatch.setattr(job, "cores", lambda: 8)
    monkeypatch.setattr(job, "gpus", lambda: 0)
    counts = {}
    for threads in ("", "1", "3", "16"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        counts[threads] = schedule.default_workers()
    assert counts == {"": 4, "1": 8, "3": 2, "16": 1}
    monkeypatch.setattr(job, "gpus", lambda: 2)
    assert schedule.default_workers() == 2


def test_an_unreachable_scheduler_is_named_soon(notebooks, tmp_path, capsys):
    start = time.monotonic()
    out = tmp_path / "out"
    assert runall.main(["--out", str(out), "--budget", "10", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err
    assert time.monotonic() - start < 60 and not list(out.glob("*/*/log.txt"))


class Cluster:
    """A scheduler and workers, each a process in a working folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []
        address = folder / "scheduler.json"
        self.start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)
        )
        self.file = str(address)
        deadline = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.address = json.loads(address.read_text())["address"]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        place = self.folder / f"place{len(self.processes)}"
        place.mkdir()
        command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]]
        log = (place / "log").open("wb")
        process = subprocess.Popen(
            command,
            cwd=place,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def worker(self, **environment: str) -> subprocess.Popen:
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--scheduler-file", self.file]
        return self.start("worker", *options, **({"BDLIB_THREADS": "1", "PYTHONPATH": str(batch.ROOT)} | environment))

    def wait(self, workers: int) -> None:
        from distributed import Client

        with Client(self.address, timeout=30) as client:
            client.wait_for_workers(workers, timeout=60)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def dask(tmp_path):
    (tmp_path / "dask").mkdir()
    running = Cluster(tmp_path / "dask")
    yield running
    running.close()


def test_two_workers_that_share_an_object_store_make_the_same_table_even_if_one_is_killed(
    notebooks, tmp_path, bucket, dask, monkeypatch
):
    dataset = batch.write_images(tmp_path / "images")
    arguments = ["--dataset", dataset, "--attack", "badnets", "--budget", "4", "8", "16"]
    here = batch.start(
        notebooks,
        *arguments,
        "--workers",
        "2",
        "--out",
        str(tmp_path / "out"),
        BDLIB_HOME=str(tmp_path / "home"),
        OMP_NUM_THREADS="1",
    )
    text, _ = here.communicate(timeout=180)
    assert here.returncode == 0, text
    home = str(bucket / "home")
    victim, _ = dask.worker(BDLIB_HOME=home), dask.worker(BDLIB_HOME=home)
    dask.wait(2)
    there = batch.start(
        notebooks, *arguments, "--scheduler", dask.address, "--out", str(bucket / "out"), BDLIB_HOME=home
    )
    deadline = time.monotonic() + 120
    while not list((bucket / "out").glob("02_awm/*/.lock")):  # a notebook is being executed
        assert there.poll() is None and time.monotonic() < deadline, there.stdout.read()
        time.sleep(0.2)
    os.kill(victim.pid, signal.SIGKILL)
    text, _ = there.communicate(timeout=240)
    assert there.returncode == 0, text
    assert batch.table(bucket / "out" / "results.csv").equals(batch.table(tmp_path / "out" / "results.csv"))
    assert len(list((bucket / "home" / "store").glob("*.safetensors"))) == 1
    assert (bucket / "out" / "index.html").exists() and len(list((bucket / "out").glob("02_awm/*/executed.html"))) == 3


def test_a_lost_scheduler_fails_what_ran_and_starts_nothing_more(notebooks, tmp_path, dask):
    dask.worker(BDLIB_HOME=str(tmp_path / "home"))
    dask.wait(1)
    runs = planned(notebooks, tmp_path / "out", attack=["badnets"], seed=[0, 1])
    lose = threading.Timer(2, os.killpg, [dask.processes[0].pid, signal.SIGKILL])
    with schedule.cluster(None, dask.address) as client:
        lose.start()
        ((run, outcome),) = schedule.run_all(runs, client, **ALOUD)
    assert run is runs[0] and not outcome.well and "lost the connection to the scheduler" in outcome.error


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'bdlib'\")", "No module named 'bdlib'"),
        (
            "__path__ = [{real!r}]\nimport bdlib.grid\nbdlib.grid.package_hash = lambda: 'old'",
            "another version of bdlib",
        ),
    ],
)
def test_a_worker_that_cannot_take_part_is_named(notebooks, tmp_path, dask, capsys, package, said):
    (tmp_path / "false" / "bdlib").mkdir(parents=True)
    (tmp_path / "false" / "bdlib" / "__init__.py").write_text(package.format(real=str(batch.ROOT / "bdlib")))
    dask.worker(PYTHONPATH=str(tmp_path / "false"))
    dask.wait(1)
    assert runall.main(["--out", str(tmp_path / "out"), "--budget", "10", "--scheduler", dask.address]) == 2
    error = capsys.readouterr().err
    assert "workers that cannot take part" in error and said in error and "tcp://127.0.0.1:" in error
