"""Seconds and peak memory of runall.py's --dry-run and --status over ten thousand runs, half of them finished.

python benchmarks/manifest.py
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bdlib import grid

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ["01_linf_pruning", "02_awm", "03_rnp", "05_ft_sam"]
AXES = {"attack": ["badnets", "blended"], "budget": list(range(10, 260, 10)), "seed": list(range(50))}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        runs = grid.plan([ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS], "quick", AXES, {}, out)
        for run in runs[: len(runs) // 2]:
            run.folder.mkdir(parents=True)
            (run.folder / "rows.csv").write_text("")
            done = {"key": run.key, "parameters": run.parameters, "seconds": 60.0}
            (run.folder / "done.json").write_text(json.dumps(done))
        axes = []
        for name, values in AXES.items():
            axes += [f"--{name}", *map(str, values)]
        command = [sys.executable, str(ROOT / "runall.py"), "--only", *NOTEBOOKS, *axes, "--out", str(out)]
        measure("import torch alone", [sys.executable, "-c", "import torch"])
        for option in ("--dry-run", "--status"):
            measure(f"{len(runs):,} runs {option}", [*command, option])


def measure(what: str, command: list[str]) -> None:
    """Print the seconds of a command, and the peak memory of the largest so far."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{what}: {seconds:.1f} s, peak memory {peak} MB")


if __name__ == "__main__":
    main()
