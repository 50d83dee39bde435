"""Arrows point down: what each module of bdlib may import of bdlib.  A defense must not see what a defender does not hold."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bdlib"
ALLOWED = {
    "files": set(),
    "places": {"files"},
    "randomness": set(),
    "signs": set(),
    "names": set(),
    "budget": set(),
    "masks": set(),
    "augment": {"gpu"},
    "gpu": set(),
    "triggers": {"pictures"},
    "attacks": {"augment", "data", "explain", "gpu", "randomness", "train", "triggers"},
    "results": {"files"},
    "figures": {"files"},
    "locks": {"files"},
    "store": {"files", "locks"},
    "pictures": set(),
    "sources": {"pictures", "signs"},
    "data": {"budget", "files", "locks", "signs", "sources"},
    "models": {"randomness"},
    "train": {"augment", "data", "gpu", "randomness"},
    "metrics": {"data", "train"},
    "poison": {"attacks", "data"},
    "profiles": {"train"},
    "report": {"figures", "files", "results"},
    "explain": {"data", "gpu", "masks", "train"},
    "selection": {"data", "masks", "train"},
    "defenses": {
        "augment",
        "data",
        "explain",
        "gpu",
        "masks",
        "randomness",
        "selection",
        "train",
    },  # never triggers, attacks, poison, metrics
    "experiment": {
        "attacks",
        "data",
        "gpu",
        "metrics",
        "models",
        "names",
        "places",
        "poison",
        "profiles",
        "results",
        "store",
        "train",
    },
    "compare": {"defenses", "experiment", "poison", "results", "selection", "train"},
    "oracle": {"compare", "defenses", "experiment", "masks", "metrics", "results", "selection", "train"},
    "paper": {
        "compare",
        "data",
        "experiment",
        "files",
        "models",
        "names",
        "oracle",
        "places",
        "poison",
        "profiles",
        "results",
    },
    "fits": {"data", "experiment", "places"},
    "grid": {"files", "places", "profiles"},
    "glance": {"budget", "names", "places", "profiles", "sources"},
    "checks": {"compare", "fits", "glance", "grid", "places"},
    "runs": {"files", "grid", "locks", "results"},
    "child": {"experiment", "files", "grid", "locks"},
    "job": {"child", "files", "grid", "places"},
    "schedule": {"grid", "job"},
    "live": set(),
    "exercises": set(),
    "grading": set(),
    "play": {"data", "figures", "train", "triggers"},
    "coursework": {"files", "grid", "names", "places"},
    "page": {"files", "grid", "results", "runs"},
    "book": {"figures", "names", "places", "results", "signs", "triggers"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """First name below bdlib of everything that the file imports of it, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "bdlib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bdlib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bdlib.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert layer in ALLOWED, f"{path.name}: say in tests/test_imports.py what it may import"
    assert imported(path) - {layer} <= ALLOWED[layer]


def test_the_rules_have_no_circle():
    done = set()
    while len(done) < len(ALLOWED):
        free = {name for name, below in ALLOWED.items() if name not in done and below <= done}
        assert free, f"a circle among {set(ALLOWED) - done}"
        done |= free


def test_only_light_packages_are_needed_to_import():
    """bdlib can be imported where only torch, torchvision, numpy, pandas, matplotlib and seaborn are; `grading` by nbgrader alone."""
    light = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "seaborn", "bdlib"}
    for path in (path for path in FILES if path.stem != "grading"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top in light or top in __import__("sys").stdlib_module_names, (
                    f"{path.name} imports {name} at the top"
                )
