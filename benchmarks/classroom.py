"""A class at once: peak memory and seconds of N kernels that execute the same notebook over one shared store.

    python -m benchmarks.classroom                10 kernels of 02_awm, its exercises solved, the store empty at first

The model must be trained once: by the kernel that comes first, while the others wait for it.
"""

import argparse
import concurrent.futures
import os
import re
import tempfile
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
        table = pd.DataFrame(pool.map(student, [path] * chosen.kernels))
        seconds = time.perf_counter() - start
    print(table.to_string())
    print(
        f"{len(table)} kernels of {chosen.notebook}: {seconds:.0f} s, models trained {table['trained'].sum()}, "
        f"peak memory {table['peak_mb'].min()} to {table['peak_mb'].max()} MB a kernel"
    )


def student(path: Path) -> dict[str, float]:
    """Execute the notebook in a kernel of its own: seconds, peak resident memory in MB (Linux), and models that it trained."""
    client = nbclient.NotebookClient(nbformat.read(path, 4), timeout=7200, kernel_name="python3")
    start = time.perf_counter()
    with client.setup_kernel():
        process = client.km.provisioner.process.pid
        for index, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, index)
        status = Path(f"/proc/{process}/status").read_text()
    text = "".join(output.get("text", "") for cell in client.nb.cells for output in cell.get("outputs", []))
    return {
        "seconds": round(time.perf_counter() - start),
        "peak_mb": int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) >> 10,
        "trained": len(re.findall(r"once, then kept in the store", text)),
    }


if __name__ == "__main__":
    main()
