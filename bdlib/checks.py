"""What is checked for every run of a grid before the first starts.

Most values plainly fit (`glance`).  Whether others do needs torch, whose import takes longer and more memory than the plan of ten
thousand runs: `fits` is asked in a process of its own, and says what is wrong.
"""

import json
import os
import subprocess
import sys

from bdlib import glance, grid
from bdlib.grid import Run
from bdlib.places import python_path


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
        allowed = (int, float) if isinstance(known[name], float) else (type(known[name]),)
        if name != "budget" and type(value) not in allowed:
            return f"parameter {name} must be like {known[name]!r}, got {value!r}"
    return _unknown_words(run, known)


def _unknown_words(run: Run, usual: dict[str, object]) -> str | None:
    """What is wrong with the methods and extras that 06 is given; torch is loaded only where some are."""
    given = {
        name: run.parameters[name] for name in ("methods", "extras") if run.parameters.get(name) != usual.get(name)
    }
    if run.notebook.stem != "06_all_five" or not given:
        return None
    from bdlib import compare

    try:
        compare.chosen(given.get("methods", "all"))
        compare.chosen_extras(given.get("extras", ""))
    except ValueError as error:
        return str(error)
    return None


def _misfits(settings: list[dict]) -> list[str | None]:
    """What is wrong with the values of each setting, or None.  Raises ValueError if it cannot be told."""
    plain = [glance.fits(values) for values in settings]
    doubtful = iter(_looked_at([values for values, fits in zip(settings, plain, strict=True) if not fits]))
    return [None if fits else next(doubtful) for fits in plain]


def _looked_at(settings: list[dict]) -> list[str | None]:
    """What `fits` says of these settings, here or in a process of its own."""
    if not settings:
        return []
    if torch_is_here():
        from bdlib import fits

        return fits.complaints(settings)
    asked = subprocess.run(
        [sys.executable, "-m", "bdlib.fits"], check=False, input=json.dumps(settings), stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    if asked.returncode:
        raise ValueError(f"the values could not be checked: python -m bdlib.fits ended with {asked.returncode}")
    return json.loads(asked.stdout)


def torch_is_here() -> bool:
    """Whether this process has imported torch, so that checking here costs nothing more."""
    return "torch" in sys.modules
