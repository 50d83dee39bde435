"""What a worker does for one run or one model: a process of its own, watched until it ends.

Every process has its own kernel, IPython and Jupyter folders, working folder and log, and its share of the cores.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bdlib import child, grid
from bdlib.files import on_disk, place, write_atomic, write_json
from bdlib.places import python_path

Tell = Callable[[dict], None]  # is told which cell of how many a run is at
DRIVERS = ("nvidiactl", "dxg", "nvmap", "kfd")  # in /dev: NVIDIA's, that of WSL, of Jetson, AMD's
stopped: set[str] = set()  # the batches that were told to stop; a worker serves several


def told_places() -> dict[str, str]:
    """BDLIB_HOME and BDLIB_DATA where they are set, not relative to the folder that this process happens to be in."""
    names = ("BDLIB_HOME", "BDLIB_DATA")
    found = {name: place(os.environ[name]) for name in names if os.environ.get(name)}
    return {name: str(path.absolute() if on_disk(path) else path) for name, path in found.items()}


@dataclass(frozen=True)
class Job:
    """A notebook to execute or a model to make, in a form that travels to a worker on another host."""

    kind: str  # "notebook" or "model"
    name: str  # for people
    batch: str  # the call of runall.py that it belongs to
    version: str  # of the bdlib that planned it
    threads: int | None  # CPU threads; None = what the worker has
    timeout: float | None  # seconds
    setting: dict | None = None  # of a model
    parameters: dict | None = None  # of a notebook
    folder: str = ""  # where the log goes, and a notebook's results
    key: str = ""  # of a notebook: `grid.key`
    places: dict = field(default_factory=told_places)  # of store and datasets, where runall.py was told


@dataclass(frozen=True)
class Outcome:
    """How a job ended: well or not, its seconds, and what went wrong."""

    well: bool
    seconds: float = 0.0
    error: str = ""
    tries: int = 1
    log: str = ""  # where its log is, below the output folder; "" if it has none
    traceback: str = ""  # the end of a failed job's log


def notebook(run: grid.Run, source: str, batch: str, threads: int | None, timeout: float | None) -> Job:
    """The run of this source, whose key it has whatever becomes of the notebook's file meanwhile."""
    own = {"parameters": run.parameters, "folder": str(run.folder), "key": grid.key(source, run.parameters)}
    return Job("notebook", run.name, batch, grid.package_hash(), threads, timeout, **own)


def model(run: grid.Run, batch: str, threads: int | None, timeout: float | None) -> Job:
    """The backdoored model that the run works on."""
    p = run.parameters
    name = f"model {p['dataset']} {p['attack']} {run.words('seed')}"
    folder = run.folder.parents[1] / "models" / hashlib.sha256(repr(run.model).encode()).hexdigest()[:12]
    setting = run.values
    return Job("model", name, batch, grid.package_hash(), threads, timeout, setting=setting, folder=str(folder))


def do(job: Job, source: str | None, model: Outcome | None, tell: Tell) -> Outcome:
    """Carry the job out.  A process that died without blame of a cell is started once more; a Python error is final.

    source: the notebook without outputs, as JSON; model: how the making of the run's model ended.
    """
    if model is not None and not model.well:
        unshow(job)
        error = f"its model could not be made: {model.error}"
        return failed(job, Outcome(False, error=error, log=model.log, traceback=model.traceback))
    if job.version != grid.package_hash():
        return Outcome(False, 0.0, f"{where()} has another version of bdlib than runall.py")
    outcome, again = once(job, source, tell)
    if again:
        outcome, _ = once(job, source, tell)
        outcome = replace(outcome, tries=2)
    return outcome if outcome.well or job.batch in stopped else failed(job, outcome)


def unshow(job: Job) -> None:
    """Remove what an older try of the job's run left for people, unless the run is finished: this try has none of it."""
    folder = place(job.folder)
    with suppress(OSError):
        if not child.finished(folder, job.key):
            for name in child.SHOWN:
                (folder / name).unlink(missing_ok=True)


def failed(job: Job, outcome: Outcome) -> Outcome:
    """The outcome, noted in the job's folder; where even that cannot be written, said in the outcome."""
    note = {name: getattr(outcome, name) for name in ("seconds", "error", "traceback", "log")} | {"key": job.key}
    try:
        write_json(place(job.folder) / "failed.json", note)
    except OSError as error:
        return replace(outcome, error=f"{outcome.error} (and {error})")
    return outcome


def once(job: Job, source: str | None, tell: Tell) -> tuple[Outcome, bool]:
    """One try: its outcome, and whether another one makes sense."""
    start = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="bdlib-"))
    try:
        log = work / "log.txt"
        message = asdict(job) | {"source": source, "work": str(work), "parent": os.getpid()}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "bdlib.child"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(job, work),
            )
        with suppress(BrokenPipeError), process.stdin:  # it may be dead already, which `watch` sees
            process.stdin.write(json.dumps(message).encode())
        ended = watch(process, job, log, tell, start)
        text = plain(log.read_text(encoding="utf-8", errors="replace"))
        kept = keep(text, place(job.folder) / "log.txt")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.perf_counter() - start
    if process.returncode == 0 and not ended:
        return Outcome(True, seconds, log=kept), False
    again = not ended and (process.returncode == child.TRY_AGAIN or process.returncode < 0 or process.returncode > 128)
    error = ended or last_error(text, process.returncode)
    return Outcome(False, seconds, error, log=kept, traceback=text[-6000:]), again


def keep(text: str, log: Path) -> str:
    """Write the log; where it is, below the output folder.

    "" if it cannot be written: the job ended as it did all the same.
    """
    try:
        write_atomic(log, lambda file: file.write(text.encode()))
    except OSError:
        return ""
    return "/".join(log.parts[-3:])


def watch(process: subprocess.Popen, job: Job, log: Path, tell: Tell, start: float) -> str:
    """Wait for the process; why it was ended by us, or nothing."""
    told, why = None, ""
    while process.poll() is None:
        time.sleep(0.2)
        cells = cells_done(log)
        if cells != told:
            tell({"name": job.name, "worker": where(), "cell": cells[0], "cells": cells[1]})
            told = cells
        if job.batch in stopped:
            why = "stopped"
        elif job.timeout and time.perf_counter() - start > job.timeout:
            why = f"took longer than {job.timeout / 60:g} minutes"
        if why:
            end(process)
            break
    return why


def end(process: subprocess.Popen) -> None:
    """End the process and its kernel: politely, then for certain."""
    for sign, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def environment(job: Job, work: Path) -> dict[str, str]:
    """Ours, with this very bdlib first on the path, the worker's share of cores and GPUs, and the process's own folders."""
    threads = str(job.threads or os.environ.get("BDLIB_THREADS") or cores())
    own = (
        told_places() | job.places | {"IPYTHONDIR": str(work / "ipython"), "JUPYTER_RUNTIME_DIR": str(work / "jupyter")}
    )
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    return os.environ | {"PYTHONPATH": python_path()} | own | counts | gpu()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu() -> dict[str, str]:
    """For the n-th worker of an embedded cluster on a host with GPUs: the n-th of them, alone."""
    number, count = worker_name(), gpus()
    if not isinstance(number, int) or not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if visible != [""] else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]}


def gpus() -> int:
    """GPUs that torch can use here; it is asked, which takes seconds and 600 MB, only where a driver may be."""
    if sys.platform == "linux" and not any(Path(f"/dev/{name}").exists() for name in DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def where() -> str:
    """This worker, for people."""
    name = worker_name()
    return socket.gethostname() if name is None else f"worker {name} on {socket.gethostname()}"


def worker_name() -> int | str | None:
    """How Dask calls this worker: a number in an embedded cluster; None outside of one."""
    from distributed import get_worker

    try:
        return get_worker().name
    except ValueError:
        return None


def cells_done(log: Path) -> tuple[int, int]:
    """The last "7/24" of papermill's progress bar."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        found = re.findall(rb"Executing:.*?\| (\d+)/(\d+) ", file.read())
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def plain(log: str) -> str:
    """The log without colors, and without the states of a progress bar that later ones wrote over."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log).split("\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines)


def last_error(log: str, status: int) -> str:
    """The last line of a log that names an error, or else that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [f"the process ended with status {status}"])[-1]
