"""The grid behind runall.py: which notebook runs there are.

One run = one notebook with one set of parameters.  `checks` says whether all may start, `runs` which are finished, `job` executes one,
`schedule` hands them out.
"""

import ast
import csv
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bdlib import profiles
from bdlib.files import file_name
from bdlib.places import project_root

# The axes of the grid, each a parameter of every notebook; any other parameter is set with --set.
AXES = ("dataset", "arch", "attack", "budget", "poison_rate", "target_label", "seed")
VARIED = ("arch", "poison_rate", "target_label")  # shown of a run where the grid has several
COSTS = ("seconds", "peak_memory_mb")  # columns of rows that differ from one time to the next
# What decides which backdoored model a run works on.
MODEL = ("profile", "dataset", "arch", "attack", "poison_rate", "target_label", "seed")


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters, and the folder, on a disk or an object store, that its results go to."""

    notebook: Path
    parameters: dict[str, object]
    folder: Path
    varied: tuple[str, ...] = ()  # those of VARIED with several values in the grid

    @property
    def name(self) -> str:
        p = self.parameters
        return f"{self.notebook.stem} {p['dataset']} {p['attack']} {self.words('budget', 'seed')}"

    def words(self, *names: str) -> str:
        """These parameters and the varied ones, for people."""
        return " ".join(f"{name}={self.parameters[name]}" for name in (*names, *self.varied))

    @property
    def place(self) -> str:
        """The run's folder below the output folder: NOTEBOOK/FOLDER."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def key(self) -> str:
        """`key` of the notebook as it is now: a finished run with this key need not run again."""
        return key(source(self.notebook), self.parameters)

    @property
    def model(self) -> tuple:
        """What decides the backdoored model: runs with the same values share one."""
        images = self.parameters["budget"] if self.notebook.stem in profiles.BUDGET_IS_TRAINING_SET else 0
        return (*(self.parameters[name] for name in MODEL), images)

    @property
    def values(self) -> dict[str, object]:
        """What makes an `experiment.Setting` of the run."""
        return {"notebook": self.notebook.stem} | {name: self.parameters[name] for name in ("profile", *AXES)}


def key(source: str, parameters: dict[str, object]) -> str:
    """Hash of what decides a run's rows: the notebook's code, its parameters, the stored rows that it names, bdlib's code."""
    cells, words = _code(source)
    shown = {name: value for name, value in parameters.items() if name != "out"}
    parts = {"cells": cells, "parameters": shown, "stored": _stored(words), "bdlib": package_hash()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source(notebook: Path) -> str:
    """The notebook without outputs and graded exercises, as JSON text.

    A batch is after the paper's numbers: exercises would cost each of its runs a minute, and their tests hold for the defaults.
    """
    return _source(notebook, notebook.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _source(notebook: Path, _changed: int) -> str:
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    whole["cells"] = [cell for cell in whole["cells"] if "nbgrader" not in cell["metadata"]]
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(whole)


@functools.lru_cache(maxsize=64)
def _code(source: str) -> tuple[str, frozenset[str]]:
    """A hash of the notebook's code cells, and the words in quotes there, without ".csv" behind them."""
    code = ["".join(cell["source"]) for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
    words = re.findall(r"""["'](\w+)(?:\.csv)?["']""", "\n".join(code))
    return hashlib.sha256(json.dumps(code).encode()).hexdigest(), frozenset(words)


def _stored(words: frozenset[str]) -> dict[str, str]:
    """A hash of each of the tables in figures/, here, that one of the words names."""
    tables = {path.stem: path for path in (project_root() / "figures").glob("*.csv")}
    return {name: _digest(tables[name], tables[name].stat().st_mtime_ns) for name in sorted(words & tables.keys())}


@functools.lru_cache(maxsize=64)
def _digest(table: Path, _changed: int) -> str:
    """A hash of the table without the columns in COSTS: a run that gives the same rows again makes nothing stale."""
    with table.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    kept = [k for k, name in enumerate(head) if name not in COSTS]
    return hashlib.sha256(json.dumps([[row[k] for k in kept] for row in [head, *rows]]).encode()).hexdigest()


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
    varied = tuple(name for name in VARIED if len(axes.get(name) or ()) > 1)
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
                runs.append(_run(notebook, parameters, out, varied))
    return runs


def repeated(values: list) -> list:
    """The values that are there more than once, each once."""
    return sorted({value for value in values if values.count(value) > 1}, key=str)


def _run(notebook: Path, parameters: dict[str, object], out: Path, varied: tuple[str, ...]) -> Run:
    shown = {name: _absolute(value) for name, value in parameters.items() if name != "out"}
    short = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:12]
    # The end of a long path tells more than its beginning.
    words = [file_name(str(shown[name])[-24:]).lstrip("-.") for name in ("dataset", "attack", "budget", "seed")]
    folder = out / notebook.stem / "_".join([*words, short])
    return Run(notebook, shown | {"out": str(folder)}, folder, varied)


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
