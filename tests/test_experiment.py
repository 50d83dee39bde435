"""One run: checked parameters, separate random sources, a model trained once and the same twice, rows by the contract."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bdlib import compare, data, experiment, profiles, results
from bdlib.train import TrainConfig
from tests.conftest import same, state

VALUES = dict(
    notebook="02_awm",
    profile="quick",
    dataset="signs",
    attack="badnets",
    arch="wrn_16_1:2",
    budget=20,
    poison_rate=0.1,
    target_label=0,
    seed=0,
)


@pytest.fixture
def small(monkeypatch, tmp_path, untouched):
    """Settings on 200 drawn images and one epoch; models are stored in a folder of the test's own."""
    train, test = data.load("signs")
    monkeypatch.setattr(data, "load", lambda name, root: (train.subset(slice(200)), test.subset(slice(100))))
    monkeypatch.setattr(profiles, "training", lambda profile, dataset: TrainConfig(epochs=1, batch_size=50, lr=0.1))
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path))
    return experiment.Setting(**VALUES)


def test_a_model_is_trained_once_for_each_setting(small, tmp_path, capsys):
    first, again = experiment.prepare(small, "cpu"), experiment.prepare(small, "cpu")
    assert capsys.readouterr().out.count("training wrn_16_1:2 on signs") == 1
    assert same(state(first.model), state(again.model)) and not again.model.training
    experiment.prepare(dataclasses.replace(small, budget=50), "cpu")
    assert capsys.readouterr().out == "", "another budget needs no other model"
    for change in (
        {"seed": 1},
        {"attack": "blended"},
        {"target_label": 3},
        {"poison_rate": 0.2},
        {"arch": "wrn_16_1:3"},
    ):
        experiment.prepare(dataclasses.replace(small, **change), "cpu")
        assert "training" in capsys.readouterr().out, change


def test_the_same_seed_gives_the_same_bits_in_an_empty_store(small, tmp_path, monkeypatch):
    first = state(experiment.prepare(small, "cpu").model)
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path / "other"))
    assert same(first, state(experiment.prepare(small, "cpu").model))


def test_the_second_model_is_that_of_the_next_seed(small, capsys):
    lab, following = (experiment.prepare(dataclasses.replace(small, seed=seed), "cpu") for seed in (0, 1))
    assert same(state(lab.second_model()), state(following.model))
    clean = compare.control(lab).second_model()
    assert same(state(clean), state(following.vanilla_model())), "a clean network's fellow is clean"
    assert capsys.readouterr().out.count("training") == 4


def test_the_clean_subset_is_balanced_and_nested_in_the_training_split(small):
    lab = experiment.prepare(small, "cpu")
    assert torch.bincount(lab.clean.labels).tolist() == [2] * 10
    inside = (lab.clean.images[:, None] == lab.train.images).flatten(2).all(2)
    assert inside.sum(1).min() > 0, "each is an image of the training split, before the attack"
    assert len(lab.clean_subset("1/class")) == 10


def test_a_row_has_the_contracts_columns(small):
    lab = experiment.prepare(small, "cpu")
    row = lab.row("awm", "soft", lab.model, budget=20, seconds=1.234, config=TrainConfig(epochs=3))
    table = results.table([row])
    assert list(table.columns) == results.COLUMNS
    assert (
        row["acc"] == row["acc_before"]
        and row["der"] == 0.5
        and row["seconds"] == 1.23
        and '"epochs": 3' in row["config"]
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be forgotten on Linux alone")
def test_peak_memory_is_counted_from_where_it_was_forgotten():
    cpu = torch.device("cpu")
    torch.ones(50_000_000).sum()  # 200 MB, freed again
    high = experiment.peak_memory_mb(cpu)
    experiment.forget_peak_memory(cpu)
    assert experiment.peak_memory_mb(cpu) < high - 100
    torch.ones(50_000_000).sum()
    assert experiment.peak_memory_mb(cpu) > high - 100


def test_random_sources_are_separate_and_repeatable():
    setting = experiment.Setting(**VALUES)
    draw = lambda setting, use: torch.rand(3, generator=setting.generator(use)).tolist()
    assert draw(setting, "poison") == draw(setting, "poison") != draw(setting, "clean")
    assert draw(setting, "poison") != draw(experiment.Setting(**{**VALUES, "seed": 1}), "poison")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "fast"}, "profile must be one of quick, paper, paper_fast, got 'fast'"),
        ({"arch": "vgg"}, "arch must be one of preact_resnet18"),
        ({"attack": "bad"}, "attack must be one of badnets"),
        ({"poison_rate": 0}, r"poison_rate must be in \(0, 1\], got 0"),
        ({"poison_rate": 1.01}, r"poison_rate must be in \(0, 1\], got 1.01"),
        ({"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"seed": 1.5}, "seed must be a whole number from 0 on, got 1.5"),
        ({"notebook": "02"}, "notebook must be one of"),
    ],
)
def test_a_value_that_fits_nothing_is_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        experiment.Setting(**{**VALUES, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 5}, "got 5 = 5 images"),
        ({"budget": "5%%"}, "got '5%%'"),
        ({"target_label": 10}, "between 0 and 9, got 10"),
    ],
)
def test_a_value_that_does_not_fit_the_dataset_is_refused_before_training(small, capsys, change, message):
    with pytest.raises(ValueError, match=message):
        experiment.prepare(dataclasses.replace(small, **change), "cpu")
    assert "training" not in capsys.readouterr().out


def test_the_quick_profile_keeps_a_balanced_part_of_a_large_split(monkeypatch, tmp_path):
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    images = torch.arange(1000).to(torch.uint8).reshape(-1, 1, 1, 1)
    split = data.Dataset("large", images, labels, ("a", "b", "c"))
    monkeypatch.setattr(data, "load", lambda name, root: (split, split))
    monkeypatch.setattr(profiles, "QUICK_TRAIN_LIMIT", 500)
    kept = [experiment.load_data("quick", "large")[0] for _ in range(2)]
    assert kept[0].sha256() == kept[1].sha256()
    assert torch.bincount(kept[0].labels).numpy() == pytest.approx(np.array([300, 150, 50]), abs=1)
    assert len(experiment.load_data("paper", "large")[0]) == 1000


def test_rows_go_below_the_current_folder_where_the_project_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment.out_folder("runs/x") == experiment.project_root() / "runs/x"
    monkeypatch.setattr(experiment.os, "access", lambda path, mode: mode != os.W_OK)
    assert experiment.out_folder("runs/x") == tmp_path / "runs/x"
    assert experiment.out_folder("/elsewhere") == type(tmp_path)("/elsewhere")


@pytest.mark.parametrize(("acc", "asr"), [(0.59, 1.0), (0.99, 0.74)])
def test_a_network_without_a_task_or_a_backdoor_is_refused(acc, asr):
    with pytest.raises(RuntimeError, match=f"not planted: ACC {acc:.3f}.*ASR {asr:.3f}.*a higher poison rate"):
        experiment.require_planted({"acc": acc, "asr": asr})
    experiment.require_planted({"acc": 0.6, "asr": 0.75})
