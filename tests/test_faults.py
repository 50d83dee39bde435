"""Faults, each made for real: what is finished stays, nothing half-written is used, and the table comes out the same."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import batch

# A cell that kills its own kernel once, where the file named by MARK is not there yet.
ONCE = """
import os, signal, pathlib
mark = pathlib.Path(os.environ["MARK"])
def once():
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
"""
KILL_KERNEL = ONCE + "if mood == 'doomed': once()\n"
KILL_WHILE_WRITING = (
    ONCE
    + """
from bdlib import files
replace = os.replace
def kill(source, target):
    if mood == "doomed" and str(target).endswith(".safetensors"):
        once()
    replace(source, target)
files.os.replace = kill
"""
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A grid of two runs that share a model: its notebooks, its arguments, and the table that it ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    batch.write_notebook(folder / "notebooks", "02_awm", KILL_KERNEL + KILL_WHILE_WRITING, batch.TRAIN)
    dataset = batch.write_images(folder / "images")
    arguments = ["--dataset", dataset, "--attack", "badnets", "--budget", "4", "8", "--workers", "2"]
    shutil.rmtree(folder / "home", ignore_errors=True)
    process = run(folder, folder, arguments)
    assert process.returncode == 0, process.stdout
    assert batch.trainings(folder / "out") == 1
    return folder, arguments, batch.table(folder / "out" / "results.csv")


def run(folder: Path, where: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """The whole grid, with store and output below `where`, to its end."""
    process = begin(folder, where, arguments, **environment)
    output, _ = process.communicate(timeout=180)
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def begin(folder: Path, where: Path, arguments: list[str], **environment: str) -> subprocess.Popen:
    own = {"BDLIB_HOME": str(where / "home"), "MARK": str(where / "mark"), "OMP_NUM_THREADS": "1"}
    return batch.start(folder / "notebooks", *arguments, "--out", str(where / "out"), **(own | environment))


def until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def children_of(text: str) -> list[int]:
    """Processes whose command or environment holds the text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_runall_killed_leaves_no_process_and_the_next_call_ends_the_same(undisturbed, tmp_path):
    folder, arguments, expected = undisturbed
    process = begin(folder, tmp_path, arguments)
    until(lambda: list((tmp_path / "home" / "store").glob("*.lock")))  # a model is being trained
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    until(lambda: not children_of(str(tmp_path / "home")), 20)
    assert not list((tmp_path / "out").glob("*/*/done.json"))
    again = run(folder, tmp_path, arguments)
    assert again.returncode == 0, again.stdout
    assert batch.table(tmp_path / "out" / "results.csv").equals(expected)


@pytest.mark.parametrize("cell", ["kernel", "training while it writes"])
def test_a_killed_kernel_is_tried_once_more(undisturbed, tmp_path, cell):
    _, arguments, expected = undisturbed
    batch.write_notebook(
        tmp_path / "notebooks", "02_awm", KILL_KERNEL if cell == "kernel" else KILL_WHILE_WRITING, batch.TRAIN
    )
    # one run alone trains its model itself, so that the kill hits the training
    single = [*arguments[:4], "--budget", "4", "--workers", "2", "--set", "mood=doomed"]
    ended = run(tmp_path, tmp_path, single)
    assert ended.returncode == 0 and "(second try)" in ended.stdout, ended.stdout
    assert (tmp_path / "mark").exists()
    found = batch.table(tmp_path / "out" / "results.csv")
    assert found.equals(expected[expected["budget"] == 4].reset_index(drop=True))
    partial = [path.name for path in (tmp_path / "home" / "store").iterdir() if path.suffix == ".tmp"]
    assert len(partial) == (cell != "kernel"), "the killed write leaves its part, which nobody reads"


def test_a_python_error_is_not_tried_again(undisturbed, tmp_path):
    _, arguments, _ = undisturbed
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\nraise RuntimeError('the moon is wrong')"
    batch.write_notebook(tmp_path / "notebooks", "02_awm", count)
    ended = run(tmp_path, tmp_path, [*arguments[:4], "--budget", "4"])
    assert ended.returncode == 1 and "the moon is wrong" in ended.stdout and "second try" not in ended.stdout
    assert (tmp_path / "count").read_text() == "x"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 failed" in page and "RuntimeError: the moon is wrong" in page and "Traceback" in page


def test_two_at_once_on_one_store_and_one_output_do_everything_once(undisturbed, tmp_path):
    folder, arguments, expected = undisturbed
    both = [begin(folder, tmp_path, arguments) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert batch.trainings(tmp_path / "out") <= 1  # the second one's log lies over the first one's
    assert len(list((tmp_path / "home" / "store").glob("*.safetensors"))) == 1
    assert batch.table(tmp_path / "out" / "results.csv").equals(expected)
    # A half-written done.json afterwards: that run alone is made again.
    next((tmp_path / "out").glob("*/*/done.json")).write_text("{")
    ended = run(folder, tmp_path, arguments)
    assert ended.returncode == 0 and "1 done now, 1 finished before" in ended.stdout, ended.stdout
    assert batch.table(tmp_path / "out" / "results.csv").equals(expected)


def test_a_full_disk_is_named_and_a_call_with_room_goes_on(undisturbed, tmp_path):
    folder, arguments, expected = undisturbed
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        ended = run(folder, tmp_path, arguments, BDLIB_HOME=str(small))
        assert ended.returncode == 1 and "no free disk space for" in ended.stdout, ended.stdout
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = run(folder, tmp_path, arguments, BDLIB_HOME=str(small))
        assert again.returncode == 0, again.stdout
        assert batch.table(tmp_path / "out" / "results.csv").equals(expected)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_store_that_cannot_be_written_is_named_before_anything_starts(undisturbed, tmp_path):
    folder, arguments, _ = undisturbed
    (tmp_path / "file").write_text("in the way")
    ended = run(folder, tmp_path, arguments, BDLIB_HOME=str(tmp_path / "file"))
    assert ended.returncode == 2 and "the store of models cannot be written" in ended.stdout
    assert not (tmp_path / "out").exists()
