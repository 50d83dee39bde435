"""What is known of the runs below an output folder, on a disk or an object store: finished, failed, running, how long they took.

A run's folder holds `begun.json`, `executed.ipynb`, `log.txt`, the notebook's own `rows.csv`, and, written last, `done.json` or
`failed.json`; `.lock` is held while it runs.  `page` adds `executed.html`.
"""

import functools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import bdlib
from bdlib import locks, results
from bdlib.files import on_disk, read_json, write_atomic, write_json
from bdlib.grid import Run

WORDS = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class State:
    """One of WORDS; the seconds that a finished run took; what went wrong with a failed one; where its log is, below OUT."""

    word: str
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""
    log: str = ""


def states(runs: Iterable[Run], there: "Listing") -> dict[Path, State]:
    """The state of each run, by its folder."""
    return {run.folder: _state(run, there) for run in runs}


def _state(run: Run, there: "Listing") -> State:
    place = run.place
    if f"{place}/rows.csv" in there.paths and _of_this_run(run, there.done.get(place)):
        log = f"{place}/log.txt"
        return State("done", there.done[place]["seconds"], log=log if log in there.paths else "")
    if f"{place}/.lock" in there.paths and locks.held(run.folder / ".lock"):
        return State("running")
    if _of_this_run(run, there.failed.get(place)):
        note = there.failed[place]
        return State("failed", note["seconds"], note["error"], note["traceback"], note["log"])
    return State("missing")


def _of_this_run(run: Run, note: dict | None) -> bool:
    return note is not None and note.get("key") == run.key


class Listing:
    """The files of all runs below an output folder, looked up once, so that ten thousand runs take seconds.

    A run is named NOTEBOOK/FOLDER here, with more before it if its grid lies deeper.
    """

    def __init__(self, out: Path) -> None:
        import fsspec

        # A path is taken as it is: `url_to_fs` reads "::" in a folder's name as a chain of stores.
        self.store, root = (fsspec.filesystem("file"), str(out)) if on_disk(out) else fsspec.core.url_to_fs(str(out))
        self.store.invalidate_cache()
        parts = ((path, path.removeprefix(root).strip("/").split("/")) for path in self.store.find(root))
        self.paths = {"/".join(names): path for path, names in parts if len(names) >= 3}

    def runs_with(self, name: str) -> list[str]:
        """The runs that have a file of this name."""
        return sorted(place.rpartition("/")[0] for place in self.paths if place.endswith(f"/{name}"))

    @functools.cached_property
    def done(self) -> dict[str, dict]:
        """What each run that ended well says of itself."""
        return self.notes("done.json")

    @functools.cached_property
    def failed(self) -> dict[str, dict]:
        """What is noted of each run that failed."""
        return self.notes("failed.json")

    def notes(self, name: str) -> dict[str, dict]:
        """What the JSON file of this name says, for each run that has it; {} where it is damaged or just went away."""
        places = {run: self.paths[f"{run}/{name}"] for run in self.runs_with(name)}
        # Not `cat`, which takes "[1]" in a folder's name for a pattern; on an object store this too asks for all at once.
        texts = self.store.cat_ranges(list(places.values()), None, None, on_error="return")
        return {
            run: read_json(text if isinstance(text, bytes) else b"") for run, text in zip(places, texts, strict=True)
        }


def forget(runs: Iterable[Run]) -> None:
    """Unmark these runs, so that they are not done should their next try be cut off, nor go on from what was measured."""
    for run in runs:
        for name in ("done.json", "begun.json"):
            (run.folder / name).unlink(missing_ok=True)


def estimates(there: Listing) -> dict[tuple, float]:
    """Median seconds of the finished runs of each (notebook, profile, dataset), and of each (notebook,)."""
    seconds: dict[tuple, list[float]] = {}
    for place, done in there.done.items():
        notebook, parameters = place.split("/")[-2], done.get("parameters", {})
        for kind in ((notebook, parameters.get("profile"), parameters.get("dataset")), (notebook,)):
            seconds.setdefault(kind, []).extend([done["seconds"]] if "seconds" in done else [])
    return {kind: statistics.median(values) for kind, values in seconds.items() if values}


def estimate(run: Run, known: dict[tuple, float]) -> float | None:
    """Seconds that a run may take, by finished ones most like it; None where there are none."""
    notebook = run.notebook.stem
    alike = (notebook, run.parameters["profile"], run.parameters["dataset"])
    return known.get(alike, known.get((notebook,)))


def rows(folders: Iterable[Path]) -> pd.DataFrame:
    """The rows of finished runs, one below the other."""
    return results.load(*(folder / "rows.csv" for folder in folders))


def collect(out: Path) -> pd.DataFrame:
    """The rows of every finished run below `out`, at any depth; written to OUT/all_rows.csv and OUT/all_rows.parquet."""
    there = Listing(out)
    whole = rows(out / place for place in there.runs_with("done.json") if f"{place}/rows.csv" in there.paths)
    results.save(whole, out / "all_rows.csv")
    texts = {name: "string" for name in ("paper", "config", "measures", "device", "torch", "bdlib")}
    write_atomic(out / "all_rows.parquet", lambda file: whole.astype(texts).to_parquet(file, index=False))
    return whole


def claim(out: Path, *, mixed: bool) -> None:
    """Note this version of bdlib in the output folder.  Raises ValueError if another version wrote there, unless `mixed`."""
    note = out / "version.json"
    try:
        before = read_json(note.read_bytes()).get("bdlib")
    except FileNotFoundError:
        before = None
    if before not in (None, bdlib.__version__) and not mixed:
        raise ValueError(
            f"{out} holds runs of bdlib {before}, this is {bdlib.__version__}: give another --out, or --mix-versions"
        )
    if before != bdlib.__version__:
        write_json(note, {"bdlib": bdlib.__version__})
