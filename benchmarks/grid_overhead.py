"""What a run costs beside its own work: seconds of scheduling, papermill, kernel start and imports, and how often models are trained.

    python -m benchmarks.grid_overhead            60 runs over 6 models, two at once

The notebook imports bdlib, reads its model, which is trained once, and writes one row, on 80 small pictures.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import nbformat

import runall
from bdlib import results
from tests import batch


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--budgets", type=int, default=10, help="runs for each of the six models")
    chosen = options.parse_args()
    workers = chosen.workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        imports, work = batch.TRAIN.strip().split("\n", 1)
        batch.write_notebook(folder / "notebooks", "02_awm", imports, work)
        runall.NOTEBOOKS = folder / "notebooks"
        budgets = [str(2 * count) for count in range(1, chosen.budgets + 1)]
        models = ["--attack", "badnets", "blended", "--seed", "0", "1", "2"]
        grid = ["--dataset", batch.write_images(folder / "images"), *models]
        os.environ["BDLIB_HOME"] = str(folder / "home")
        start = time.perf_counter()
        status = runall.main([*grid, "--budget", *budgets, "--workers", str(workers), "--out", str(folder / "out")])
        seconds = time.perf_counter() - start
        runs = len(results.load(folder / "out" / "results.csv"))
        stored = len(list((folder / "home" / "store").glob("*.safetensors")))
        print(
            f"status {status}: {runs} runs, {stored} models in the store, {batch.trainings(folder / 'out')} trainings"
        )
        each = seconds * workers / runs
        work = statistics.mean(own_work(path) for path in (folder / "out").glob("02_awm/*/executed.ipynb"))
        print(
            f"{seconds:.0f} s, for each run and worker {each:.1f} s, of which the notebook's own work is {work:.1f} s: "
            f"{each - work:.1f} s for all else, the models' processes included"
        )


def own_work(executed: Path) -> float:
    """Seconds of the last cell: all but parameters and imports."""
    return nbformat.read(executed, as_version=4).cells[-1].metadata["papermill"]["duration"]


if __name__ == "__main__":
    main()
