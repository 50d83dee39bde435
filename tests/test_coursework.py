"""The coursework: what students get, and what nbgrader makes of what they hand in."""

import json
import re

import nbformat
import pytest

from bdlib import coursework, exercises, grid, places
from tests.stored import ROOT, cells, figures, source

KINDS = ("predict", "compute", "implement", "change", "break")
HANDED_IN = "02_awm"  # the assignment that is graded here
FAULTS = {  # what stands in the second exercise of who does not get on
    "loops": "while True:\n    pass",
    "raises": "raise RuntimeError('lost')",
    "floods": "for _ in range(1_000_000):\n    print('x' * 99)",  # 100 MB
    "floods in one line": "print('x' * 100_000_000)",
}
PLANNED = {"right": 10, "half": 5, "wrong": 0} | dict.fromkeys(FAULTS, 1)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """The student versions and the course of all five notebooks."""
    out = tmp_path_factory.mktemp("student")
    assert coursework.main(["--out", str(out), "--without-models"]) == 0
    return out


@pytest.fixture(params=coursework.PAPERS)
def name(request):
    return request.param


def graded(path, *, solution):
    """The solution cells, or the test cells, of a notebook by their grade_id."""
    chosen = [cell for cell in cells(path) if cell["metadata"].get("nbgrader", {}).get("solution") is solution]
    return {cell["metadata"]["nbgrader"]["grade_id"]: cell for cell in chosen}


def region(text, kind):
    """What stands between the marks of a kind, line by line."""
    found = re.findall(rf"### BEGIN {kind}\n(.*?)### END {kind}", text, re.S)
    return [line.strip() for part in found for line in part.splitlines() if line.strip()]


def test_five_exercises_and_ten_points(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    solutions, tests = graded(path, solution=True), graded(path, solution=False)
    assert [key.rsplit("-", 1)[1] for key in solutions] == list(KINDS)
    assert list(tests) == [f"{key}-test" for key in solutions]
    assert sum(cell["metadata"]["nbgrader"]["points"] for cell in tests.values()) == 10
    assert all(region(source(cell), "SOLUTION") for cell in solutions.values())
    assert all(region(source(cell), "HIDDEN TESTS") for key, cell in tests.items() if "predict" not in key)


def test_nothing_of_a_solution_is_in_the_students_files(student, name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    secret = [line for cell in graded(path, solution=True).values() for line in region(source(cell), "SOLUTION")]
    secret += [line for cell in graded(path, solution=False).values() for line in region(source(cell), "HIDDEN TESTS")]
    # What the narrative says anyway is no secret.
    told = {source(cell) for cell in cells(path) if "nbgrader" not in cell["metadata"]}
    secret = [line for line in secret if len(line) > 12 and not any(line in text for text in told)]
    assert len(secret) > 15
    for file in (student / "notebooks" / f"{name}.ipynb", student / "course" / "release" / name / f"{name}.ipynb"):
        text = "\n".join(source(cell) for cell in cells(file))
        assert [line for line in secret if line in text] == []
        assert "BEGIN" not in text and not any(cell.get("outputs") for cell in cells(file))


def test_a_figure_that_a_solution_draws_is_kept_as_expected(student, name):
    original = graded(ROOT / "notebooks" / f"{name}.ipynb", solution=True)
    drawn = {f"{key}.png": picture for key, cell in original.items() for picture in figures(cell)}
    kept = {}
    for cell in cells(student / "notebooks" / f"{name}.ipynb"):
        kept |= {picture: data["image/png"] for picture, data in cell.get("attachments", {}).items()}
        assert all(f"](attachment:{picture})" in source(cell) for picture in cell.get("attachments", {}))
    assert len(drawn) >= 2
    assert {key: value.strip() for key, value in kept.items()} == {key: value.strip() for key, value in drawn.items()}


def test_students_texts_have_no_link_that_leads_nowhere(student, name):
    text = "\n".join(map(source, cells(student / "notebooks" / f"{name}.ipynb", "markdown")))
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith(("https:", "attachment:"))] == []


def test_run_all_stops_at_the_first_unsolved_cell_with_one_sentence(student, tmp_path):
    """With the cells before the exercises left out: they are the same in every version."""
    import nbclient

    stub = source(graded(student / "notebooks" / f"{HANDED_IN}.ipynb", solution=True)["awm-1-predict"])
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in ("first = 1", stub, "after = 2")]
    )
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(nbclient.exceptions.CellExecutionError) as stopped:
        client.execute()
    shown = notebook.cells[1].outputs[-1]
    assert stopped.value.ename == "NotSolved" and shown["traceback"] == [exercises.NotSolved.MESSAGE]
    assert notebook.cells[2].execution_count is None
    assert "Write your code in this cell" in exercises.NotSolved.MESSAGE


def test_a_graded_cell_is_short_as_students_see_it(student, name):
    """The bound of all other cells, blank lines around a function left out; ours are longer by solutions and hidden tests."""
    path = student / "notebooks" / f"{name}.ipynb"
    texts = [source(cell) for cell in cells(path, "code") if "nbgrader" in cell["metadata"]]
    assert len(texts) == 10 and max(len(re.findall(r"^.*\S", text, re.M)) for text in texts) <= 12


def hand_in(course, student, answers, *, light=False):
    """Put the released notebook, with these answers in its solution cells, where nbgrader collects it.

    light: without the narrative, so that only what needs none of it can be right.
    """
    outbound = course.parent / "exchange" / "backdoors" / "outbound" / HANDED_IN / f"{HANDED_IN}.ipynb"
    notebook = nbformat.read(outbound, 4)
    for cell in notebook.cells:
        key = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        cell.source = answers.get(key, cell.source)
    if light:
        notebook.cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    folder = course.parent / "exchange" / "backdoors" / "inbound" / f"{student}+{HANDED_IN}+2026-01-01 00:00:00 UTC"
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{HANDED_IN}.ipynb")
    (folder / "timestamp.txt").write_text("2026-01-01 00:00:00 UTC")


@pytest.fixture(scope="session")
def gradebook(student):
    """Scores by student and by exercise, after release, hand-in, collection and autograding of HANDED_IN."""
    from nbgrader.api import Gradebook

    course = student / "course"
    exchange = student / "exchange"
    exchange.mkdir(mode=0o777)

    def nbgrader(*arguments):
        coursework.nbgrader(course, *arguments, f"--Exchange.root={exchange}", timeout=3000)

    nbgrader("release_assignment", HANDED_IN)
    right = {
        key: source(cell) for key, cell in graded(ROOT / "notebooks" / f"{HANDED_IN}.ipynb", solution=True).items()
    }
    predict, compute, implement, change, adapt = right
    # No scaling of the noise: seen by the open test.  Nothing shrunk: seen by the hidden test alone.
    unscaled = right[compute].replace("projected.abs().sum() / noise.abs().sum()", "1")
    too_long = "def shrink(perturbation, tau):\n    return perturbation"
    hand_in(course, "right", right)
    hand_in(course, "half", right | {compute: unscaled, implement: too_long})
    nothing = "bare_config = one_shot\nbare_model = erased\nbare_measures = lab.measure(erased)"
    wrong = {
        predict: 'prediction = "z"',
        compute: "changed = {}",
        implement: too_long,
        change: nothing,
        adapt: "adaptive = {}",
    }
    hand_in(course, "wrong", wrong, light=True)
    for fault, code in FAULTS.items():
        hand_in(course, fault, {predict: right[predict], compute: code}, light=True)
    nbgrader("collect", HANDED_IN, "--ExchangeCollect.check_owner=False")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDLIB_HOME", str(places.home()))  # the models that other tests use too
        nbgrader("autograde", HANDED_IN, "--create")
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        submissions = {found.student.id: found for found in book.assignment_submissions(HANDED_IN)}
        yield {
            who: {grade.name: grade.auto_score for grade in found.notebooks[0].grades}
            for who, found in submissions.items()
        }


@pytest.mark.parametrize("who", PLANNED)
def test_scores_are_as_planned(gradebook, who):
    assert sum(gradebook[who].values()) == PLANNED[who], gradebook[who]


def test_points_are_lost_where_the_answer_is_wrong(gradebook):
    assert {key for key, points in gradebook["half"].items() if not points} == {
        "awm-2-compute-test",
        "awm-3-implement-test",
    }


@pytest.mark.parametrize("who", FAULTS)
def test_what_is_kept_of_a_faulty_submission_is_small_and_says_what_happened(gradebook, student, who):
    path = student / "course" / "autograded" / who / HANDED_IN / f"{HANDED_IN}.ipynb"
    outputs = graded(path, solution=True)["awm-2-compute"]["outputs"]
    assert path.stat().st_size < 2_000_000
    errors = [output["ename"] for output in outputs if output["output_type"] == "error"]
    assert errors[-1:] == {"loops": ["CellTimeoutError"], "raises": ["RuntimeError"]}.get(who, [])


def test_a_batch_leaves_the_exercises_out(name):
    text = grid.source(ROOT / "notebooks" / f"{name}.ipynb")
    kept = [source(cell) for cell in json.loads(text)["cells"]]
    assert not any("SOLUTION" in cell or "HIDDEN TESTS" in cell for cell in kept)
    assert sum("results.save(" in cell for cell in kept) == 1


def test_models_are_protected_and_their_locks_are_not(tmp_path):
    """A lock that its owner cannot write would keep him from making a damaged model anew."""
    (tmp_path / "store").mkdir()
    for name in ("a.safetensors", "a.json", "a.lock"):
        (tmp_path / "store" / name).touch(0o644)
    coursework.protect(tmp_path)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()}
    assert modes == {".safetensors": 0o444, ".json": 0o444, ".lock": 0o644}


def test_solutions_are_executed_once_for_each_bdlib_and_store(tmp_path, monkeypatch):
    executed = []

    def execute(path, *_, **__):
        executed.append(path)
        (tmp_path / "home" / "store").mkdir(parents=True, exist_ok=True)
        return nbformat.read(path, 4)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.setenv("BDLIB_HOME", "elsewhere")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    counts = []
    for change in (lambda: None, lambda: None, (tmp_path / "home" / "store").rmdir, lambda: "another bdlib"):
        if change() == "another bdlib":
            monkeypatch.setattr(grid, "package_hash", lambda: "another")
        coursework.solve("01_linf_pruning", tmp_path)
        counts.append(len(executed))
    assert counts == [1, 1, 2, 3]
