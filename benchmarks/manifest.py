"""Seconds and peak memory of runall.py's --dry-run and --status over ten thousand runs, half of them finished.

python benchmarks/manifest.py
"""

import argparse
import json
import os
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
        os.environ["BDLIB_HOME"] = folder
        for option in ("--dry-run", "--status"):
            measure(f"{len(runs):,} runs {option}", [*command, option])


def measure(what: str, command: list[str]) -> None:
    """Print the seconds of a command, and the peak memory of it or of the largest process that it started."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what}: ended with {os.waitstatus_to_exitcode(status)}")
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak memory {used.ru_maxrss >> 10} MB")


if __name__ == "__main__":
    main()
