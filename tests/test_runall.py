"""runall.py: bad arguments stop it before anything starts; runs are isolated, resumed, and their failures named."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
from rich.console import Console

import runall
from bdlib import files, grid, results, schedule
from tests import batch
from tests.test_results import row

WRITE_ROWS = f"""
from pathlib import Path
import csv
from bdlib.budget import resolve
row = {row()!r} | dict(notebook="00_backdoors", budget=resolve(budget, 5000, 10, dataset), seed=seed)
with open(Path(out) / "rows.csv", "w") as file:
    writer = csv.DictWriter(file, row)
    writer.writeheader()
    writer.writerow(row)
"""
TROUBLE = """
import os, time
if mood == "angry":
    raise RuntimeError("the moon is wrong")
if mood == "slow":
    time.sleep(60)
if mood == "fatal":
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with one light notebook under a known name."""
    folder = tmp_path / "notebooks"
    batch.write_notebook(folder, "00_backdoors", TROUBLE, WRITE_ROWS)
    monkeypatch.setattr(runall, "NOTEBOOKS", folder)
    return folder


@pytest.fixture
def call(notebooks, tmp_path):
    """Call runall.py with these arguments; the exit code."""
    return lambda *arguments: runall.main([*arguments, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "07_none"], "--only must name notebooks out of 00_backdoors, got 07_none"),
        (
            ["--dataset", "cifar11"],
            "dataset must be one of signs, digits, cifar10, gtsrb, cifar100, svhn, tiny_imagenet, imagenette, mnist, "
            "fashion_mnist or folder:PATH, got 'cifar11'",
        ),
        (["--dataset", "folder:/nowhere"], "needs an existing folder, got '/nowhere'"),
        (["--attack", "blend"], "attack must be one of badnets"),
        (["--arch", "resnet19"], "arch must be one of preact_resnet18"),
        (["--profile", "fast"], "profile must be one of quick, paper, paper_fast, got 'fast'"),
        (["--budget", "0"], "budget must be between 10 (one image a class) and 5000"),
        (["--budget", "-3"], "got -3"),
        (["--budget", "5001"], "got 5001 = 5001 images"),
        (["--budget", "5%%"], "got '5%%'"),
        (["--budget", "0.1%"], "got '0.1%' = 5 images"),
        (["--poison-rate", "0"], "poison_rate must be in (0, 1], got 0.0"),
        (["--poison-rate", "1.5"], "poison_rate must be in (0, 1], got 1.5"),
        (["--target-label", "10"], "target_label must be between 0 and 9, got 10"),
        (["--seed", "-1"], "seed must be a whole number from 0 on, got -1"),
        (["--set", "budgett=3"], "unknown parameter 'budgett'; it has profile, dataset"),
        (["--set", "mood=3"], "parameter mood must be like 'calm', got 3"),
        (["--set", "mood"], "--set takes NAME=VALUE, got 'mood'"),
        (["--seed", "1", "0", "1"], "given twice for the same run: seed 1"),
        (["--only", "00_backdoors", "00_backdoors"], "--only names notebooks twice: 00_backdoors"),
        (["--set", "seed=2"], "--set is for parameters that have no option of their own, got seed"),
        (["--set", "out=here"], "--set is for parameters that have no option of their own, got out"),
        (["--set", "mood=calm", "mood=slow"], "given twice for the same run: --set mood"),
        (["--shard", "2/2"], "shard 2/2 holds no run: the grid has 1 models"),
    ],
)
def test_bad_arguments_stop_it_before_anything_starts(call, tmp_path, capsys, arguments, message):
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_complaints_come_at_once(call, capsys):
    assert call("--attack", "blend", "badnets", "--seed", "0", "-1", "--budget", "7") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--budgett", "3"],
        ["--seed", "one"],
        ["--poison-rate", "a lot"],
        ["--workers", "0"],
        ["--shard", "3/2"],
        ["--shard", "1"],
        ["--status", "--dry-run"],
        ["--force", "--only-failed"],
        ["--timeout", "-5"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
    ],
)
def test_what_argparse_refuses_exits_with_2(call, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2


def test_every_combination_once_and_the_profiles_values_where_none_is_given(notebooks, tmp_path):
    path = [notebooks / "00_backdoors.ipynb"]
    runs = grid.plan(path, "quick", {"budget": [10, "5%"], "seed": [0, 1, 2], "dataset": None}, {}, tmp_path)
    assert len({run.folder for run in runs}) == 6 and {run.parameters["arch"] for run in runs} == {"preact_resnet18:8"}
    paper = grid.plan(path, "paper", {"dataset": ["gtsrb"], "arch": None}, {}, tmp_path)[0].parameters
    assert (paper["arch"], paper["dataset"], paper["budget"], paper["profile"]) == (
        "preact_resnet18",
        "gtsrb",
        500,
        "paper",
    )
    assert grid.plan(path, "paper", {"arch": ["wrn_16_1"]}, {}, tmp_path)[0].parameters["arch"] == "wrn_16_1"


def test_dry_run_starts_nothing(call, tmp_path, capsys):
    assert call("--dry-run", "--seed", "0", "1") == 0
    assert "2 runs to do" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_run_is_executed_once_until_something_changes(call, notebooks, tmp_path, capsys):
    executed = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("executed.ipynb")}
    assert call() == 0
    first = executed()
    assert sorted(path.name for path in (tmp_path / "out" / "figures").iterdir()) == [
        "signs_blended_a.png",
        "signs_blended_a.svg",
    ]
    assert len(first) == 1 and results.load(tmp_path / "out" / "results.csv")["budget"].tolist() == [200]
    assert call() == 0 and executed() == first
    assert "1 finished before" in capsys.readouterr().out
    next((tmp_path / "out").rglob("rows.csv")).unlink()
    assert call() == 0 and executed() != first, "a run without its rows is not finished"
    second = executed()
    assert call("--force") == 0 and executed() != second
    third = executed()
    source = (notebooks / "00_backdoors.ipynb").read_text().replace("time.sleep(60)", "time.sleep(61)")
    (notebooks / "00_backdoors.ipynb").write_text(source)
    assert call() == 0 and executed() != third, "a changed notebook runs again"


def test_a_failed_run_is_named_and_the_others_go_on(call, tmp_path, capsys):
    assert call("--set", "mood=angry") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "RuntimeError: the moon is wrong" in shown and "1 failed" in shown
    kept = next((tmp_path / "out").rglob("executed.ipynb"))
    assert any(
        output["output_type"] == "error"
        for cell in json.loads(kept.read_text())["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    )
    assert not list((tmp_path / "out").rglob("done.json")) and not (tmp_path / "out" / "results.csv").exists()


def test_rows_so_far_are_gone_on_from_by_the_same_run_alone(call, notebooks, tmp_path):
    assert call("--set", "mood=angry") == 1
    so_far = next((tmp_path / "out").rglob("failed.json")).with_name("measured.csv")
    so_far.write_text("half of the rows")
    assert call("--set", "mood=angry") == 1 and so_far.exists()
    notebook = notebooks / "00_backdoors.ipynb"
    notebook.write_text(notebook.read_text().replace("the moon is wrong", "the sun is wrong"))
    assert call("--set", "mood=angry") == 1 and not so_far.exists(), "another code, other rows"
    so_far.write_text("half of the rows")
    assert call("--set", "mood=angry", "--force") == 1 and not so_far.exists()


def test_it_stops_at_the_first_failure_if_told(call, capsys):
    assert call("--set", "mood=angry", "--seed", "0", "1", "2", "--workers", "1", "--no-keep-going") == 1
    assert "3 runs: 0 done now, 0 finished before, 1 failed, 2 not started" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_written_is_one_clear_line(notebooks, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert runall.main(["--out", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert "Not a directory" in error and "the same command goes on" in error and len(error.splitlines()) == 1


def test_a_dead_kernel_and_a_timeout_are_failures(call, tmp_path):
    assert call("--set", "mood=fatal") == 1
    start = time.monotonic()
    assert call("--set", "mood=slow", "--timeout", "0.1") == 1
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ctrl_c_and_kill_lose_only_what_was_in_flight(call, notebooks, tmp_path, sign, code):
    assert call("--seed", "0") == 0
    done = next((tmp_path / "out").rglob("done.json"))
    before = done.stat().st_mtime_ns
    process = batch.start(notebooks, "--seed", "0", "1", "--set", "mood=slow", "--out", str(tmp_path / "out"))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").rglob(".lock"))[1:] and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    os.kill(process.pid, sign)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert done.stat().st_mtime_ns == before and len(list((tmp_path / "out").rglob("done.json"))) == 1
    assert not list((tmp_path / "out").rglob("failed.json")), "what was stopped has not failed"
    assert call("--seed", "0", "1") == 0
    assert len(list((tmp_path / "out").rglob("done.json"))) == 2 and done.stat().st_mtime_ns == before


def test_help_teaches_by_examples(capsys):
    with pytest.raises(SystemExit):
        runall.main(["--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown and "--dry-run" in shown and '("5%")' in shown


def test_force_unmarks_nothing_before_there_is_somebody_to_do_it(call, tmp_path, capsys):
    assert call() == 0
    assert call("--force", "--scheduler", "tcp://127.0.0.1:9") == 2
    assert "no Dask scheduler answers" in capsys.readouterr().err and list((tmp_path / "out").rglob("done.json"))


def test_one_setting_in_two_words_gives_its_rows_once(call, tmp_path):
    assert call("--budget", "20", "2/class") == 0
    assert len(list((tmp_path / "out").rglob("done.json"))) == 2
    assert results.load(tmp_path / "out" / "results.csv")["seed"].tolist() == [0]


@pytest.mark.parametrize("text", ["0", "many", "-2"])
def test_a_wrong_number_of_threads_is_named(call, monkeypatch, capsys, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert call() == 2 and f"OMP_NUM_THREADS must be a whole number from 1 on, got '{text}'" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert schedule.told_threads() == 4


def test_what_is_no_number_or_truth_is_a_text():
    pairs = ["a=1", "b=.5", "c=True", "d={1}", "e=None", "f=[1, 2]", "g=awm,rnp", "h='x'", "i="]
    values = {"a": 1, "b": 0.5, "c": True, "d": "{1}", "e": "None", "f": "[1, 2]", "g": "awm,rnp", "h": "'x'", "i": ""}
    assert runall.extra_parameters(pairs) == values


def test_an_object_store_that_does_not_answer_is_one_clear_line(notebooks, monkeypatch, capsys):
    class Broken:
        def __str__(self):
            return "s3://bucket/out"

        def exists(self):
            raise RuntimeError("Could not connect")

    monkeypatch.setattr(files, "place", lambda where: Broken())
    assert runall.main(["--out", "s3://bucket/out", "--status"]) == 2
    assert capsys.readouterr().err == "runall.py: cannot reach s3://bucket/out: Could not connect\n"


def test_runs_that_differ_have_folders_that_differ_and_tell_what_they_are(notebooks, tmp_path, monkeypatch):
    def folder(dataset):
        (run,) = grid.plan([notebooks / "00_backdoors.ipynb"], "quick", {"dataset": [dataset]}, {}, tmp_path / "out")
        return run.folder.name

    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.append(folder("folder:cats"))
        assert folder("folder:cats") == folder(f"folder:{tmp_path / name / 'cats'}")
    assert found[0] != found[1]
    long = folder("folder:/srv/" + 30 * "deep/" + "cats")
    assert re.fullmatch(r"deep-deep-[\w-]*cats_blended_500_0_[0-9a-f]{12}", long), long


def test_names_and_table_tell_apart_what_varies(notebooks, tmp_path, capsys, monkeypatch):
    axes = {"arch": ["resnet18", "vgg16"], "poison_rate": [0.05, 0.1], "seed": [0]}
    runs = grid.plan([notebooks / "00_backdoors.ipynb"], "quick", axes, {}, tmp_path)
    assert runs[1].name == "00_backdoors signs blended budget=200 seed=0 arch=resnet18 poison_rate=0.1"
    rows = [row() | {"arch": run.parameters["arch"], "poison_rate": run.parameters["poison_rate"]} for run in runs]
    table = runall.means_table(results.table(rows))
    heads = [column.header for column in table.columns]
    assert heads[2:4] == ["arch", "poison rate"] and list(table.columns[3].cells) == ["0.05", "0.1"] * 2


@pytest.mark.parametrize("path", ["folder:/srv/[old]/cats", "folder:/srv/a[/old]/cats"])
def test_a_path_is_no_markup(path):
    shown = Console(width=300, file=io.StringIO())
    shown.print(runall.means_table(results.table([row() | {"dataset": path}])))
    assert path in shown.file.getvalue()


def test_the_log_of_a_run_without_its_model_is_the_models(call, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert call("--budget", "20", "200") == 1
    logs = re.findall(r"log: (.*)", capsys.readouterr().out)
    assert len(logs) == 2 and all("/models/" in log and files.place(log).exists() for log in logs)


def test_rows_that_a_notebook_reads_are_part_of_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "project_root", lambda: tmp_path)
    batch.write_notebook(tmp_path, "00_backdoors", "read('some_rows', \"ledger.csv\")")
    (tmp_path / "figures").mkdir()
    (run,) = grid.plan([tmp_path / "00_backdoors.ipynb"], "quick", {}, {}, tmp_path / "out")
    keys = [run.key]
    for name in ("some_rows", "ledger", "other_rows"):
        (tmp_path / "figures" / f"{name}.csv").write_text("acc,seconds\n.9,1\n")
        keys.append(run.key)
    assert len(set(keys)) == 3 and keys[2] == keys[3]
    (tmp_path / "figures" / "some_rows.csv").write_text("acc,seconds\n.9,22\n")
    assert run.key == keys[3]  # else rows measured again would make all that reads them stale
    (tmp_path / "figures" / "some_rows.csv").write_text("acc,seconds\n.8,22\n")
    assert run.key not in keys


def test_a_path_may_begin_at_home_and_a_file_address_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (run,) = grid.plan([runall.all_notebooks()["02_awm"]], "quick", {"dataset": ["folder:~/cats@32"]}, {}, tmp_path)
    assert run.parameters["dataset"] == f"folder:{tmp_path}/cats@32"
    assert files.place(f"file://{tmp_path}/a b") == tmp_path / "a b" and files.on_disk(files.place("file:///x"))
