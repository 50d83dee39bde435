"""The table without Jupyter: what comes first, what a second call still does, a stop in time, and bad input."""

import os
import signal
import time

import pandas as pd
import pytest

from bdlib import compare, experiment, oracle, paper, profiles, results, train
from tests import batch


def planned(**changed):
    lists = {
        "datasets": paper.DATASETS, "attacks": paper.ATTACKS, "seeds": paper.SEEDS, "budgets": paper.BUDGETS,
        "methods": (*paper.METHODS, paper.IN_TRAINING),
    }  # fmt: skip
    return paper.plan(**lists | changed)


def test_everything_is_planned_once():
    units = planned()
    cells = {(unit.dataset, unit.attack, unit.seed, unit.budget) for unit in units}
    # CIFAR-10: nine attacks, six budgets and CBD.  GTSRB: ten images are fewer than its classes, and its class 0 is too small for
    # the two attacks on one class.
    assert len(cells) == len(units) == 9 * 3 * 7 + 7 * 3 * 6
    assert not any(unit.dataset == "gtsrb" and unit.budget == 10 for unit in units)
    assert len({unit.name for unit in units}) == len(units)


def test_the_most_valuable_comes_first():
    units = planned()
    first = {(unit.attack, unit.seed, unit.budget) for unit in units[:4]}
    assert first == {(attack, 0, budget) for attack in ("badnets", "blended") for budget in (500, 2500)}
    assert [unit.dataset for unit in units].index("gtsrb") == 9 * 3 * 7  # all of CIFAR-10 before it
    place = {(unit.attack, unit.seed, unit.budget): number for number, unit in enumerate(units[: 9 * 3 * 7])}
    assert place["badnets", 0, 0] < place["badnets", 1, 500] < place["sig", 0, 500] < place["input_aware", 0, 500]
    assert place["badnets", 2, 500] < place["badnets", 2, 10]


def test_each_unit_is_its_attacks_own_setting():
    setting = lambda unit: unit.setting("paper", "preact_resnet18")
    by = {unit.name: setting(unit) for unit in planned()}
    assert by["cifar10_badnets_0_500"].poison_rate == 0.1 and by["cifar10_sig_0_500"].poison_rate == 0.05
    assert by["cifar10_badnets_0_500"] == by["cifar10_badnets_0_2500"]  # one network for all budgets
    trained = by["cifar10_blended_2_cbd"]
    assert (trained.notebook, trained.arch, trained.budget) == ("04_cbd", "wrn_16_1", 0)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A call on the digits with a network of a few channels, trained for an epoch, in a folder of its own."""
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(profiles, "training", lambda *_: train.TrainConfig(epochs=1))
    paper.laboratory.cache_clear()
    words = [
        "--datasets",
        "digits",
        "--attacks",
        "badnets",
        "--seeds",
        "0",
        "--profile",
        "quick",
        "--arch",
        "preact_resnet18:2",
    ]

    def call(*more):
        code = paper.main([*words, "--out", str(tmp_path / "out"), *more])
        table = tmp_path / "out" / "results.csv"
        return code, results.load(table) if table.exists() else None

    yield call
    paper.laboratory.cache_clear()


def test_rows_are_those_of_the_notebooks_and_nothing_is_measured_twice(small, monkeypatch):
    code, rows = small("--budgets", "20", "30", "--methods", "bnp", "clp")
    assert code == 0 and list(rows.columns) == results.COLUMNS
    assert sorted(zip(rows["budget"], rows["defense"], strict=True)) == [
        (budget, name) for budget in (20, 30) for name in ("bnp", "clp", "none")
    ]
    assert set(rows["notebook"]) == {"06_all_five"} and rows["asr_before"].nunique() == 1

    def fail(*_):
        raise AssertionError("a network was asked for again")

    monkeypatch.setattr(experiment, "prepare", fail)
    paper.laboratory.cache_clear()
    code, again = small("--budgets", "20", "30", "--methods", "bnp", "clp")
    assert code == 0
    pd.testing.assert_frame_equal(rows, again)


def test_another_network_or_profile_is_measured_though_the_first_is_there(small):
    words = ("--budgets", "20", "--methods", "bnp")
    small(*words)
    _, rows = small(*words, "--arch", "preact_resnet18:3")
    assert list(rows["arch"]) == ["preact_resnet18:2"] * 2 + ["preact_resnet18:3"] * 2
    files = [
        unit.file(profile, arch)
        for unit in planned()
        for profile in profiles.NAMES
        for arch in ("resnet18", "vgg_small:8")
    ]
    # CBD has its own network, whatever the others'.
    assert len(set(files)) == 3 * (2 * len(planned()) - 9 * 3 - 7 * 3)


def dies(unit):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_failure_and_the_rest_is_left(capsys):
    outcomes = [outcome for _, outcome in paper.run_all(planned()[:5], dies, workers=2)]
    assert [type(outcome).__name__ for outcome in outcomes] == ["BrokenProcessPool"] + ["bool"] * 4 and not any(
        outcomes[1:]
    )


def test_rnp_has_a_row_for_each_threshold(small):
    _, rows = small("--budgets", "100", "--methods", "rnp")
    swept = rows[rows["variant"].str.startswith("threshold ")]
    masks = "failed" not in rows.query("defense == 'rnp' and variant == 'default'")["measures"].iloc[0]
    assert len(swept) in ((20,) if masks else (0, 20))


def test_after_the_minutes_nothing_new_is_begun_and_the_rest_comes_with_the_next_call(small, monkeypatch):
    measured, clock = [], [0.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    whole = compare.rows

    def one_takes_a_minute(lab, names, *rest, **options):
        measured.extend(names)
        clock[0] += 60
        return whole(lab, names, *rest, **options)

    monkeypatch.setattr(compare, "rows", one_takes_a_minute)
    code, rows = small("--budgets", "20", "--methods", "bnp", "clp", "--minutes", "0.5")
    assert code == 3 and measured == ["bnp"] and set(rows["defense"]) == {"none", "bnp"}
    code, rows = small("--budgets", "20", "--methods", "bnp", "clp")
    assert code == 0 and measured == ["bnp", "clp"] and set(rows["defense"]) == {"none", "bnp", "clp"}


def test_a_network_that_fails_does_not_end_the_table(small, capsys):
    code, rows = small("--budgets", "20", "100000", "--methods", "bnp")
    assert code == 1 and list(rows["budget"].unique()) == [20]
    said = capsys.readouterr()
    assert "100000" in said.out and "Traceback" in said.err


def test_ctrl_c_keeps_what_was_measured(small, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    code, rows = small("--budgets", "20", "--methods", "bnp")
    monkeypatch.setattr(compare, "rows", stop)
    code, again = small("--budgets", "20", "--methods", "bnp", "clp")
    assert code == 130 and "the same command goes on" in capsys.readouterr().out
    pd.testing.assert_frame_equal(rows, again)


def test_a_stop_among_the_thresholds_does_not_count_as_measured(small, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    whole = oracle.each_threshold
    monkeypatch.setattr(oracle, "each_threshold", stop)
    assert small("--budgets", "100", "--methods", "rnp")[0] == 130
    asked = []
    monkeypatch.setattr(oracle, "each_threshold", lambda *lab: (asked.append(lab), whole(*lab))[1])
    code, rows = small("--budgets", "100", "--methods", "rnp")
    assert code == 0 and len(asked) == 1 and "rnp" in set(rows["defense"])


def test_several_workers_measure_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path / "home"))
    dataset = batch.write_images(tmp_path / "images")
    tables = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        words = [
            "--datasets",
            dataset,
            "--attacks",
            "badnets",
            "--seeds",
            "0",
            "--budgets",
            "10",
            "20",
            "--methods",
            "bnp",
        ]
        words += ["--profile", "quick", "--arch", "preact_resnet18:2", "--workers", workers, "--out", str(out)]
        assert paper.main(words) == 0
        tables.append(results.load(out / "results.csv").drop(columns=["seconds", "peak_memory_mb", "device"]))
    pd.testing.assert_frame_equal(*tables)
    assert len(list((tmp_path / "2" / "logs").glob("*_20_*.txt"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "awn"], "awn"),
        (["--attacks", "badnet"], "badnet"),
        (["--profile", "slow"], "slow"),
        (["--datasets", "cifar"], "cifar"),
        (["--arch", "resnet"], "resnet"),
        (["--minutes", "-1"], "-1"),
        (["--workers", "0"], "0"),
        (["--budgets", "0"], "0"),
        (["--seeds", "-1"], "-1"),
    ],
)
def test_bad_input_is_named_before_anything_starts(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        paper.main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_dry_run_says_what_and_how_much(tmp_path, capsys):
    assert paper.main(["--dry-run", "--datasets", "cifar10", "--seeds", "0", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("cifar10_badnets_0_500: fine_tuning, ") and "63 units" in said
    assert not (tmp_path / "out").exists()


def test_a_group_of_methods_is_a_name_too():
    methods = paper.parse(["--methods", "post-training"]).methods
    assert "mcr" in methods and paper.IN_TRAINING not in methods
