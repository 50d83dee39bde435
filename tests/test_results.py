"""Rows, their files, means over seeds, and printed numbers beside ours."""

import pandas as pd
import pytest

from bdlib import results


def row(**values):
    base = dict.fromkeys(results.COLUMNS, 0)
    words = dict(
        notebook="02_awm",
        profile="quick",
        dataset="signs",
        arch="a",
        attack="blended",
        defense="awm",
        variant="soft",
        config="{}",
        measures="{}",
        config_sha256="x",
        dataset_sha256="y",
    )
    return base | words | values


def test_rows_survive_the_file_to_the_bit(tmp_path):
    rows = results.table([row(acc=1 / 3, asr=0.1, seed=1), row(acc=0.97, seed=2, config='{"a": 1}')])
    results.save(rows, tmp_path / "deep" / "rows.csv")
    pd.testing.assert_frame_equal(results.load(tmp_path / "deep" / "rows.csv"), rows, check_dtype=False)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.csv"]


def test_each_run_is_kept_once_and_an_empty_table_changes_no_type():
    first, second = results.table([row(seed=0, asr=0.1)]), results.table([row(seed=0, asr=0.9), row(seed=1, asr=0.5)])
    rows = results.once(results.load(), first, second)
    assert rows["asr"].tolist() == [0.1, 0.5] and rows["asr"].dtype == float
    assert results.once(results.load(), results.load()).empty


def test_spread_is_mean_and_deviation_in_the_order_of_the_rows():
    runs = (("b", "y", 0.1, 0), ("b", "y", 0.3, 1), ("a", "x", 0.5, 0))
    rows = results.table([row(defense=d, attack=a, asr=v, seed=s) for d, a, v, s in runs])
    found = results.spread(rows, "asr", "defense", "attack")
    assert found.index.tolist() == ["b", "a"] and found.columns.tolist() == ["y", "x"]
    assert found.loc["b", "y"] == "20.0 ± 14.1" and found.loc["a", "x"] == "50.0" and found.loc["a", "y"] == ""


def test_measures_stay_with_their_row_where_tables_were_put_together():
    one, two = (results.table([row(seed=s, measures=f'{{"auroc": {s / 10}}}'), row(seed=s)]) for s in (1, 2))
    both = results.with_measures(pd.concat([one, two]))
    assert both["seed"].tolist() == [1, 1, 2, 2] and both["auroc"].fillna(-1).tolist() == [0.1, -1, 0.2, -1]


@pytest.mark.parametrize("wrong", [{"acurracy": 1}, {"-": "asr"}])
def test_a_row_with_other_columns_is_refused(wrong):
    bad = row() | wrong
    if "-" in wrong:
        bad = {name: value for name, value in row().items() if name != "asr"}
    with pytest.raises(ValueError, match="missing or unknown: (acurracy|asr)"):
        results.table([bad])


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is no table of results: it lacks paper"):
        results.load(tmp_path / "other.csv")


def test_mean_and_deviation_over_seeds_alone():
    rows = results.table(
        [row(seed=s, acc=a, budget=b) for s, a, b in [(0, 0.8, 10), (1, 0.9, 10), (2, 1.0, 10), (0, 0.5, 20)]]
    )
    means = results.over_seeds(rows)
    assert (
        means["acc"].tolist() == pytest.approx([0.9, 0.5])
        and means["acc_sd"].iloc[0] == pytest.approx(0.1)
        and means["seeds"].tolist() == [3, 1]
    )


def test_every_printed_number_has_its_source_and_is_a_percentage():
    known = results.published()
    assert known["source"].notna().all() and len(known) > 700
    for column in ("acc", "asr", "acc_before", "asr_before"):
        assert known[column].dropna().between(0, 100).all()


def test_a_printed_row_is_where_it_should_be():
    known = results.published().query(
        "defense == 'fine_tuning' and attack == 'blended' and source.str.contains('Table 1')"
    )
    assert known[["acc_before", "asr_before", "acc", "asr"]].values.tolist() == [[93.44, 97.71, 92.48, 82.22]]


def test_paper_vs_ours_puts_printed_and_measured_side_by_side():
    rows = results.table([row(seed=s, acc=0.9 + s / 100, asr=0.02, budget=200) for s in range(3)])
    table = results.paper_vs_ours(rows, "awm", "blended")
    assert (
        table["who"].tolist()[-1] == "ours"
        and table["ACC"].iloc[-1] == "91.0 ± 1.0"
        and (table["who"] == "published").sum() >= 1
    )
    assert table["source or protocol"].str.contains("arXiv").any()


def test_paper_vs_ours_shows_what_both_were_before(monkeypatch):
    printed = pd.DataFrame([PRINTED | {"asr_before": 98.5}, PRINTED | {"acc_before": None, "asr_before": None}])
    monkeypatch.setattr(results, "published", lambda: printed)
    rows = results.table(row(acc_before=0.9 + s / 100, asr_before=0.97, acc=0.5, asr=0.1, seed=s) for s in range(3))
    table = results.paper_vs_ours(rows, "awm", "blended")
    before = table[["ACC before", "ASR before", "ACC", "ASR"]].values.tolist()
    assert before[0] == [94.0, 98.5, 91.0, 5.0] and before[1] == ["not available", "not available", 91.0, 5.0]
    assert before[2] == ["91.0 ± 1.0", "97.0 ± 0.0", "50.0 ± 0.0", "10.0 ± 0.0"]
    assert table["images held"].tolist() == ["500 images", "500 images", 0]


def test_settings_that_differ_in_the_poison_rate_alone_are_told_apart():
    rows = results.table([row(poison_rate=rate) for rate in (0.1, 0.01, 0.005)])
    ours = results.paper_vs_ours(rows, "awm", "blended").query("who == 'ours'")["source or protocol"]
    assert [text.split("; ")[1] for text in ours] == ["10% poisoned", "1% poisoned", "0.5% poisoned"]


def test_blended_with_a_picture_stands_beside_the_printed_blended():
    rows = results.table([row(defense="ft_sam", attack=name) for name in ("blended", "blended_picture")])
    tables = [results.paper_vs_ours(rows, "ft_sam", name) for name in ("blended", "blended_picture")]
    assert len(tables[0]) > 2 and tables[0].equals(tables[1])


def test_where_nothing_is_printed_it_says_so():
    table = results.paper_vs_ours(results.table([row(attack="badnets_4x4")]), "awm", "badnets_4x4")
    for column in ("ACC before", "ASR before", "ACC", "ASR"):
        assert table[column].tolist() == ["not available", "0.0"]


def test_a_line_of_a_claim_holds_at_its_limits_and_fails_beyond():
    rows = pd.DataFrame({"drawn": ["now", "now", "before"], "asr": [0.0, 0.2, 0.101], "acc": [0.9, 1.0, 0.5]})
    lines = results.verdicts(rows, {"asr": (0, 0.1), "acc": (0.95, 1)}, ["drawn"])
    assert lines["now"].to_dict() == {"asr": "0.100, holds", "acc": "0.950, holds"}
    assert lines["before"].to_dict() == {"asr": "0.101, fails", "acc": "0.500, fails"}


def test_a_quantity_that_was_not_measured_does_not_hold():
    assert (
        results.verdicts(pd.DataFrame({"drawn": ["now"], "asr": [float("nan")]}), {"asr": (0, 1)}, ["drawn"])
        .loc["asr", "now"]
        .endswith("fails")
    )


def test_percent_touches_fractions_alone():
    shown = results.percent(results.table([row(acc=0.12345, asr_before=0.5, seconds=0.5)]))
    assert (shown["acc"].iloc[0], shown["asr_before"].iloc[0], shown["seconds"].iloc[0]) == (12.3, 50, 0.5)


PRINTED = {
    "defense": "awm", "dataset": "cifar10", "attack": "blended", "arch": "resnet18", "clean_budget": "500 images",
    "poison_rate": "10%", "acc_before": 94.0, "asr_before": 99.0, "acc": 91.0, "asr": 5.0,
    "asr_convention": None, "note": "one seed", "source": "Table 1",
}  # fmt: skip
OURS = {
    "dataset": "cifar10", "poison_rate": 0.1, "budget": 500, "acc_before": 0.7, "asr_before": 0.97, "acc": 0.66, "asr": 0.05,
}  # fmt: skip


@pytest.mark.parametrize(
    ("acc", "asr", "verdict"),
    [(0.66, 0.08, "reproduced"), (0.60, 0.08, "ASR only"), (0.66, 0.50, "ACC only"), (0.60, 0.50, "neither")],
)
def test_the_ledger_judges_by_asr_and_by_the_drop_of_acc(monkeypatch, acc, asr, verdict):
    printed = pd.DataFrame([PRINTED, PRINTED | {"attack": "wanet"}, PRINTED | {"defense": "nad"}])
    monkeypatch.setattr(results, "published", lambda: printed)
    ours = results.table(row(**OURS | {"acc": acc, "asr": asr, "seed": s}) for s in range(3))
    found = results.ledger(ours)
    assert found["verdict"].tolist() == [verdict, "not available"]  # a defense that nobody ran is left out
    assert found["line"].tolist() == [2, 3] and set(found["verdict"]) <= set(results.VERDICTS)
    first = found.iloc[0]
    assert (first["ASR, printed"], first["ACC drop, printed"], first["seeds"]) == (5.0, 3.0, 3)
    assert first["ASR difference"] == pytest.approx(100 * asr - 5) and first["ACC drop, ours"] == pytest.approx(
        70 - 100 * acc
    )
    assert (
        first["protocol, printed"] == "resnet18; poison rate: 10%; 500 images; one seed"
        and first["protocol, ours"] == "a; 10% poisoned; 500; quick; soft"
    )


def test_the_ledger_puts_both_kinds_of_blended_beside_the_printed_one(monkeypatch):
    monkeypatch.setattr(results, "published", lambda: pd.DataFrame([PRINTED]))
    rows = [row(**OURS | {"asr": 0.01}), row(**OURS | {"asr": 0.02, "attack": "blended_picture"})]
    found = results.ledger(results.table(rows))
    assert found["ASR, ours"].tolist() == [1.0, 2.0] and set(found["attack"]) == {"blended"}
    assert found["protocol, ours"].tolist() == [
        "a; 10% poisoned; 500; quick; soft",
        "blended_picture; a; 10% poisoned; 500; quick; soft",
    ]


@pytest.mark.parametrize(
    ("ours", "printed", "verdict"),
    [
        ({"asr_before": 0.03}, {}, "not planted"),
        ({"asr_before": 0.78}, {}, "not planted"),
        ({"asr_before": 0.80}, {}, "reproduced"),  # 19 points below
        ({"asr_before": 0.03}, {"asr_before": 20.0}, "reproduced"),  # it was hardly planted there either
        ({"asr_before": 0.03}, {"asr_before": None}, "reproduced"),
        ({}, {"poison_rate": "5%"}, "other poison rate"),
        ({}, {"poison_rate": "not in caption; repo default 10%"}, "reproduced"),
        ({}, {"poison_rate": "not stated"}, "reproduced"),
        ({"measures": '{"failed": 1.0}'}, {}, "gave up"),
        ({"measures": '{"failed": 0.0}'}, {}, "reproduced"),
        ({"measures": '{"failed": 1.0}', "asr_before": 0.03}, {"poison_rate": "5%"}, "other poison rate"),
        ({"measures": '{"failed": 1.0}', "asr_before": 0.03}, {}, "not planted"),
    ],
)
def test_the_ledger_does_not_judge_what_cannot_be_compared(monkeypatch, ours, printed, verdict):
    monkeypatch.setattr(results, "published", lambda: pd.DataFrame([PRINTED | printed]))
    rows = results.table([row(**OURS | ours)])
    assert results.ledger(rows)["verdict"].tolist() == [verdict]


def test_the_ledger_judges_a_method_that_gave_up_in_some_runs_alone(monkeypatch):
    monkeypatch.setattr(results, "published", lambda: pd.DataFrame([PRINTED]))
    rows = results.table([row(**OURS, measures='{"failed": 1.0}'), row(**OURS | {"seed": 1})])
    assert results.ledger(rows)["verdict"].tolist() == ["reproduced"]


def test_the_ledger_names_the_bytes(monkeypatch):
    monkeypatch.setattr(results, "published", lambda: pd.DataFrame([PRINTED]))
    rows = results.table([row(**OURS | {"dataset_sha256": "dc7f0ae64fca"})])
    assert results.ledger(rows)["protocol, ours"].tolist() == ["a; a JPEG copy; 10% poisoned; 500; quick; soft"]


def test_the_ledger_needs_both_accuracies(monkeypatch):
    monkeypatch.setattr(results, "published", lambda: pd.DataFrame([PRINTED | {"acc_before": None}]))
    found = results.ledger(results.table([row(**OURS)]))
    assert found["verdict"].tolist() == ["not available"] and found["ASR difference"].tolist() == [0.0]
