"""The notebooks as coursework: student versions, solutions, an nbgrader course, and the models they need.

`python -m bdlib.coursework` (or `make student`) writes below build/student:
  notebooks/  the student versions: solutions and hidden tests out, the figures that a solution draws kept as "expected"
  solutions/  the same notebooks as they stand in notebooks/, executed
  course/     an nbgrader course: nbgrader_config.py, source/, release/, gradebook.db
  home/       the store of models that all of them read (BDLIB_HOME), made once by executing the solutions
The exercises live in notebooks/01 to 05 alone, with nbgrader's metadata; nothing here is kept by hand.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bdlib import grid, names
from bdlib.files import write_atomic
from bdlib.places import project_root, python_path

PAPERS = tuple(name for name, paper in names.PAPERS.items() if paper != "-")
CONFIG = '''"""nbgrader's settings of this course; run nbgrader in this folder."""

import os
from pathlib import Path

from bdlib.grading import LimitCharacters
from nbgrader.converters import Autograde

c = get_config()  # noqa: F821 - nbgrader gives it
course = Path(__file__).resolve().parent
c.CourseDirectory.root = str(course)
c.CourseDirectory.course_id = "backdoors"
c.ClearSolutions.code_stub = {
    "python": "# Write your code here, in place of this line and the next two.\\n"
    "from bdlib.exercises import NotSolved\\n"
    "raise NotSolved"
}
# A graded cell has two minutes; the others train and may need longer on a slow machine.
c.Execute.timeout_func = lambda cell: 120 if "nbgrader" in cell.metadata else 900
c.LimitOutput.max_lines = 200
execute, *others = Autograde.class_traits()["autograde_preprocessors"].default()
c.Autograde.autograde_preprocessors = [execute, LimitCharacters, *others]
# What the kernels of autograde inherit: the models made by make student, one CPU core each.
os.environ.setdefault("BDLIB_HOME", str(course.parent / "home"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
'''


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    course, students = options.out / "course", options.out / "notebooks"
    students.mkdir(parents=True, exist_ok=True)
    write_text(course / "nbgrader_config.py", CONFIG)
    for name in options.only:
        write_source(project_root() / "notebooks" / f"{name}.ipynb", course)
        nbgrader(course, "generate_assignment", name, "--create", "--force")
        shutil.copy(course / "release" / name / f"{name}.ipynb", students)
    print(f"student versions: {students}   nbgrader course: {course}")
    if not options.without_models:
        for name in options.only:
            solve(name, options.out)
        protect(options.out / "home")
        print(f"solutions: {options.out / 'solutions'}   models (BDLIB_HOME): {options.out / 'home'}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bdlib.coursework",
        description="Write the student versions of notebooks 01 to 05, their solutions, an nbgrader course, and the models.",
        epilog="What to do with them: notebooks/teachers_guide.md.",
    )
    parser.add_argument("--out", type=Path, default=project_root() / "build" / "student", help="folder (build/student)")
    parser.add_argument("--only", nargs="+", default=PAPERS, metavar="NOTEBOOK", help=f"out of {', '.join(PAPERS)}")
    parser.add_argument(
        "--without-models",
        action="store_true",
        help="do not execute the solutions: every student's notebook then trains its own models, a minute or two each",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in PAPERS]
    if unknown:
        parser.error(f"--only must name notebooks out of {', '.join(PAPERS)}, got {', '.join(unknown)}")
    options.out = options.out.absolute()
    return options


def write_source(notebook: Path, course: Path) -> None:
    """The notebook as nbgrader's source of an assignment of its name, in this course."""
    whole = json.loads(notebook.read_text(encoding="utf-8"))
    cells = []
    for cell in whole["cells"]:
        if cell["cell_type"] == "markdown":
            # Links to other notebooks and files lead nowhere from a student's folder.
            text = "".join(cell["source"])
            cell["source"] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
        cells += [cell, *expected(cell)]
    whole["cells"] = cells
    write_text(course / "source" / notebook.stem / notebook.name, json.dumps(whole, indent=1, ensure_ascii=False))


def expected(cell: dict) -> list[dict]:
    """A cell of text that shows the figure which this solution drew; none if it is no solution or drew nothing."""
    grading = cell["metadata"].get("nbgrader", {})
    pictures = [
        output["data"]["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    if not grading.get("solution") or not pictures:
        return []
    alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "the figure that a solution draws")
    name = f"{grading['grade_id']}.png"
    return [
        {
            "cell_type": "markdown",
            "id": f"{cell['id']}-expected",
            "metadata": {},
            "attachments": {name: {"image/png": "".join(pictures[-1])}},
            "source": f"Expected (yours may differ in the digits):\n\n![{alt}](attachment:{name})",
        }
    ]


def nbgrader(course: Path, *arguments: str, timeout: float | None = None) -> None:
    """Call nbgrader in the course's folder, as a teacher does.  Raises RuntimeError with its words if it fails."""
    # It calls alembic by its name, which is beside this Python whether or not the environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(
        command, cwd=course, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"nbgrader {arguments[0]} failed: {done.stderr[-3000:]}")


def solve(name: str, out: Path) -> None:
    """Execute the solutions of this notebook, unless this very bdlib did already; its models stay in the store."""
    import nbformat
    import papermill

    notebook, solved = project_root() / "notebooks" / f"{name}.ipynb", out / "solutions" / f"{name}.ipynb"
    made_of = {"code": code(nbformat.read(notebook, 4)), "bdlib": grid.package_hash()}
    there = solved.exists() and (out / "home" / "store").exists()
    if there and nbformat.read(solved, 4).metadata.get("made_of") == made_of:
        return
    os.environ |= {"BDLIB_HOME": str(out / "home"), "PYTHONPATH": python_path()}
    print(f"{name}: executing the solutions, training what they need")
    with tempfile.TemporaryDirectory() as work:
        executed = papermill.execute_notebook(str(notebook), None, cwd=work)
    executed.metadata["made_of"] = made_of
    write_text(solved, nbformat.writes(executed))


def code(notebook: object) -> str:
    """A hash of the notebook's code."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def protect(home: Path) -> None:
    """Take everybody's right to write from the models in this home; the folders stay their owner's, who can remove them.

    So do the locks, as he needs them to make a damaged model anew.
    """
    for path in (home / "store").glob("*"):
        if path.suffix != ".lock":
            path.chmod(0o444)
    for folder in (home, home / "store"):
        folder.chmod(0o755)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
