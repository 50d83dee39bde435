"""One job in a process of its own: `python -m bdlib.child`, with the job as JSON on its standard input.

A job is a notebook to execute, or a backdoored model to make for the notebooks that wait for it.  The process ends itself when the
one that started it dies, and its kernel with it: nothing goes on unseen after a kill.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from bdlib import grid, locks
from bdlib.files import on_disk, place, read_json, write_json

# The exit status that says: the kernel died or did not start, no cell is to blame, and another try may do.
TRY_AGAIN = 75
# What a try leaves for people: that of an older one must not be taken for that of this one.
SHOWN = ("executed.ipynb", "executed.html", "log.txt")


def main() -> int:
    job = json.loads(sys.stdin.read())
    parent = job["parent"]  # not os.getppid(): it may have died before this line
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to it
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        if job["kind"] == "model":
            require_planned_code(job)
            model(job["setting"])
            return 0
        return notebook(job)
    finally:
        if os.getppid() != parent:
            shutil.rmtree(job["work"], ignore_errors=True)  # the parent does it otherwise


def end_with(parent: int) -> None:
    """End this process when its parent is gone: politely, so that it frees its locks and ends its kernel, then for certain."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
    os._exit(1)


def require_planned_code(job: dict) -> None:
    """Raises RuntimeError if bdlib here, or what the notebook reads of figures/ here, is not that of the job's grid."""
    if job["version"] != grid.package_hash():
        raise RuntimeError("bdlib here is not the grid's: it was edited while the grid runs; start the grid again")
    if job["kind"] == "notebook" and job["key"] != grid.key(job["source"], job["parameters"]):
        raise RuntimeError("the stored rows that it reads in figures/ are not the grid's; start the grid again")


def model(values: dict) -> None:
    """Make the backdoored model, and what its attack needs, unless the store has them."""
    import torch

    from bdlib import experiment  # brings torch, which a notebook's own process has no use for

    setting = experiment.Setting(**values)
    train_split, _ = experiment.load_data(setting.profile, setting.dataset)
    split = experiment.training_part(setting, train_split)
    experiment.backdoored(setting, split, "cuda" if torch.cuda.is_available() else "cpu")


def finished(folder: Path, key: str) -> bool:
    """Whether the run with this key ended well in this folder."""
    return has_key(folder / "done.json", key) and (folder / "rows.csv").exists()


def has_key(note: Path, key: str) -> bool:
    """Whether the note is there, whole, and of the run with this key."""
    try:
        return read_json(note.read_bytes()).get("key") == key
    except OSError:
        return False


def notebook(job: dict) -> int:
    """Execute the notebook with its parameters unless another process just did; done.json is written last."""
    folder, work = place(job["folder"]), Path(job["work"])
    with locks.hold(folder / ".lock", lambda: print("another process runs this notebook: waiting for it")):
        if finished(folder, job["key"]):
            return 0
        stale = ["done.json", "failed.json", "rows.csv", *SHOWN]
        if not has_key(folder / "begun.json", job["key"]):
            stale.append("measured.csv")  # the rows so far of other code or parameters: nothing to go on from
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "begun.json", {"key": job["key"]})
        require_planned_code(job)
        # On an object store the notebook writes to the working folder, which is copied up when it ends.
        out = folder if on_disk(folder) else work / "out"
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        status = execute(job, work, out)
        if status == 0 and not (out / "rows.csv").exists():
            print("Error: the notebook ended without rows.csv")
            status = 1
        if out != folder:
            for path in (path for path in out.rglob("*") if path.is_file()):
                (folder / path.relative_to(out).as_posix()).write_bytes(path.read_bytes())
        if status == 0:
            seconds = round(time.perf_counter() - start, 1)
            done = {"key": job["key"], "parameters": job["parameters"], "seconds": seconds}
            write_json(folder / "done.json", done)
        return status


def execute(job: dict, work: Path, out: Path) -> int:
    """Run papermill; the exit status.  A cell's error is in the notebook and printed."""
    # nbformat's jsonschema imports it where it is found, which takes two seconds: grammars of web addresses that no notebook needs.
    sys.modules["rfc3987_syntax"] = None
    import papermill
    from nbclient.exceptions import DeadKernelError

    source = work / "source.ipynb"
    source.write_text(job["source"], encoding="utf-8")
    parameters = job["parameters"] | {"out": str(out)}
    try:
        papermill.execute_notebook(str(source), str(out / "executed.ipynb"), parameters, cwd=str(work))
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        # "Kernel didn't respond in 60 seconds", "Kernel died before replying to kernel_info"
        no_start = isinstance(error, RuntimeError) and str(error).startswith("Kernel d")
        return TRY_AGAIN if isinstance(error, DeadKernelError) or no_start else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
