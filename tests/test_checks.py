"""What is checked before a grid starts: at a glance, and what is doubtful in a process of its own where torch is not imported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bdlib import checks, fits, grid, places
from tests import batch


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plans runs of a light notebook; the checks believe that torch is not imported; what they ask is kept, and answered here."""
    batch.write_notebook(tmp_path / "notebooks", "00_backdoors", "pass")
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "torch_is_here", lambda: False)
    asked = []

    def answer(command, *, input, **_):
        asked.append(json.loads(input))
        return subprocess.CompletedProcess(command, 0, json.dumps(fits.complaints(asked[-1])))

    monkeypatch.setattr(subprocess, "run", answer)

    def plan(**axes):
        return grid.plan([tmp_path / "notebooks" / "00_backdoors.ipynb"], "quick", axes, {}, tmp_path / "out")

    plan.asked = asked
    return plan


def test_what_plainly_fits_is_not_asked(plan):
    assert (
        checks.complaints(plan(seed=[0, 1, 2], budget=[10, "5%"], attack=["badnets", "lf_a2a"])) == []
        and not plan.asked
    )


def test_what_may_be_wrong_is_asked_about_and_nothing_else(plan):
    (said,) = checks.complaints(plan(attack=["blend", "badnets"]))
    assert said.startswith("00_backdoors: attack must be one of badnets")
    assert [values["attack"] for values in plan.asked[0]] == ["blend"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("poison_rate", None),
        ("poison_rate", [1]),
        ("poison_rate", True),
        ("target_label", 1.5),
        ("target_label", False),
        ("mood", 1),
    ],
)
def test_a_value_of_another_kind_is_named(plan, name, value):
    (run,) = plan()
    changed = replace(run, parameters=run.parameters | {name: value})
    (said,) = checks.complaints([changed])
    assert f"parameter {name} must be like" in said and said.endswith(f"got {value!r}") and plan.asked == []
    whole = replace(run, parameters=run.parameters | {"poison_rate": 1})
    assert checks.complaints([whole]) == []


def test_files_of_the_user_are_looked_at(plan, tmp_path):
    name = batch.write_images(tmp_path / "images")
    for count in (1, 2):
        assert checks.complaints(plan(dataset=[name], budget=[2])) == [] and len(plan.asked) == count


@pytest.mark.parametrize(
    ("size", "change", "said"),
    [
        (16, {"arch": ["vgg19_bn"]}, "vgg19_bn needs images of at least 32 x 32 pixels, got (16, 16)"),
        (8, {"attack": ["trojan_square"]}, "a patch of (9, 9)"),
    ],
)
def test_images_too_small_for_the_network_or_the_trigger_are_seen(plan, tmp_path, size, change, said):
    name = batch.write_images(tmp_path / "images").replace("@16", f"@{size}")
    assert checks.complaints(plan(dataset=[name], budget=[2])) == []
    (found,) = checks.complaints(plan(dataset=[name], budget=[2], **change))
    assert said in found


def test_a_dataset_that_cannot_be_read_is_no_reason_to_delete_it(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path))
    (tmp_path / "svhn.npz").mkdir()
    (said,) = checks.complaints(plan(dataset=["svhn"], budget=[9]))
    assert "Is a directory" in said and "delete" not in said


def test_a_dataset_that_appears_is_looked_at(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path))
    assert checks.complaints(plan(dataset=["svhn"], budget=[9])) == [], "it is not here: the notebook will say more"
    (tmp_path / "svhn.npz").write_bytes(b"damaged")
    (said,) = checks.complaints(plan(dataset=["svhn"], budget=[9]))
    assert "svhn.npz is damaged or no dataset" in said


def test_a_check_that_breaks_says_so(plan, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, ""))
    with pytest.raises(ValueError, match="could not be checked"):
        checks.complaints(plan(budget=[1]))


@pytest.mark.parametrize("option", ["--dry-run", "--status"])
def test_a_plan_does_not_import_torch(tmp_path, monkeypatch, option):
    """It takes seconds and 600 MB, for the first plan in a process that ends."""
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path))
    call = f"import sys, runall; status = runall.main(['{option}', '--seed', '0', '1']); print(status, 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", call], cwd=batch.ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1] == "0 False", ended


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"methods": "last_layr"}, "methods must be all, post-training, in training, or names out of"),
        ({"methods": "awm,ft_san"}, "got ft_san"),
        ({"extras": "oracl"}, "extras must be out of control, oracle, detection, steps, or empty, got oracl"),
        ({"methods": "awm,ft_sam", "extras": "oracle"}, None),
    ],
)
def test_methods_and_extras_of_06_are_known_before_anything_starts(tmp_path, values, said):
    runs = grid.plan([places.project_root() / "notebooks" / "06_all_five.ipynb"], "quick", {}, values, tmp_path)
    found = checks.complaints(runs)
    assert (said in found[0] and len(found) == 1) if said else found == []
