"""What is seen without torch: never more than what the closer look allows, and enough for the grids that people ask for."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from bdlib import budget, data, fits, glance, models, names, profiles
from bdlib.attacks import catalog
from tests import batch

USUAL = {
    "notebook": "02_awm", "profile": "quick", "dataset": "signs", "attack": "blended", "arch": "preact_resnet18:8", "budget": 200,
    "poison_rate": 0.1, "target_label": 0, "seed": 0,
}  # fmt: skip


def test_the_names_are_those_of_what_does_the_work():
    assert set(names.ATTACKS) == set(catalog.names()), "names.ATTACKS, for `runall.py --help`, must name every attack"
    assert len(names.ATTACKS) == len(set(names.ATTACKS)) and names.NETWORKS == tuple(models.ARCHS)
    assert {name for name in names.ATTACKS if catalog.kind(name).pool == "target"} == set(names.CLEAN_LABEL)
    assert all(catalog.kind(name).pool in ("all", "target") for name in names.ATTACKS)
    assert set(names.EMBEDDED) == set(data.EMBEDDED)
    for name, sizes in names.EMBEDDED.items():
        assert tuple(data.load(name)[0].labels.bincount().tolist()) == sizes


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    """A data folder in which GTSRB is 30,000 images of 3 classes, 20, 9,980 and 20,000; the quick profile takes 20,000 of them."""
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path))
    labels = np.repeat(np.arange(3, dtype=np.uint8), (20, 9980, 20000))
    arrays = {"y_train": labels, "y_test": labels[:5], "classes": np.array(list("abc"))}
    images = {f"x_{split}": np.zeros((len(arrays[f"y_{split}"]), 3, 3, 3), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "gtsrb.npz", **arrays, **images)


def test_it_never_lets_pass_what_the_closer_look_refuses(uneven):
    axes = {
        "dataset": ["gtsrb", "digits"], "notebook": ["02_awm", "04_cbd"], "attack": ["badnets", "sig", "sig_a2a", "lira_a2a"],
        "budget": [0, 1, 3, "1/class", "0.01%", "5%", 5000, 20001, -1, "1_000"], "poison_rate": [0.0001, 0.0007, 0.1, 1.0],
        "target_label": [0, 2, 3, 10],
    }  # fmt: skip
    settings = [USUAL | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    settings += [
        USUAL | {"dataset": "gtsrb", "profile": "paper", "attack": "sig", "poison_rate": rate / 30000}
        for rate in range(25)
    ]
    passed = [values for values in settings if glance.fits(values)]
    assert [problem for problem in fits.complaints(passed) if problem] == []
    assert len(passed) > 100


def test_a_budget_that_the_smallest_class_cannot_give_is_refused(uneven):
    values = USUAL | {"dataset": "gtsrb", "profile": "paper", "arch": "preact_resnet18:2"}
    for count, said in (
        (60, None),
        (62, None),
        (63, "at most 60"),
        (3000, "needs 1000 images of class 'a', which has 20"),
    ):
        (problem,) = fits.complaints([values | {"budget": count}])
        assert (problem is None) == (said is None) == glance.fits(values | {"budget": count}), count
        assert said is None or said in problem
    assert glance.fits(values | {"notebook": "04_cbd", "budget": 3000}), "there the budget is the training set"


def test_a_class_may_give_one_more_than_its_share_only_where_it_has_one():
    sizes = np.array([20, 20, 50])
    assert [budget.even(sizes, count) for count in (3, 60, 61, 62, 63)] == [True, True, True, False, False]


@pytest.mark.parametrize("notebook", sorted(names.PAPERS))
def test_usual_grids_are_seen_to_fit(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path))
    for profile, dataset, attack in itertools.product(profiles.NAMES, data.NAMES, names.ATTACKS):
        values = (
            USUAL
            | profiles.defaults(profile, dataset, notebook)
            | {"notebook": notebook, "attack": attack, "poison_rate": 0.05}
        )
        assert glance.fits(values), values


@pytest.mark.parametrize(
    "change",
    [
        {"attack": "badnet"}, {"attack": "sig_a2a"}, {"attack": "blended:x.png"}, {"arch": "resnet"}, {"arch": "vgg19_bn:"},
        {"arch": "vgg19_bn:0"}, {"dataset": "cifar"}, {"dataset": "folder"}, {"dataset": "folder:x"}, {"profile": "slow"},
        {"notebook": "07"}, {"seed": -1}, {"seed": True}, {"poison_rate": 0}, {"poison_rate": 1.5}, {"poison_rate": float("nan")},
        {"target_label": -1}, {"target_label": 10}, {"budget": True}, {"budget": "all"}, {"budget": 9}, {"budget": 5001},
    ],
)  # fmt: skip
def test_what_is_wrong_or_unclear_is_left_to_the_closer_look(change):
    assert glance.fits(USUAL) and not glance.fits(USUAL | change)


def test_a_damaged_dataset_is_left_to_the_closer_look(uneven, tmp_path):
    whole = (tmp_path / "gtsrb.npz").read_bytes()
    with np.load(tmp_path / "gtsrb.npz") as arrays:
        np.savez_compressed(tmp_path / "small.npz", **arrays)
    small = bytearray((tmp_path / "small.npz").read_bytes())
    for at in range(60, len(small), 20):  # zlib's own error is one of those that this makes
        small[at] ^= 255
    for damaged in (b"PK damaged", whole[:1000], bytes(small)):
        (tmp_path / "gtsrb.npz").write_bytes(damaged)
        glance._counted.cache_clear()
        assert not glance.fits(USUAL | {"dataset": "gtsrb"})


def test_it_does_not_import_torch():
    call = f"import sys; from bdlib import glance; print(glance.fits({USUAL!r}), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", call], cwd=batch.ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "False"]
