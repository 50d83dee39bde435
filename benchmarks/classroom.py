"""A class at once: memory and seconds of N kernels that execute the same notebook over one shared store.

    python -m benchmarks.classroom                10 kernels of 02_awm, its exercises solved, the store empty at first

The model must be trained once: by the kernel that comes first, while the others wait for it.

peak_mb   most resident memory; libraries that all kernels map count in each of them
own_mb    what each adds to the machine: its proportional set size, with all kernels there and at their last cell
"""

import argparse
import concurrent.futures
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import nbclient
import nbformat
import pandas as pd

from bdlib.places import project_root, python_path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kernels", type=int, default=10)
    options.add_argument("--notebook", default="02_awm")
    chosen = options.parse_args()
    path = project_root() / "notebooks" / f"{chosen.notebook}.ipynb"
    with tempfile.TemporaryDirectory() as home, concurrent.futures.ThreadPoolExecutor(chosen.kernels) as pool:
        os.environ |= {"BDLIB_HOME": home, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        all_done = threading.Barrier(chosen.kernels, timeout=7200)
        table = pd.DataFrame(pool.map(lambda _: student(path, all_done), range(chosen.kernels)))
        seconds = time.perf_counter() - start
    print(table.to_string())
    print(
        f"{len(table)} kernels of {chosen.notebook}: {seconds:.0f} s, models trained {table['trained'].sum()}, "
        f"peak resident memory {table['peak_mb'].min()} to {table['peak_mb'].max()} MB a kernel, "
        f"own memory {table['own_mb'].min()} to {table['own_mb'].max()} MB"
    )


def student(path: Path, all_done: threading.Barrier) -> dict[str, float]:
    """Execute the notebook in a kernel of its own: seconds, memory in MB (Linux), and models that it trained."""
    client = nbclient.NotebookClient(nbformat.read(path, 4), timeout=7200, kernel_name="python3")
    start = time.perf_counter()
    with client.setup_kernel():
        process = Path("/proc", str(client.km.provisioner.process.pid))
        for index, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, index)
        seconds = time.perf_counter() - start
        all_done.wait()
        peak, own = megabytes(process / "status", "VmHWM"), megabytes(process / "smaps_rollup", "Pss")
        all_done.wait()  # nobody leaves before all are measured
    text = "".join(output.get("text", "") for cell in client.nb.cells for output in cell.get("outputs", []))
    trained = len(re.findall(r"once, then kept in the store", text))
    return {"seconds": round(seconds), "peak_mb": peak, "own_mb": own, "trained": trained}


def megabytes(file: Path, name: str) -> int:
    """A number of a file below /proc that holds lines "name: number kB"."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.M).group(1)) >> 10


if __name__ == "__main__":
    main()
