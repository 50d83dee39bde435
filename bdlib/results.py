"""Rows of results: their columns, their files, and the comparison with published numbers."""

import io
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from bdlib.files import write_atomic

COLUMNS = [
    *(
        "paper",
        "notebook",
        "profile",
        "dataset",
        "dataset_sha256",
        "arch",
        "attack",
        "poison_rate",
        "target_label",
        "budget",
        "seed",
    ),
    *(
        "defense",
        "variant",
        "acc_before",
        "asr_before",
        "ra_before",
        "acc",
        "asr",
        "ra",
        "der",
        "asr_all_classes",
        "acc_non_target",
        "measures",  # further numbers of a notebook, a JSON object
    ),
    *("seconds", "peak_memory_mb", "device", "torch", "bdlib", "config", "config_sha256"),
]
SETTING = [
    "notebook",
    "profile",
    "dataset",
    "arch",
    "attack",
    "poison_rate",
    "target_label",
    "budget",
    "defense",
    "variant",
]
# Variant of a row whose network was trained without the attack: what a defense costs where it is not needed.
CONTROL = "no attack"
SHOWN = ["acc", "asr", "ra", "der"]
FRACTIONS = [*SHOWN, "acc_before", "asr_before", "ra_before", "asr_all_classes", "acc_non_target"]


def table(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a DataFrame with exactly the columns of the contract.  Raises ValueError if a row has others."""
    rows = list(rows)
    for row in rows:
        wrong = sorted(set(row) ^ set(COLUMNS))
        if wrong:
            raise ValueError(
                f"a row of results must have exactly the columns of results.COLUMNS; missing or unknown: {', '.join(wrong)}"
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def save(rows: pd.DataFrame, path: Path) -> None:
    """Write a CSV, whole or not at all."""
    write_atomic(path, lambda file: file.write(rows.to_csv(index=False, lineterminator="\n").encode()))


def load(*paths: Path) -> pd.DataFrame:
    """Rows of these CSV files, one below the other.  Raises ValueError for a file that is not one of results."""
    texts = {"config": str, "dataset_sha256": str, "config_sha256": str}
    tables = [pd.read_csv(io.BytesIO(path.read_bytes()), dtype=texts) for path in paths]
    for path, rows in zip(paths, tables, strict=True):
        missing = [name for name in COLUMNS if name not in rows.columns]
        if missing:
            raise ValueError(f"{path} is no table of results: it lacks {', '.join(missing)}")
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def once(*tables: pd.DataFrame) -> pd.DataFrame:
    """The rows of all tables, each run once: that of the first table that has it."""
    # An empty table has no types of its own: left in, it would make every column one of objects.
    filled = [rows for rows in tables if len(rows)] or list(tables[:1])
    return pd.concat(filled, ignore_index=True).drop_duplicates([*SETTING, "seed"])


def with_measures(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column for each of their `measures`; empty where a row has none of that name."""
    measures = pd.DataFrame([json.loads(text) for text in rows["measures"]], index=rows.index)
    return pd.concat([rows.drop(columns="measures"), measures], axis=1)


def over_seeds(rows: pd.DataFrame, values: Iterable[str] = SHOWN) -> pd.DataFrame:
    """Mean and standard deviation (over n - 1) of each value over the seeds of a setting, and the number of seeds."""
    grouped = rows.groupby(SETTING, sort=False)
    parts = {name: grouped[name].mean() for name in values}
    parts |= {f"{name}_sd": grouped[name].std() for name in values}
    return pd.DataFrame({**parts, "seeds": grouped["seed"].nunique()}).reset_index()


def spread(rows: pd.DataFrame, value: str, index: str, columns: str) -> pd.DataFrame:
    """Mean ± sd over the seeds of a fraction, in percent, for the values of two columns in the order of the rows; "" where none is."""
    groups = rows.groupby([index, columns], sort=False)[value]
    texts = groups.agg(lambda values: _mean_sd(values.mean(), values.std()))
    return texts.unstack(fill_value="").reindex(index=rows[index].unique(), columns=rows[columns].unique())


def verdicts(rows: pd.DataFrame, limits: dict[str, tuple[float, float]], by: list[str]) -> pd.DataFrame:
    """Lines of a claim: each quantity's mean over the rows of a group, "holds" if it lies within its limits and "fails" otherwise.

    limits: quantity -> lowest and highest mean allowed.  A row a quantity, a column a group of `by`.
    """
    means = rows.groupby(by)[list(limits)].mean()
    words = {
        name: [f"{mean:.3f}, {'holds' if low <= mean <= high else 'fails'}" for mean in means[name]]
        for name, (low, high) in limits.items()
    }
    return pd.DataFrame(words, index=means.index).T


def percent(rows: pd.DataFrame) -> pd.DataFrame:
    """For the screen: every fraction in percent with one decimal, all other columns as they are."""
    return rows.assign(**{name: (100 * rows[name]).round(1) for name in FRACTIONS if name in rows})


def published() -> pd.DataFrame:
    """Every printed number known to this project, in percent as printed, each with its source; blank where none is known."""
    return pd.read_csv(str(files("bdlib") / "published.csv"))


# Our attack -> what papers call it: "Blended" mixes noise in (ANP's family) or a picture (BackdoorBench's), and both are compared.
PRINTED_AS = {"blended_picture": "blended"}
# Of the ledger: the four that judge, the best first, then why a pair of numbers is not judged.
JUDGED = ["reproduced", "ASR only", "ACC only", "neither"]
NEAR = (5.0, 3.0)  # points within which ASR, and the drop of ACC, count as equal (ours)
VERDICTS = [*JUDGED, "gave up", "not planted", "other poison rate", "not available"]
# What the bytes of `dataset_sha256` are, where they are not the whole dataset as it is published.
BYTES = {
    "dc7f0ae64fca": "a JPEG copy",
    "13c63ab58ee8": "20,000 images of a JPEG copy",
    "10b7b111af60": "20,000 images",
}
# Column that `paper_vs_ours` shows -> value it has there.
COMPARED = {"ACC before": "acc_before", "ASR before": "asr_before", "ACC": "acc", "ASR": "asr"}


def paper_vs_ours(rows: pd.DataFrame, defense: str, attack: str) -> pd.DataFrame:
    """Printed numbers for a defense against an attack beside our means over seeds, in percent, with what differs.

    One line for each printed number with its source, one for each of our settings; "not available" where nobody printed one.
    "images held" is the clean budget, for a defense in training the number of training images.
    """
    known = published()
    known = known[(known["defense"] == defense) & (known["attack"] == PRINTED_AS.get(attack, attack))]
    found = over_seeds(rows.query("defense == @defense and attack == @attack"), COMPARED.values())
    printed = [_printed_line(row) for row in known.to_dict("records")]
    ours = [_our_line(row) for row in found.to_dict("records")]
    if not printed:
        columns = ["who", "dataset", "images held", *COMPARED, "seeds", "source or protocol"]
        source = "no printed number known: add a row to bdlib/published.csv"
        printed = [dict.fromkeys(columns, "not available") | {"who": "published", "source or protocol": source}]
    return pd.DataFrame(printed + ours)


def _printed_line(row: dict) -> dict:
    """A row of published.csv as a line of `paper_vs_ours`."""
    rate = f"poison rate: {row['poison_rate']}"
    parts = [row["source"], rate, row["arch"], row["asr_convention"], row["note"]]
    return {
        "who": "published",
        "dataset": row["dataset"],
        "images held": row["clean_budget"],
        **{shown: row[name] if pd.notna(row[name]) else "not available" for shown, name in COMPARED.items()},
        "seeds": "not stated",
        "source or protocol": "; ".join(str(part) for part in parts if pd.notna(part)),
    }


def _our_line(row: dict) -> dict:
    """A setting's means over seeds as a line of `paper_vs_ours`."""
    return {
        "who": "ours",
        "dataset": row["dataset"],
        "images held": row["budget"],
        **{shown: _mean_sd(row[name], row[f"{name}_sd"]) for shown, name in COMPARED.items()},
        "seeds": row["seeds"],
        "source or protocol": f"{row['variant']}; {100 * row['poison_rate']:g}% poisoned; {row['arch']}; profile {row['profile']}; "
        "target-class images left out of ASR",
    }


def ledger(rows: pd.DataFrame, near: tuple[float, float] = NEAR, planted_within: float = 20.0) -> pd.DataFrame:
    """Every printed number of a defense that is in the rows beside ours: difference, what differs in the protocol, verdict.

    near: points within which ASR, and the drop of ACC, count as equal.  ACC is compared by its drop, because the networks
    differ.  verdict: "reproduced" if both are near, "ASR only" or "ACC only" if one is (a method that does nothing is near in ACC),
    "neither" if none is.  Not judged: "gave up" where the method left all our networks as they were; "not planted" where our ASR
    before is more than `planted_within` points below the printed one, as a backdoor that is not there cannot be erased; "other
    poison rate"; "not available" where either side lacks a number.  line: of the printed number in published.csv, as each stands
    beside all our settings.  Our datasets have the same names as the printed rows', and so have our attacks but for those in
    PRINTED_AS; which bytes of them: BYTES.
    """
    gave_up = with_measures(rows).get("failed", pd.Series(0.0, rows.index)).fillna(0)
    ours = over_seeds(rows.assign(gave_up=gave_up), [*SHOWN, "acc_before", "asr_before", "gave_up"])
    ours = ours.assign(
        other=ours["attack"].where(ours["attack"].isin(PRINTED_AS)),
        attack=ours["attack"].replace(PRINTED_AS),
        bytes=rows.groupby(SETTING, sort=False)["dataset_sha256"].first().map(BYTES).values,
        poisoned=(100 * ours["poison_rate"]).map("{:g}% poisoned".format),
    )
    keys = ["defense", "dataset", "attack"]
    known = published()
    known["line"] = known.index + 2  # line 1 of the file holds the names
    known["poisoned"] = "poison rate: " + known["poison_rate"]
    known = known[known["defense"].isin(ours["defense"])]
    both = known.merge(ours, on=keys, how="left", suffixes=("_printed", ""))
    found = pd.DataFrame(
        {
            **{name: both[name] for name in keys},
            "ASR before, printed": both["asr_before_printed"],
            "ASR before, ours": 100 * both["asr_before"],
            "ASR, printed": both["asr_printed"],
            "ASR, ours": 100 * both["asr"],
            "ACC drop, printed": both["acc_before_printed"] - both["acc_printed"],
            "ACC drop, ours": 100 * (both["acc_before"] - both["acc"]),
            "ASR difference": 100 * both["asr"] - both["asr_printed"],
            "seeds": both["seeds"],
            "protocol, printed": _joined(
                both, ["arch_printed", "poisoned_printed", "clean_budget", "asr_convention", "note"]
            ),
            "protocol, ours": _joined(both, ["other", "arch", "bytes", "poisoned", "budget", "profile", "variant"]),
            "source": both["source"],
            "line": both["line"],
        }
    )
    drop_difference = found["ACC drop, ours"] - found["ACC drop, printed"]
    asr, acc = found["ASR difference"].abs() <= near[0], drop_difference.abs() <= near[1]
    rate = both["poison_rate_printed"].str.extract(r"([\d.]+)%")[0].astype(float)  # blank where none is printed
    reasons = {
        "not available": (found["ASR difference"] + drop_difference).isna(),
        "other poison rate": (rate - 100 * both["poison_rate"]).abs() > 0.01,
        "not planted": found["ASR before, printed"] - found["ASR before, ours"] > planted_within,
        "gave up": both["gave_up"] == 1,
        "reproduced": asr & acc,
        "ASR only": asr,
        "ACC only": acc,
    }
    return found.round(1).assign(verdict=np.select(list(reasons.values()), list(reasons), "neither"))


def _joined(rows: pd.DataFrame, names: list[str]) -> pd.Series:
    """The texts of these columns, those that are there, with semicolons between them."""
    texts = [rows[name].map("{:.0f}".format if name == "budget" else str, na_action="ignore") for name in names]
    lines = zip(*texts, strict=True)
    return pd.Series(["; ".join(part for part in line if pd.notna(part)) for line in lines], rows.index, dtype=str)


def _mean_sd(mean: float, deviation: float) -> str:
    """In percent; the deviation is left out where there is one seed."""
    return f"{100 * mean:.1f}" if pd.isna(deviation) else f"{100 * mean:.1f} ± {100 * deviation:.1f}"
