"""Seconds of each graded cell with its solution, on one core, with the models that the store has (CONTRIBUTING.md: at most 20).

    python -m benchmarks.graded_cells                     01 to 05
    python -m benchmarks.graded_cells --only 02_awm       one of them

A model that the store lacks is trained by an ungraded cell, which is not counted.  Run nothing else meanwhile.
"""

import argparse
import os
import tempfile
from datetime import datetime

import nbclient
import nbformat
import pandas as pd

from bdlib.coursework import PAPERS
from bdlib.places import project_root, python_path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", default=PAPERS, choices=PAPERS, metavar="NOTEBOOK")
    os.environ |= {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    for name in options.parse_args().only:
        print(pd.DataFrame(graded(name)).to_string(index=False), flush=True)


def graded(name: str) -> list[dict[str, object]]:
    """Execute this notebook; its graded cells with their points (0: a solution that another cell tests) and seconds."""
    notebook = nbformat.read(project_root() / "notebooks" / f"{name}.ipynb", 4)
    with tempfile.TemporaryDirectory() as work:
        nbclient.NotebookClient(notebook, timeout=7200, resources={"metadata": {"path": work}}).execute()
    return [
        {
            "notebook": name,
            "cell": cell.metadata["nbgrader"]["grade_id"],
            "points": cell.metadata["nbgrader"].get("points", 0),
            "seconds": round(seconds(cell.metadata["execution"]), 1),
        }
        for cell in notebook.cells
        if cell.cell_type == "code" and "nbgrader" in cell.metadata
    ]


def seconds(times: dict[str, str]) -> float:
    """From the kernel's word that it begins to its word that it has done, both as nbclient records them."""
    busy, idle = (datetime.fromisoformat(times[f"iopub.status.{state}"]) for state in ("busy", "idle"))
    return (idle - busy).total_seconds()


if __name__ == "__main__":
    main()
