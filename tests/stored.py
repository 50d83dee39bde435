"""The stored notebooks, as the tests of the project, the book, the coursework and the browser read them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str = "") -> list[dict]:
    """The cells of a notebook, all or of one kind ("code", "markdown")."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if not kind or cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def figures(cell: dict) -> list[str]:
    """The pictures that a code cell drew, PNG in base 64."""
    return ["".join(o["data"]["image/png"]) for o in cell["outputs"] if "image/png" in o.get("data", {})]
