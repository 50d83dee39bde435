"""What the tests of the grid share: small notebooks, a small data set, and runall.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import torch

from bdlib import results

ROOT = Path(__file__).parents[1]
PARAMETERS = """
profile = "quick"
dataset = "signs"
attack = "blended"
arch = "preact_resnet18:8"
budget = 200
poison_rate = 0.1
target_label = 0
seed = 0
mood = "calm"
out = "nowhere"
"""
# A notebook that trains its model, or finds it in the store, and writes one row: that of the network as it is.
TRAIN = """
from bdlib import experiment, files, results
chosen = dict(profile=profile, dataset=dataset, attack=attack, arch=arch, budget=budget, poison_rate=poison_rate, seed=seed)
lab = experiment.prepare(experiment.Setting(notebook="02_awm", target_label=target_label, **chosen), "cpu")
row = lab.row("none", "default", lab.model, budget=len(lab.clean), seconds=0.0, config=None)
results.save(results.table([row]), files.place(out) / "rows.csv")
"""


def write_notebook(folder: Path, name: str, *cells: str) -> None:
    """NAME.ipynb with the parameters' cell and these cells of code."""
    folder.mkdir(exist_ok=True)
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = nbformat.v4.new_notebook(
        cells=[first, *(nbformat.v4.new_code_cell(cell) for cell in cells)], metadata=kernel
    )
    nbformat.write(whole, folder / f"{name}.ipynb")


def write_images(folder: Path, count: int = 40) -> str:
    """Two classes of 16 x 16 pictures, dark and light, on disk; the name of the data set."""
    from PIL import Image

    source = torch.Generator().manual_seed(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 120, (16, 16, 3), generator=source) + 120 * number
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
    return f"folder:{folder}@16"


def start(notebooks: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """runall.py with these notebooks, in a process group of its own; its output is in `.stdout`."""
    # A shell starts its background jobs deaf to Ctrl-C, and so are their children: tests in such a job too.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    job = f"import sys, pathlib, runall; runall.NOTEBOOKS = pathlib.Path({str(notebooks)!r}); sys.exit(runall.main(sys.argv[1:]))"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", f"{hear}; {job}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=os.environ | environment, **streams)


def table(path: Path) -> pd.DataFrame:
    """The rows without what no two runs have alike: times and memory."""
    rows = results.load(path).drop(columns=["seconds", "peak_memory_mb"])
    return rows.sort_values(list(rows.columns)).reset_index(drop=True)


def trainings(out: Path) -> int:
    """How many models were trained by the runs below `out`, by their logs."""
    return sum(path.read_text().count("once, then kept") for path in out.rglob("log.txt"))
