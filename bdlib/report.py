"""Figures drawn from rows: those of a batch (runall.py), and the committed ones (`make figures`)."""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from bdlib import figures, results


def main(runs: Path, out: Path) -> None:
    """Write out/awm_rows.csv from every results.csv below `runs`, and the figures drawn from it."""
    rows = results.load(*sorted(runs.rglob("results.csv")))
    rows = rows.drop_duplicates([*results.SETTING, "seed"]).sort_values([*results.SETTING, "seed"])
    results.save(rows, out / "awm_rows.csv")
    figures.save(budget_figure(rows), out / "awm_budget")
    figures.save(sensitivity_figure(rows), out / "awm_sensitivity")


def draw_batch(rows: pd.DataFrame, out: Path) -> None:
    """Write one figure for each dataset, attack and network of a batch to `out`: every method's ACC and ASR."""
    for key, part in rows.groupby(["dataset", "attack", "arch"]):
        figures.save(methods_figure(part), out / re.sub(r"[^\w.-]+", "-", "_".join(map(str, key))))


def methods_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR of every method and budget in these rows, which share a dataset, an attack and a network."""
    rows = rows.assign(method=figures.labels(rows)).drop_duplicates(["method", "seed"])
    figure, ax = plt.subplots(figsize=(7, 1.4 + 0.35 * rows["method"].nunique()), layout="constrained")
    figures.acc_and_asr(rows, "method", ax)
    ax.set_title(setting_title(rows), fontsize=10)
    return figure


def budget_figure(rows: pd.DataFrame) -> plt.Figure:
    """ASR and ACC over the clean budget: AWM, AWM with its mask thresholded, fine-tuning."""
    methods = [("awm", "soft"), ("awm", "thresholded"), ("fine_tuning", "default")]
    chosen = rows[[pair in methods for pair in zip(rows["defense"], rows["variant"], strict=True)]]
    if chosen.empty:
        return empty_figure()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for value, ax in zip(("asr", "acc"), axes, strict=True):
        figures.budget_curve(chosen, value, ax)
    axes[0].get_legend().remove()
    figure.suptitle(setting_title(chosen), fontsize=10)
    return figure


def sensitivity_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR of AWM with one setting changed at a time."""
    ablated = rows[~rows["variant"].isin(["soft", "thresholded", "default"]) & (rows["defense"] == "awm")]
    if ablated.empty:
        return empty_figure()
    budget = ablated["budget"].iloc[0]
    chosen = pd.concat(
        [rows.query("defense == 'awm' and variant == 'soft' and budget == @budget").assign(variant="default"), ablated]
    )
    figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    figures.acc_and_asr(chosen, "variant", ax)
    ax.set_title(f"{setting_title(chosen)}, {budget} clean images", fontsize=10)
    return figure


def empty_figure() -> plt.Figure:
    """What is drawn where no rows are stored."""
    figure, ax = plt.subplots(figsize=(6, 1))
    ax.text(0.5, 0.5, "no stored rows of this kind: run `make figures`", ha="center", va="center")
    ax.set_axis_off()
    return figure


def setting_title(rows: pd.DataFrame) -> str:
    """Dataset, attack, network and seeds of these rows, for a figure's title."""
    words = [", ".join(map(str, rows[name].unique())) for name in ("dataset", "attack", "arch")]
    seeds = rows["seed"].nunique()
    return f"{' · '.join(words)} · {seeds} seed{'s' if seeds > 1 else ''}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
