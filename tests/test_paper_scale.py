"""The tables at the papers' scale, in the README and on notebooks/paper_scale.md, are those of the measured rows."""

import re

import pytest

from bdlib import figures, paper, results
from tests.stored import ROOT

PAGE = ROOT / "notebooks" / "paper_scale.md"


def table(path, head):
    """Name of each line -> its cells by column; "a/b" as two floats, other texts as they stand."""
    lines = re.search(rf"^\| {re.escape(head)} .*?\n\n", path.read_text(), re.M | re.S).group().strip().splitlines()
    (_, *columns), _, *body = (re.split(r" *\| *", line)[1:-1] for line in lines)
    return {name: dict(zip(columns, map(numbers, cells), strict=True)) for name, *cells in body}


def numbers(cell):
    return tuple(map(float, cell.split("/"))) if re.fullmatch(r"[\d./]+", cell) else cell


def measured(file, **where):
    """The rows of the methods at their default settings, in percent, the methods by the names that readers see."""
    rows = results.load(ROOT / "figures" / file).query("variant == 'default'")
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.assign(
        acc=100 * rows["acc"],
        asr=100 * rows["asr"],
        method=[figures.method_name(name, "default") for name in rows["defense"]],
    )


def close(*values):
    return pytest.approx(values, abs=0.0501)


def test_the_readmes_table():
    rows = measured("paper_cifar10_jpeg.csv", budget=500, seed=0)
    shown = table(ROOT / "README.md", "ACC / ASR, %")
    assert set(shown) == set(rows["method"]) and set(rows["device"]) == {"NVIDIA H200"}
    for name, part in rows.groupby("method"):
        by_attack = part.set_index("attack")[["acc", "asr"]]
        cells = [close(*by_attack.loc[key]) if key in by_attack.index else "not run" for key in paper.ATTACKS]
        assert list(shown[name].values()) == cells


def test_the_table_of_gtsrb():
    shown = table(PAGE, "GTSRB, ACC / ASR, %")
    rows = measured("paper_gtsrb_width_16.csv")
    assert set(shown) == set(rows["method"])
    for name, part in rows.groupby("method"):
        by_attack = part.set_index("attack")[["acc", "asr"]]
        assert list(shown[name].values()) == [close(*by_attack.loc[key]) for key in ("badnets", "blended")]


def test_the_table_of_gtsrb_with_the_leaderboards_budget():
    shown = table(PAGE, "5% clean, ACC / ASR, %")
    rows = measured("paper_gtsrb_width_16_5_percent.csv", budget=1960)
    printed = results.published().query(
        "dataset == 'gtsrb' and attack == 'badnets' and source.str.contains('leaderboard')"
    )
    before = printed[["acc_before", "asr_before"]].iloc[0]
    assert set(shown) == set(rows["method"])
    for defense, part in rows.groupby("defense"):
        by_attack, theirs = part.set_index("attack")[["acc", "asr"]], printed[printed["defense"] == defense]
        said = before if defense == "none" else theirs[["acc", "asr"]].squeeze() if len(theirs) else None
        cells = list(shown[figures.method_name(defense, "default")].values())
        assert cells[::2] == [close(*by_attack.loc[key]) for key in ("badnets", "blended")]
        assert cells[1] == ("not available" if said is None else close(*said))


def test_the_table_of_three_seeds():
    shown = table(PAGE, "ACC / ASR, %")
    for attack, cells in zip(["badnets", "blended_picture"], shown.values(), strict=True):
        rows = measured("paper_cifar10_jpeg.csv", attack=attack, budget=500)
        for name, cell in cells.items():
            part = rows[rows["method"] == name]
            assert len(part) == 3
            gave_up = all(part["acc"] == part["acc_before"] * 100)
            assert cell == ("gave up each time" if gave_up else close(part["acc"].mean(), part["asr"].mean()))


def test_the_table_of_what_blended_mixes_in():
    shown = table(PAGE, "ASR, %")
    rows = measured("paper_cifar10_jpeg_100_epochs.csv", budget=2500).set_index(["method", "attack"])["asr"]
    printed = (
        results.published()
        .query("attack == 'blended' and source.str.contains('2304.11823, Table 1')")
        .set_index("defense")
    )
    for (name, cells), defense in zip(shown.items(), ["fine_tuning", "ft_sam"], strict=True):
        *ours, last = cells.values()
        assert ours == [close(rows[name, attack]) for attack in ("badnets", "blended", "blended_picture")]
        assert last == close(printed.loc[defense, "asr"])
