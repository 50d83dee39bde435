"""What is checked for every run of a grid before the first starts.

Whether values fit needs torch, whose import takes longer and more memory than the plan of ten thousand runs.  So `fits` is asked in a
process of its own, and what passed once is noted in BDLIB_HOME/checked.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress

from bdlib import grid
from bdlib.files import write_json
from bdlib.grid import Run
from bdlib.places import data_root, home, python_path


def complaints(runs: list[Run]) -> list[str]:
    """Everything that is wrong with the parameters of these runs, each said once; empty if all may start."""
    found: dict[str, None] = {}
    named = []
    for run in _different(runs):
        if problem := _misnamed(run):
            found[f"{run.notebook.stem}: {problem}"] = None
        else:
            named.append(run)
    for run, problem in zip(named, _misfits([_values(run) for run in named]), strict=True):
        if problem:
            found[f"{run.notebook.stem}: {problem}"] = None
    return list(found)


def _different(runs: list[Run]) -> list[Run]:
    """One run of each kind: of ten thousand runs, which differ in their seed above all, a few are different."""
    kinds = {}
    for run in runs:
        rest = (repr(value) for name, value in run.parameters.items() if name not in ("seed", "out"))
        kinds.setdefault((run.notebook, repr(_values(run)["seed"]), *rest), run)
    return list(kinds.values())


def _values(run: Run) -> dict[str, object]:
    """What is checked of the run: its values, with the seed 0 for any that is allowed, as all of them fit alike."""
    seed = run.parameters["seed"]
    return run.values | {"seed": 0 if type(seed) is int and seed >= 0 else seed}


def _misnamed(run: Run) -> str | None:
    """What is wrong with the names and kinds of the run's parameters."""
    known = grid.notebook_parameters(run.notebook)
    for name, value in run.parameters.items():
        if name not in known:
            return f"unknown parameter {name!r}; it has {', '.join(known)}"
        number = isinstance(known[name], (int, float)) and not isinstance(known[name], bool)
        if name != "budget" and (isinstance(value, str) if number else type(value) is not type(known[name])):
            return f"parameter {name} must be like {known[name]!r}, got {value!r}"
    return None


def _misfits(settings: list[dict]) -> list[str | None]:
    """What is wrong with the values of each setting, or None (`fits`).  What passed once, with this code and data, is not asked again.

    Raises ValueError if it cannot be told.
    """
    if torch_is_here():
        from bdlib import fits

        return fits.complaints(settings)
    note = home() / "checked" / f"{_fingerprint(settings)}.json"
    with suppress(OSError):
        if note.exists():
            return [None] * len(settings)
    asked = subprocess.run(
        [sys.executable, "-m", "bdlib.fits"], check=False, input=json.dumps(settings), stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    if asked.returncode:
        raise ValueError(f"the values could not be checked: python -m bdlib.fits ended with {asked.returncode}")
    found = json.loads(asked.stdout)
    if not any(found) and not any(_of_the_user(values) for values in settings):
        with suppress(OSError):
            write_json(note, {"settings": len(settings)})
    return found


def torch_is_here() -> bool:
    """Whether this process has imported torch, so that checking here costs nothing more."""
    return "torch" in sys.modules


def _fingerprint(settings: list[dict]) -> str:
    """Hash of all that decides whether these settings pass: their values, bdlib's code, and which datasets are there."""
    files = sorted({str(data_root() / f"{values['dataset']}.npz") for values in settings})
    there = [(file, os.stat(file).st_mtime_ns if os.path.exists(file) else None) for file in files]
    return hashlib.sha256(json.dumps([settings, grid.package_hash(), there], sort_keys=True).encode()).hexdigest()[:24]


def _of_the_user(values: dict) -> bool:
    """Whether files of the user's own take part, which may change unseen."""
    return any(str(values[name]).startswith(kind) for name, kind in (("dataset", "folder:"), ("attack", "blended:")))
