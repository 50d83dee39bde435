"""The grid behind runall.py: which notebook runs there are, what is checked before any starts, and how one is run.

One run = one notebook with one set of parameters, executed by papermill in a process of its own (papermill is not
thread-safe).  Scheduling lives in `execute` alone.
"""

import ast
import functools
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bdlib import data, experiment, profiles
from bdlib.files import write_atomic

# The axes of the grid, each a parameter of every notebook; any other parameter is set with --set.
AXES = ("dataset", "arch", "attack", "budget", "poison_rate", "target_label", "seed")


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters, and the folder that its results go to."""

    notebook: Path
    parameters: dict[str, object]
    folder: Path

    @property
    def name(self) -> str:
        p = self.parameters
        return f"{self.notebook.stem} {p['dataset']} {p['attack']} budget={p['budget']} seed={p['seed']}"

    @property
    def key(self) -> str:
        """Hash of the notebook's code, its parameters and bdlib's code: a finished run with this key need not run again."""
        cells = json.loads(self.notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        parts = {"cells": sources, "parameters": self.parameters, "bdlib": _package_hash()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def finished(self) -> bool:
        """Whether this very run ended well before."""
        try:
            done = json.loads((self.folder / "done.json").read_bytes())
        except (OSError, ValueError):
            return False
        return done.get("key") == self.key and (self.folder / "rows.csv").exists()


@functools.cache
def _package_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".csv"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def plan(
    notebooks: Iterable[Path], profile: str, axes: dict[str, list], extra: dict[str, object], out: Path
) -> list[Run]:
    """Every combination of the axes for every notebook; what is left open comes from the profile, then the notebook."""
    runs = []
    for notebook in notebooks:
        known = notebook_parameters(notebook)
        for dataset in axes.get("dataset") or [None]:
            base = known | {"profile": profile}
            if profile != known["profile"] or dataset is not None:
                base |= profiles.defaults(profile, dataset, notebook.stem)
            chosen = {name: values for name, values in axes.items() if values and name != "dataset"}
            for values in itertools.product(*chosen.values()):
                parameters = base | dict(zip(chosen, values, strict=True)) | extra
                runs.append(_run(notebook, parameters, out))
    return runs


def _run(notebook: Path, parameters: dict[str, object], out: Path) -> Run:
    shown = {name: value for name, value in parameters.items() if name != "out"}
    short = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:6]
    words = [parameters[name] for name in ("dataset", "attack", "budget", "seed")]
    label = re.sub(r"[^\w.-]+", "-", "_".join(str(word) for word in words))[:60]
    folder = out / notebook.stem / f"{label}_{short}"
    return Run(notebook, parameters | {"out": str(folder)}, folder)


@functools.cache
def notebook_parameters(notebook: Path) -> dict[str, object]:
    """Names and default values of the notebook's `parameters` cell.  Raises ValueError if it has none."""
    from papermill import inspect_notebook

    found = {name: ast.literal_eval(info["default"]) for name, info in inspect_notebook(str(notebook)).items()}
    if not found:
        raise ValueError(f"{notebook} has no cell tagged parameters")
    return found


def complaints(runs: list[Run]) -> list[str]:
    """Everything that is wrong with the parameters of these runs, each said once; empty if all may start."""
    found: dict[str, None] = {}
    for run in runs:
        try:
            check(run)
        except (ValueError, RuntimeError) as error:
            found[f"{run.notebook.stem}: {error}"] = None
    return list(found)


def check(run: Run) -> None:
    """Raises ValueError that says what is allowed if a parameter of the run does not exist or does not fit."""
    known = notebook_parameters(run.notebook)
    for name, value in run.parameters.items():
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}; it has {', '.join(known)}")
        number = isinstance(known[name], (int, float)) and not isinstance(known[name], bool)
        if name != "budget" and (isinstance(value, str) if number else type(value) is not type(known[name])):
            raise ValueError(f"parameter {name} must be like {known[name]!r}, got {value!r}")
    setting = experiment.Setting(
        notebook=run.notebook.stem, **{name: run.parameters[name] for name in ("profile", *AXES)}
    )
    if _on_disk(setting.dataset):
        train_split, _ = _splits(setting.profile, setting.dataset)
        setting.require_fits(train_split)


@functools.cache
def _splits(profile: str, dataset: str) -> tuple[data.Dataset, data.Dataset]:
    """The splits that a run of this profile uses, read once for all runs."""
    return experiment.load_data(profile, dataset)


def _on_disk(dataset: str) -> bool:
    """Whether the dataset can be looked at without a download; if not, the notebook itself checks the rest."""
    on_disk = (experiment.data_root() / f"{dataset}.npz").exists()
    return on_disk or dataset in data.EMBEDDED or dataset not in data.NAMES


def execute(
    run: Run, watch: Callable[[int, int], None] = lambda cell, cells: None, timeout: float | None = None
) -> tuple[bool, float]:
    """Run the notebook; whether it ended well, and the seconds it took.  `watch` is told the cell and the number of cells.

    Leaves executed.ipynb, log.txt and the notebook's own rows.csv in the run's folder, and done.json if it ended well.
    Ctrl-C ends the notebook's process too.  timeout: seconds.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    for stale in ("done.json", "rows.csv"):
        (run.folder / stale).unlink(missing_ok=True)
    log = run.folder / "log.txt"
    files = [str(run.notebook), str(run.folder / "executed.ipynb")]
    command = [sys.executable, "-m", "papermill", *files, "-y", json.dumps(run.parameters), "--progress-bar"]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    start = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, **streams, start_new_session=True, env=_environment())
        try:
            while process.poll() is None:
                time.sleep(0.2)
                watch(*_cells_done(log))
                if timeout and time.perf_counter() - start > timeout:
                    _end(process)
        except BaseException:
            _end(process)
            raise
    seconds = time.perf_counter() - start
    well = process.returncode == 0 and (run.folder / "rows.csv").exists()
    if well:
        done = {"key": run.key, "parameters": run.parameters, "seconds": round(seconds, 1)}
        write_atomic(run.folder / "done.json", lambda file: file.write(json.dumps(done, indent=1).encode()))
    return well, seconds


def _environment() -> dict[str, str]:
    """Ours, with this very bdlib first on the path of the notebook's kernel."""
    path = os.pathsep.join(filter(None, [str(experiment.project_root()), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def _end(process: subprocess.Popen) -> None:
    """End the notebook's process and its kernel: politely, then for certain."""
    for sign, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _cells_done(log: Path) -> tuple[int, int]:
    """The last "7/24" of papermill's progress bar."""
    found = re.findall(rb"Executing:.*?\| (\d+)/(\d+) ", log.read_bytes()[-4000:])
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def last_error(run: Run) -> str:
    """The last line of the run's log that says something."""
    try:
        lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines]
    errors = [line for line in plain if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or [line for line in plain if line] or ["empty log"])[-1]
