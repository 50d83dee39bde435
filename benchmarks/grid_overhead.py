"""What a run costs beside its own work: seconds of scheduling, papermill, kernel start and imports, and how often models are trained.

    python -m benchmarks.grid_overhead            60 runs over 6 models, two at once

The notebook prepares its model, which takes a few seconds once, and writes one row, on 80 small pictures.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import runall
from bdlib import results
from tests import batch


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=2)
    workers = options.parse_args().workers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch.write_notebook(folder / "notebooks", "02_awm", batch.TRAIN)
        runall.NOTEBOOKS = folder / "notebooks"
        budgets = [str(2 * count) for count in range(1, 11)]
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
        print(
            f"{seconds:.0f} s, {seconds * workers / runs:.1f} s for each run and worker, models and notebooks' own cells included"
        )


if __name__ == "__main__":
    main()
