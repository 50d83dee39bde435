"""The project's own promises: one list of dependencies, notebooks that keep the rules."""

import os
import re
import subprocess
import tomllib

import pytest
import yaml

from bdlib import gpu, grid, profiles
from tests.stored import NOTEBOOKS, ROOT, cells, source

CONDA_NAMES = {"torch": "pytorch"}


def test_environment_yml_repeats_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (
        project["dependencies"] + project["optional-dependencies"]["test"] + [f"python{project['requires-python']}"]
    )
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = [line for part in conda if isinstance(part, dict) for line in part["pip"] if line != "--editable ."]
    listed = [line for line in conda if isinstance(line, str) and line != "pip"] + from_pip
    plain = [re.sub(r"\[.*\]", "", line) for line in wanted]  # conda has no extras
    renamed = [re.sub(r"^[\w-]+", lambda match: CONDA_NAMES.get(match[0], match[0]), line) for line in plain]
    assert sorted(listed) == sorted(renamed)


def test_version_is_the_same_everywhere():
    import bdlib

    assert bdlib.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {bdlib.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_five_papers_are_cited():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert len(references) == 5 and all(reference["authors"] and reference["year"] for reference in references)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_notebook_is_stored_as_executed_top_to_bottom(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert notebook.stat().st_size < 1_500_000


def test_notebook_is_thin(notebook):
    """But for the graded exercises, where students write functions too: tests/test_coursework.py has their bounds."""
    code = [source(cell) for cell in cells(notebook, "code") if "nbgrader" not in cell["metadata"]]
    assert 16 <= len(code) <= 24 and max(len(cell.splitlines()) for cell in code) <= 12
    assert not re.search(r"^\s*(def|class|try)\b", "\n".join(code), re.M)


def words(cells):
    texts = [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    return [word for text in texts for word in text.split() if any(map(str.isalpha, word))]


def exercises(cells):
    """From the cell before the first graded one to the last graded one; none where nothing is graded."""
    graded = [index for index, cell in enumerate(cells) if "nbgrader" in cell["metadata"]]
    return cells[graded[0] - 1 : graded[-1]] if graded else []


def test_notebook_has_enough_words_and_not_too_many(notebook):
    whole = cells(notebook)
    apart = len(words(exercises(whole)))
    assert 600 <= len(words(whole)) - apart <= 1200 and apart <= 600


def test_parameters_are_the_quick_profiles(notebook):
    values = grid.notebook_parameters(notebook)
    assert values | profiles.defaults("quick", notebook=notebook.stem) == values
    assert {*grid.AXES, "profile", "out"} <= set(values)


def test_every_parameter_has_a_comment(notebook):
    parameters = next(cell for cell in cells(notebook, "code") if "parameters" in cell["metadata"].get("tags", []))
    assert all("  # " in line for line in source(parameters).splitlines())


def test_the_readme_names_real_notebooks_and_make_targets():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", text)) - {"it"} <= set(targets)
    for name in re.findall(r"notebooks/(\w+\.ipynb)", text):
        assert (ROOT / "notebooks" / name).exists()


@pytest.mark.parametrize("target", ["reproduce", "lab", "notebooks", "test-package", "test-notebooks"])
def test_make_runs_what_it_runs_with_the_same_bits_everywhere(target):
    printed = f"python() {{ printenv {' '.join(gpu.SAME_BITS)}; }}; python"
    command = ["make", "--silent", target, f"PYTHON={printed}", "INSTALLED=pyproject.toml"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    calls = len(out) // len(gpu.SAME_BITS)
    assert calls
    assert out == calls * list(gpu.SAME_BITS.values())


def test_make_refuses_an_environment_whose_path_has_a_space(tmp_path):
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "my env")}
    command = ["make", "--dry-run", "lint"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode and "must not have a space" in ended.stderr and not ended.stdout
