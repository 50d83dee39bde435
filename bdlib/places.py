"""Where the project, its datasets, models and runs lie."""

import os
import secrets
from pathlib import Path

from bdlib import files


def project_root() -> Path:
    """The clone that bdlib was installed from, or else the current folder."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "runall.py").exists() else Path.cwd()


def python_path() -> str:
    """PYTHONPATH for a process of ours: this very bdlib before any other."""
    return os.pathsep.join(filter(None, [str(project_root()), os.environ.get("PYTHONPATH")]))


def home() -> Path:
    """Where models and runs are kept: $BDLIB_HOME, a folder or a URL such as s3://bucket/folder, or `runs/` of the project."""
    return files.place(os.environ.get("BDLIB_HOME") or project_root() / "runs")


def data_root() -> Path:
    """Where datasets are kept: $BDLIB_DATA, or `data/` of the project."""
    return Path(os.environ.get("BDLIB_DATA") or project_root() / "data")


def dataset_file(name: str) -> Path:
    """Where a downloaded dataset is kept."""
    return data_root() / f"{name}.npz"


def require_writable(folder: Path) -> None:
    """Raises ValueError that names the folder, one of the store of models, if nothing can be written there."""
    probe = folder / f".probe-{secrets.token_hex(6)}"
    try:
        files.write_atomic(probe, lambda file: file.write(b"x"))
        probe.unlink()
    except Exception as error:  # OSError on a disk; drivers of object stores raise kinds of their own
        raise ValueError(
            f"the store of models cannot be written, {folder}: {error}; BDLIB_HOME names another place"
        ) from error
