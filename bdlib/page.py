"""The pages of a grid, which need no server: OUT/index.html with rows, figures and failures, and each executed notebook."""

import platform
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

import bdlib
from bdlib import results
from bdlib.files import write_atomic
from bdlib.grid import Run
from bdlib.runs import State

SHOWN = {
    "notebook": "notebook", "dataset": "data", "arch": "network", "attack": "attack", "poison_rate": "poison rate", "budget": "budget",
    "seed": "seed", "defense": "defense", "variant": "variant", "acc_before": "ACC before", "asr_before": "ASR before", "acc": "ACC",
    "asr": "ASR", "ra": "RA", "der": "DER", "seconds": "seconds", "peak_memory_mb": "peak MB", "device": "device",
}  # fmt: skip
WORDS = ("notebook", "data", "network", "attack", "defense", "variant", "device")  # the columns that are not numbers


def write(
    out: Path,
    whole: list[Run],
    known: dict[Path, State],
    rows: pd.DataFrame,
    *,
    pages: Collection[str],
    figures: Collection[str],
) -> None:
    """Write the page.

    known: the state of each run by its folder; rows: of the finished ones; pages: places of runs with a page; figures: names of
    files in OUT/figures.
    """
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("bdlib", "."), autoescape=True, trim_blocks=True).get_template(
        "page.html.j2"
    )
    lines = [line(run, known[run.folder]) | {"page": run.place in pages} for run in whole]
    heads = list(SHOWN.values())
    text = template.render(
        runs=lines,
        done=sum(each["word"] == "done" for each in lines),
        failures=[each for each in lines if each["word"] == "failed"],
        made_of=made_of(rows),
        heads=heads,
        numbers=[index for index, head in enumerate(heads) if head not in WORDS],
        rows=results.percent(rows)[list(SHOWN)].to_numpy().tolist(),
        figures=sorted(figures),
    )
    write_atomic(out / "index.html", lambda file: file.write(text.encode()))


def of_notebook(folder: Path) -> bool:
    """Make the executed notebook of this run's folder a page beside it, executed.html; whether there is one now.

    None is made where there is one already, or no whole notebook.
    """
    # Here, not in the run's own process: nbconvert's import and first page take two seconds.
    import nbformat
    from nbconvert import HTMLExporter

    executed, page = folder / "executed.ipynb", folder / "executed.html"
    if page.exists():
        return True
    if not executed.exists():
        return False
    try:
        notebook = nbformat.reads(executed.read_text(encoding="utf-8"), as_version=4)
    except ValueError:  # a run that was killed while papermill wrote it
        return False
    text, _ = HTMLExporter().from_notebook_node(notebook)
    write_atomic(page, lambda file: file.write(text.encode()))
    return True


def line(run: Run, state: State) -> dict[str, object]:
    """What the page says of a run."""
    return {"name": run.name, "folder": run.place} | asdict(state)


def made_of(rows: pd.DataFrame) -> str:
    """Versions and hardware."""
    from importlib.metadata import version

    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "papermill", "distributed"))
    devices = ", ".join(sorted(rows["device"].astype(str).unique())) if len(rows) else "no row yet"
    system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return f"{when}. bdlib {bdlib.__version__}, {packages}, {system}; device: {devices}."
