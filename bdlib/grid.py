"""The grid behind runall.py: which notebook runs there are.

One run = one notebook with one set of parameters.  `checks` says whether all may start, `runs` which are finished, `job` executes one,
`schedule` hands them out.
"""

import ast
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bdlib import profiles
from bdlib.files import file_name

# The axes of the grid, each a parameter of every notebook; any other parameter is set with --set.
AXES = ("dataset", "arch", "attack", "budget", "poison_rate", "target_label", "seed")
# What decides which backdoored model a run works on.
MODEL = ("profile", "dataset", "arch", "attack", "poison_rate", "target_label", "seed")


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters, and the folder, on a disk or an object store, that its results go to."""

    notebook: Path
    parameters: dict[str, object]
    folder: Path

    @property
    def name(self) -> str:
        p = self.parameters
        return f"{self.notebook.stem} {p['dataset']} {p['attack']} budget={p['budget']} seed={p['seed']}"

    @property
    def place(self) -> str:
        """The run's folder below the output folder: NOTEBOOK/FOLDER."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def key(self) -> str:
        """Hash of the notebook's code, its parameters and bdlib's code: a finished run with this key need not run again."""
        parameters = {name: value for name, value in self.parameters.items() if name != "out"}
        parts = {"cells": source(self.notebook)[1], "parameters": parameters, "bdlib": package_hash()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def model(self) -> tuple:
        """What decides the backdoored model: runs with the same values share one."""
        images = self.parameters["budget"] if self.notebook.stem in profiles.BUDGET_IS_TRAINING_SET else 0
        return (*(self.parameters[name] for name in MODEL), images)

    @property
    def values(self) -> dict[str, object]:
        """What makes an `experiment.Setting` of the run."""
        return {"notebook": self.notebook.stem} | {name: self.parameters[name] for name in ("profile", *AXES)}


def source(notebook: Path) -> tuple[str, str]:
    """The notebook without outputs and graded exercises, as JSON text, and a hash of its code cells.

    A batch is after the paper's numbers: exercises would cost each of its runs a minute, and their tests hold for the defaults.
    """
    return _source(notebook, notebook.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _source(notebook: Path, _changed: int) -> tuple[str, str]:
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    whole["cells"] = [cell for cell in whole["cells"] if "nbgrader" not in cell["metadata"]]
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    code = ["".join(cell["source"]) for cell in whole["cells"] if cell["cell_type"] == "code"]
    return json.dumps(whole), hashlib.sha256(json.dumps(code).encode()).hexdigest()


@functools.cache
def package_hash() -> str:
    """Hash of bdlib's own code and tables."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".csv"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def plan(
    notebooks: Iterable[Path], profile: str, axes: dict[str, list], extra: dict[str, object], out: Path
) -> list[Run]:
    """Every combination of the axes for every notebook; what is left open comes from the profile, then the notebook.

    Raises ValueError if a parameter is given two values for the same run.
    """
    twice = [f"{name} {value!r}" for name, values in axes.items() if values for value in repeated(values)]
    if owned := [name for name in extra if name in (*AXES, "profile", "out")]:
        raise ValueError(f"--set is for parameters that have no option of their own, got {', '.join(owned)}")
    if twice:
        raise ValueError(f"given twice for the same run: {', '.join(twice)}")
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


def repeated(values: list) -> list:
    """The values that are there more than once, each once."""
    return sorted({value for value in values if values.count(value) > 1}, key=str)


def _run(notebook: Path, parameters: dict[str, object], out: Path) -> Run:
    shown = {name: value for name, value in parameters.items() if name != "out"}
    short = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:6]
    words = [parameters[name] for name in ("dataset", "attack", "budget", "seed")]
    label = file_name("_".join(str(word) for word in words))[:60]
    folder = out / notebook.stem / f"{label}_{short}"
    whole = {name: _absolute(value) for name, value in parameters.items()} | {"out": str(folder)}
    return Run(notebook, whole, folder)


def _absolute(value: object) -> object:
    """A `folder:PATH` or `blended:FILE` with its path absolute, as every run has a working folder of its own."""
    kind, colon, path = value.partition(":") if isinstance(value, str) else ("", "", "")
    return f"{kind}:{Path(path).expanduser().absolute()}" if colon and kind in ("folder", "blended") else value


def shard(runs: list[Run], part: int, parts: int) -> list[Run]:
    """The runs of every `parts`-th model, from the `part`-th on (1 is the first): no model is trained in two shards.

    Raises ValueError if nothing is left for this part.
    """
    groups = {model: number for number, model in enumerate(dict.fromkeys(run.model for run in runs))}
    if part > len(groups):
        raise ValueError(f"shard {part}/{parts} holds no run: the grid has {len(groups)} models")
    return [run for run in runs if groups[run.model] % parts == part - 1]


@functools.cache
def notebook_parameters(notebook: Path) -> dict[str, object]:
    """Names and default values of the notebook's `parameters` cell.  Raises ValueError if it has none."""
    # papermill.inspect_notebook says the same, but its import alone takes longer than everything else before the first run
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
            return {line.targets[0].id: ast.literal_eval(line.value) for line in lines if isinstance(line, ast.Assign)}
    raise ValueError(f"{notebook} has no cell tagged parameters")
