"""Figures drawn from rows: those of a batch (runall.py), and the committed ones (`python -m bdlib.report RUNS OUT`)."""

import argparse
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from bdlib import figures, results
from bdlib.files import file_name


def main(runs: Path, out: Path) -> None:
    """Write out/PAPER_rows.csv for every notebook with a results.csv below `runs`, and the figures drawn from these rows.

    Rows of the papers' profiles, whatever their notebook, become out/paper_DATASET.csv and its heatmap.
    Of the primer, out/attacks_DATASET.csv for every dataset with rows of more than one attack.  The gallery of attacks is drawn by
    its notebook, which holds the pictures: it is copied.
    """
    out.mkdir(parents=True, exist_ok=True)
    for drawn in sorted(runs.rglob("attacks.*")):
        shutil.copyfile(drawn, out / drawn.name)
    rows = results.once(results.load(*sorted(runs.rglob("results.csv"))))
    # Defenses and variants stay in the order in which their notebook ran them.
    rows = rows.sort_values(
        [name for name in [*results.SETTING, "seed"] if name not in ("defense", "variant")], kind="stable"
    )
    quick = rows["profile"] == "quick"
    save_paper(rows[~quick], out)
    for notebook, part in rows[quick].groupby("notebook"):
        paper = notebook.partition("_")[2]
        if notebook == "00_backdoors":
            save_attacks(part, out)
            continue
        results.save(part, out / f"{paper}_rows.csv")
        for name, draw in FIGURES[paper].items():
            figures.save(draw(part), out / f"{paper}_{name}")
    save_ledger(out)


def save_ledger(out: Path) -> None:
    """Write out/ledger.csv: every printed number of a defense that the rows in `out` hold, beside ours."""
    rows = [path for path in sorted(out.glob("*.csv")) if path.name != "ledger.csv"]
    found = results.ledger(usual(results.load(*rows)))
    if len(found):
        results.save(found, out / "ledger.csv")


def usual(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method as it is by default, each run once: that of the paper's own notebook where 06 has it as well."""
    pairs = list(zip(rows["defense"], rows["variant"], strict=True))
    names = [figures.method_name(*pair) for pair in pairs]
    rows = rows.assign(method=names, variant="default").loc[[figures.is_usual(*pair) for pair in pairs]]
    rows = rows.sort_values("notebook", key=lambda names: names == "06_all_five", kind="stable").assign(notebook="")
    return rows.drop_duplicates([*results.SETTING, "seed"])


def save_paper(rows: pd.DataFrame, out: Path) -> None:
    """Write out/paper_DATASET.csv, .png and .svg for every dataset in these rows."""
    for dataset, part in rows.groupby("dataset"):
        name = file_name(f"paper_{dataset}")
        results.save(part, out / f"{name}.csv")
        figures.save(heatmap_figure(part), out / name)


def save_attacks(rows: pd.DataFrame, out: Path) -> None:
    """Write out/attacks_DATASET.csv, .png and .svg for every dataset on which more than one attack was measured."""
    for dataset, part in rows.groupby("dataset"):
        if part["attack"].nunique() > 1:
            name = file_name(f"attacks_{dataset}")
            results.save(part, out / f"{name}.csv")
            figures.save(planted_figure(part), out / name)


def draw_batch(rows: pd.DataFrame, out: Path) -> list[str]:
    """Write a figure for each network of a batch, over its seeds, to `out`: every method's ACC and ASR.  The names of the PNGs."""
    # What differs within the batch parts the rows and is in the names.
    also = [name for name in ("poison_rate", "target_label", "profile") if rows[name].nunique() > 1]
    names = []
    for key, part in rows.groupby(["dataset", "attack", "arch", *also]):
        names.append(file_name("_".join(map(str, key))))
        figures.save(methods_figure(part), out / names[-1])
    return [f"{name}.png" for name in names]


def methods_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR of every method and budget in these rows, which share everything else but the seed."""
    rows = rows.assign(method=figures.labels(rows)).drop_duplicates(["method", "seed"])
    rates = ", ".join(f"{100 * rate:g}%" for rate in rows["poison_rate"].unique())
    return lines_figure(rows, "method", f" · {rates} poisoned")


def budget_figure(rows: pd.DataFrame, methods: list[tuple[str, str]]) -> plt.Figure:
    """ASR and ACC over the clean budget of these methods, each a pair of defense and variant."""
    chosen = rows[[pair in methods for pair in zip(rows["defense"], rows["variant"], strict=True)]]
    if chosen.empty:
        return empty_figure()
    return asr_beside_acc(chosen, figures.budget_curve)


def variants_figure(
    rows: pd.DataFrame, defense: str, default: str = "default", hidden: tuple[str, ...] = ()
) -> plt.Figure:
    """ACC and ASR of a defense, one setting changed at a time, below its default at the same budget; without `hidden` variants."""
    rows = rows[(rows["defense"] == defense) & ~rows["variant"].isin(hidden)]
    ablated = rows[rows["variant"] != default]
    if ablated.empty:
        return empty_figure()
    same = ["dataset", "attack", "arch", "poison_rate", "budget"]
    budget = ablated["budget"].mode()[0]
    usual = rows[rows["variant"] == default].merge(ablated[ablated["budget"] == budget][same].drop_duplicates())
    return lines_figure(pd.concat([usual.assign(variant="default"), ablated]), "variant", f", {budget} images")


def ladder_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR from ANP to AWM, one step at a time, at the budget at which the steps were measured."""
    pairs = zip(rows["defense"], rows["variant"], strict=True)
    rows = rows.assign(step=[LADDER.get(pair) for pair in pairs]).dropna(subset="step")
    measured = rows[rows["defense"] == "anp"]
    if measured.empty:
        return empty_figure()
    rows = rows[rows["budget"].isin(measured["budget"].mode()[:1])]
    order = list(LADDER.values())
    return lines_figure(
        rows.sort_values("step", key=lambda column: column.map(order.index)),
        "step",
        f", {rows['budget'].iloc[0]} images",
    )


def rates_figure(rows: pd.DataFrame) -> plt.Figure:
    """ASR and ACC over the poison rate, without a defense and with CBD."""
    chosen = rows[rows["variant"] == "default"]
    chosen = chosen[chosen.groupby("attack")["poison_rate"].transform("nunique") > 1]
    if chosen.empty:
        return empty_figure()
    return asr_beside_acc(chosen, partial(figures.budget_curve, x="poison_rate", xlabel="poison rate"))


def attacks_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR under each attack, without a defense and with CBD, at the most common poison rate."""
    chosen = rows[(rows["variant"] == "default") & rows["poison_rate"].isin(rows["poison_rate"].mode()[:1])]
    if chosen["attack"].nunique() < 2:
        return empty_figure()
    methods = [figures.method_name(defense, "default") for defense in chosen["defense"]]
    chosen = chosen.assign(method=chosen["attack"] + ", " + methods)
    return lines_figure(chosen, "method", f", poison rate {chosen['poison_rate'].iloc[0]:.0%}")


def planted_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR of the network that each attack leaves behind, the strongest on top; a rate that is not the usual one is shown."""
    planted = rows[rows["defense"] == "none"]
    if planted.empty:
        return empty_figure()
    usual = planted["poison_rate"].mode()[0]
    rates = ["" if rate == usual else f" ({rate:.0%})" for rate in planted["poison_rate"]]
    bytes_ = planted["dataset_sha256"].map(results.BYTES)
    dataset = planted["dataset"].where(bytes_.isna(), planted["dataset"] + " (" + bytes_ + ")")
    planted = planted.assign(attack=planted["attack"] + rates, dataset=dataset)
    title = setting_title(planted, f"{planted['attack'].nunique()} attacks")
    figure = lines_figure(planted.sort_values("asr", ascending=False, kind="stable"), "attack")
    figure.axes[0].set_title(f"{title}\npoison rate {usual:.0%} where not marked", fontsize=9)
    return figure


def all_five(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of all methods as figures take them: `method` to show, `drop` of ACC, the control as an attack of its own, no oracle."""
    rows = rows[rows["variant"].isin(["default", results.CONTROL])]
    names = [figures.method_name(defense, "default") for defense in rows["defense"]]
    attacks = rows["attack"].mask(rows["variant"] == results.CONTROL, results.CONTROL)
    rows = rows.assign(method=names, attack=attacks, drop=rows["acc_before"] - rows["acc"])
    return rows.sort_values("attack", key=lambda attacks: attacks == results.CONTROL, kind="stable")  # the control last


def at_usual_budget(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of other clean budgets than the most common, the largest of several.

    A method in training has the training set for its budget, and stays.
    """
    clean_budgets = rows["budget"][rows["defense"] == "none"]
    usual = clean_budgets.mode()[-1:]
    return rows[rows["budget"].isin(usual) | ~rows["budget"].isin(clean_budgets)]


def heatmap_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC, ASR and DER of each method (row) under each attack (column), means over the seeds, at the most common budget.

    A dagger is where the method gave up in some run, so that the network stayed as it was; a dash where it was not run.
    """
    rows = at_usual_budget(all_five(rows))
    if rows.empty:
        return empty_figure()
    methods, attacks = rows["method"].unique(), list(rows["attack"].unique())
    rows = rows.assign(gave_up=results.with_measures(rows).get("failed", 0) == 1)
    cells = rows.pivot_table(index="method", columns="attack", values=["acc", "asr", "der", "gave_up"])
    # DER weighs what an attack lost, and the control has none.
    shown = {"acc": attacks, "asr": attacks, "der": [name for name in attacks if name != results.CONTROL]}
    widths = [len(columns) for columns in shown.values()]
    size = (max(6.5, 2.4 + 0.37 * sum(widths)), 1.6 + 0.24 * len(methods))
    figure, axes = plt.subplots(1, 3, figsize=size, width_ratios=widths, layout="constrained", sharey=True)
    for (value, columns), ax in zip(shown.items(), axes, strict=True):
        table, marked = (cells[name].reindex(index=methods, columns=columns) for name in (value, "gave_up"))
        figures.heatmap(
            table, marked > 0, ax, value.upper(), good_is_high=value != "asr", low=50 if value == "der" else 0
        )
    figure.suptitle(setting_title(rows, f"{rows['budget'].mode()[0]} clean images"), fontsize=10)
    notes = {
        "† the method gave up in a run: the network stays as it was": (cells["gave_up"] > 0).any(axis=None),
        "– not run": cells["acc"].isna().any(axis=None),
    }
    figure.supxlabel("    ".join(note for note, needed in notes.items() if needed), fontsize=8)
    return figure


def removals(rows: pd.DataFrame) -> pd.DataFrame:
    """From how many networks each method removes the backdoor, by dataset and attack: "2 of 3"; a star: also as a mean over them.

    Removed, as 06 claims it: ASR at most 20% where it was 80% or more, at most 10 points of accuracy lost.  Networks in which the
    attack is planted worse are left out: to take it from them says little.  Last column: whether the method has a star.
    rows: of attacked networks, as `all_five` gives them.
    """
    rows = rows[rows["asr_before"] >= 0.8]

    def removed(left: pd.DataFrame) -> pd.Series:
        return (left["asr"] <= 0.2) & (left["drop"] <= 0.1)

    cell = ["method", "dataset", "attack"]
    networks = rows.assign(removed=removed(rows)).groupby(cell, sort=False)["removed"].agg(["sum", "size"]).astype(str)
    means = removed(rows.groupby(cell, sort=False)[["asr", "drop"]].mean())
    texts = networks["sum"] + " of " + networks["size"] + means.map({True: " *", False: ""})
    table = texts.unstack(["dataset", "attack"]).fillna("")
    table[("all", "verdict")] = (
        means.groupby(level="method").any().map({True: "removes at least one", False: "removes none"})
    )
    return table


def common_runs(sets: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The runs of 06 on attacked networks, at the most common budget, that two or more sets have, from each; `draw`: the set."""
    rows = pd.concat([at_usual_budget(all_five(part)).assign(draw=name) for name, part in sets.items()])
    rows = rows[rows["attack"] != results.CONTROL]
    in_sets = rows.groupby(["dataset", "arch", "method", "attack", "budget", "seed"])["draw"].transform("nunique")
    return rows[in_sets > 1]


def draws_figure(runs: pd.DataFrame, columns: int = 3) -> plt.Figure:
    """ASR of every run, a panel for each attack and a color for each `draw`: how much of a mean over seeds is chance."""
    if runs.empty:
        return empty_figure()
    attacks, order = runs["attack"].unique(), list(runs["draw"].unique())
    methods, columns = runs["method"].unique(), min(columns, len(attacks))
    lines = math.ceil(len(attacks) / columns)
    size = (1.6 + 2.1 * columns, 0.7 + lines * (0.4 + 0.19 * len(methods)))
    figure, axes = plt.subplots(
        lines, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for attack, ax in zip(attacks, axes.flat, strict=False):
        figures.draws(runs[runs["attack"] == attack], methods, order, ax)
        ax.set_title(attack, fontsize=10)
        if ax is not axes[0, -1]:
            ax.get_legend().remove()
    for ax in axes.flat[len(attacks) :]:
        ax.set_axis_off()
    sns.move_legend(axes[0, -1], "upper left", bbox_to_anchor=(1, 1), title=None, frameon=False)
    figure.suptitle(setting_title(runs, f"{runs['budget'].iloc[0]} clean images"), fontsize=10)
    return figure


def ledger_figure(ledger: pd.DataFrame) -> plt.Figure:
    """What defenses leave of the attack, printed against ours: a point for each judged line of the ledger."""
    figure, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    figures.printed_against_ours(ledger, results.JUDGED, results.NEAR[0], ax)
    return figure


def all_budgets_figure(rows: pd.DataFrame) -> plt.Figure:
    """ACC and ASR over the clean budget, a plot for each method that was run with more than one; of the most common attack."""
    rows = all_five(rows)
    rows = rows[(rows["defense"] != "none") & (rows["attack"] != results.CONTROL)]
    rows = rows[rows.groupby(["method", "attack"])["budget"].transform("nunique") > 1]
    if rows.empty:
        return empty_figure()
    rows = rows[rows["attack"] == rows["attack"].mode()[0]]
    figure = figures.budget_grid(rows)
    figure.suptitle(setting_title(rows), fontsize=10, y=1.03)
    return figure


def costs_figure(rows: pd.DataFrame) -> plt.Figure:
    """Seconds and peak memory of every method at the most common budget; every run a point."""
    rows = at_usual_budget(all_five(rows))
    rows = rows[rows["defense"] != "none"]
    if rows.empty:
        return empty_figure()
    size = (10, 0.9 + 0.24 * rows["method"].nunique())
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    figures.costs(rows, axes[0], "seconds", "seconds", "log")
    figures.costs(rows, axes[1], "peak_memory_mb", "peak memory of the process (MB)", "linear")
    figure.suptitle(setting_title(rows, ", ".join(rows["device"].unique())), fontsize=10)
    return figure


DETECTORS = {"nc": "NC, anomaly index", "rnp": "RNP, share of one class", "clp": "CLP, largest outlier"}


def suspects(rows: pd.DataFrame) -> pd.DataFrame:
    """The undefended networks whose detection was measured; `backdoored` is 0 for those trained without the attack."""
    rows = rows[(rows["defense"] == "none") & rows["measures"].str.contains("nc_right")]
    scores = [*DETECTORS, "nc_right", "rnp_right"]
    networks = results.with_measures(rows).reindex(columns=[*rows.columns.drop("measures"), *scores])
    return networks.assign(backdoored=(rows["variant"] != results.CONTROL).astype(int))


def detection_figure(rows: pd.DataFrame) -> plt.Figure:
    """ROC curves of three detectors over the stored networks, two at least with a backdoor and two without."""
    networks = suspects(rows)
    if min((networks["backdoored"] == value).sum() for value in (0, 1)) < 2:
        return empty_figure()
    figure, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    figures.roc(networks["backdoored"], {name: networks[score] for score, name in DETECTORS.items()}, ax)
    ax.set_title(
        f"{networks['backdoored'].sum()} backdoored and {(networks['backdoored'] == 0).sum()} clean networks",
        fontsize=9,
    )
    return figure


def pruning_figure(rows: pd.DataFrame) -> plt.Figure:
    """ASR and ACC over the number of pruned channels in each order, from the rows of l-infinity pruning."""
    parts = rows["variant"].str.extract(r"^(?P<order>\w+), (?P<channels>\d+) channels$")
    curve = rows.join(parts).dropna(subset="order").astype({"channels": "float"})
    if curve.empty:
        return empty_figure()
    return asr_beside_acc(curve, figures.pruning_curve)


def effects_figure(rows: pd.DataFrame) -> plt.Figure:
    """Mean effect of each attack's trigger on the three norms, from the measures of l-infinity pruning: every seed a point."""
    measured = rows[rows["measures"].str.contains("d_linf")]
    if measured.empty:
        return empty_figure()
    table = results.with_measures(measured).rename(columns={f"d_{norm}": norm for norm in figures.NORM_NAMES})
    attacks = table.groupby("attack", sort=False)
    figure, axes = plt.subplots(
        1, len(attacks), figsize=(3.4 * len(attacks), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for (_, part), ax in zip(attacks, axes[0], strict=True):
        figures.effects(part[list(figures.NORM_NAMES)], ax)
        ax.set_title(setting_title(part), fontsize=8)
    return figure


def lines_figure(rows: pd.DataFrame, label: str, what: str = "") -> plt.Figure:
    """ACC and ASR, a line for each value of the column `label`; the title says the setting and `what`."""
    figure, ax = plt.subplots(figsize=(7, 1.4 + 0.33 * rows[label].nunique()), layout="constrained")
    figures.acc_and_asr(rows, label, ax)
    ax.set_title(setting_title(rows) + what, fontsize=9)
    return figure


def asr_beside_acc(rows: pd.DataFrame, draw: Callable[[pd.DataFrame, str, Axes], Axes]) -> plt.Figure:
    """ASR on the left, ACC on the right, each drawn by `draw`, one legend for both; of the attack that most of the rows have."""
    rows = rows[rows["attack"] == rows["attack"].mode()[0]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for value, ax in zip(("asr", "acc"), axes, strict=True):
        draw(rows, value, ax)
    axes[0].get_legend().remove()
    figure.suptitle(setting_title(rows), fontsize=10)
    return figure


def empty_figure() -> plt.Figure:
    """What is drawn where no rows are stored."""
    figure, ax = plt.subplots(figsize=(6, 1))
    ax.text(0.5, 0.5, "no stored rows of this kind, or too few: run `make figures`", ha="center", va="center")
    ax.set_axis_off()
    return figure


def setting_title(rows: pd.DataFrame, in_place_of_attack: str = "") -> str:
    """Dataset, attack (or these words), network and seeds of these rows, for a figure's title."""
    words = [", ".join(map(str, rows[name].unique())) for name in ("dataset", "attack", "arch")]
    words[1] = in_place_of_attack or words[1]
    seeds = rows.groupby(results.SETTING)["seed"].nunique()
    count = " to ".join(map(str, sorted({seeds.min(), seeds.max()})))
    return f"{' · '.join(words)} · {count} seed{'s' if seeds.max() > 1 else ''}"


AWM = [("awm", "soft"), ("awm", "thresholded"), ("fine_tuning", "default")]
# From ANP to AWM (arXiv:2207.04497, Table 4): defense and variant of each step, and how it is called.
LADDER = {
    ("anp", "ANP"): "ANP",
    ("anp", "weight masks"): "a mask for each weight",
    ("anp", "soft masks"): "soft masks",
    ("awm", "gamma=0"): "a recovered trigger",
    ("awm", "soft"): "L1 norm: AWM",
}
RNP = [("rnp", "default"), ("fine_tuning", "default")]
FT_SAM = [("ft_sam", "default"), ("fine_tuning", "default")]
# Paper -> name of the figure -> how it is drawn from the paper's rows.
FIGURES: dict[str, dict[str, Callable[[pd.DataFrame], plt.Figure]]] = {
    "awm": {
        "budget": lambda rows: budget_figure(rows, AWM),
        "sensitivity": lambda rows: variants_figure(rows, "awm", "soft", ("thresholded",)),
        "ladder": ladder_figure,
    },
    "cbd": {
        "ablation": lambda rows: variants_figure(rows, "cbd"),
        "poison_rates": rates_figure,
        "attacks": attacks_figure,
    },
    "linf_pruning": {"curve": pruning_figure, "effects": effects_figure},
    "rnp": {
        "budget": lambda rows: budget_figure(rows, RNP),
        "variants": lambda rows: variants_figure(rows, "rnp", hidden=("oracle threshold",)),
    },
    "all_five": {
        "heatmap": heatmap_figure,
        "budget": all_budgets_figure,
        "costs": costs_figure,
        "detection": detection_figure,
    },
    "ft_sam": {
        "budget": lambda rows: budget_figure(rows, FT_SAM),
        "ablation": lambda rows: variants_figure(rows, "ft_sam"),
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bdlib.report", description=main.__doc__)
    parser.add_argument("runs", type=Path, help="folder with batches: every results.csv below it is read")
    parser.add_argument("out", type=Path, help="folder for the CSV files and the figures")
    main(**vars(parser.parse_args()))
