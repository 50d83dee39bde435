"""Figures: each function takes a tidy table (or images) and an Axes, draws, and returns the Axes."""

import base64
import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from textwrap import wrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bdlib.files import write_atomic

# The same method has the same color everywhere (seaborn's color-blind safe palette).
_PALETTE = sns.color_palette("colorblind").as_hex()
COLORS = {
    "no defense": _PALETTE[7],
    "FT": _PALETTE[0],
    "AWM": _PALETTE[2],
    "AWM, mask thresholded": _PALETTE[1],
    "l-inf pruning": _PALETTE[5],
    "RNP": _PALETTE[4],
    "CBD": _PALETTE[9],
    "FT-SAM": _PALETTE[3],
}
NORM_NAMES = {"l1": "$\\ell_1$", "l2": "$\\ell_2$", "linf": "$\\ell_\\infty$"}
_NAMES = {
    "none": "no defense", "fine_tuning": "FT", "fine_pruning": "FP", "linf_pruning": "l-inf pruning", "second network": "2nd network",
}  # fmt: skip
_USUAL_VARIANT = {"awm": "soft", "linf_pruning": "linf"}  # of the papers' own notebooks
METRICS = {"acc": "ACC (%)", "asr": "ASR (%)", "ra": "RA (%)"}


def method_name(defense: str, variant: str) -> str:
    """How a row's defense and variant are called in figures."""
    name = " + ".join(_NAMES.get(part, part.upper().replace("_", "-")) for part in defense.split(" + "))
    if (defense, variant) == ("awm", "thresholded"):
        return "AWM, mask thresholded"
    return name if is_usual(defense, variant) else f"{name}, {variant}"


def is_usual(defense: str, variant: str) -> bool:
    """Whether this is the defense as it is by default, in 06 or in its paper's own notebook."""
    return variant in ("default", _USUAL_VARIANT.get(defense))


def labels(rows: pd.DataFrame) -> list[str]:
    """For each row its method with the clean budget, as a figure's axis shows it."""
    triples = zip(rows["defense"], rows["variant"], rows["budget"], strict=True)
    return [
        method_name(defense, variant) + ("" if defense == "none" else f", {budget} images")
        for defense, variant, budget in triples
    ]


def image_strip(images: torch.Tensor, ax: Axes, title: str = "", names: Sequence[str] = ()) -> Axes:
    """Images, float (N, C, H, W) in [0, 1], side by side with a white gap; over each its name, in two lines at most."""
    padded = torch.nn.functional.pad(images.detach().cpu().float().clamp(0, 1), (1, 1, 1, 1), value=1.0)
    strip = torch.cat(list(padded), dim=2).permute(1, 2, 0).numpy()
    ax.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for k, name in enumerate(names):
        lines = wrap(name, 14, max_lines=2, placeholder=" …")
        ax.text((k + 0.5) * padded.shape[3], -1, "\n".join(lines), ha="center", va="bottom", fontsize=7)
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=10, pad=24 if names else None)
    return ax


def data_address(picture: torch.Tensor) -> str:
    """A PNG of the picture, uint8 (C, H, W), at its own size, inside a data: address for HTML."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy().squeeze())).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def gallery(rows: list[tuple[str, dict[str, torch.Tensor], dict[str, object]]]) -> Figure:
    """A row for each attack: its name, batches of pictures (N, C, H, W) in [0, 1] by what they show, and facts on it.

    facts: psnr (dB), ssim, needs and labels, as `experiment.attack_pictures` gives them; they stand to the right.
    """
    heads = list(rows[0][1])
    figure, axes = plt.subplots(
        len(rows),
        len(heads),
        figsize=(2.2 * len(heads) + 3.4, 1.05 * len(rows) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for k, (name, pictures, facts) in enumerate(rows):
        line = axes[k]
        caption = (
            f"PSNR {facts['psnr']:.1f} dB, SSIM {facts['ssim']:.2f}\nneeds {facts['needs']}\nlabels {facts['labels']}"
        )
        for ax, head in zip(line, heads, strict=True):
            image_strip(pictures[head], ax, "" if k else head)
        line[0].text(-0.06, 0.5, name, ha="right", va="center", fontsize=10, transform=line[0].transAxes)
        line[-1].text(1.05, 0.5, caption, ha="left", va="center", fontsize=8, transform=line[-1].transAxes)
    return figure


def signed_image(values: torch.Tensor, ax: Axes, title: str = "") -> Axes:
    """A perturbation (C, H, W), stretched so that 0 is gray and its largest value is black or white."""
    values = values.detach().cpu()
    scaled = 0.5 + values / (2 * values.abs().max().clamp(min=1e-12))
    return image_strip(scaled[None], ax, title)


def mask_histogram(values: pd.DataFrame, ax: Axes, unit: str = "weight") -> Axes:
    """Distribution of mask values; `values` has the columns mask and layers, unit is what a mask stands for."""
    sns.histplot(
        values,
        x="mask",
        hue="layers",
        bins=40,
        binrange=(0, 1),
        element="step",
        stat="percent",
        common_norm=False,
        palette="colorblind",
        ax=ax,
    )
    ax.set(xlabel=f"mask value (0 = {unit} removed, 1 = kept)", ylabel=f"{unit}s of these layers (%)", yscale="log")
    return ax


def budget_curve(
    rows: pd.DataFrame, value: str, ax: Axes, x: str = "budget", xlabel: str = "clean budget (images)"
) -> Axes:
    """`value` (acc, asr or ra) over the clean budget, or another column `x`, for each method: mean line, every seed a point."""
    rows = rows.assign(method=[method_name(*pair) for pair in zip(rows["defense"], rows["variant"], strict=True)])
    rows = rows.assign(percent=100 * rows[value])
    order = [name for name in COLORS if name in set(rows["method"])]
    common = {"x": x, "y": "percent", "hue": "method", "hue_order": order, "palette": COLORS, "ax": ax}
    sns.lineplot(rows, errorbar=None, legend=True, **common)
    sns.scatterplot(rows, alpha=0.7, s=28, legend=False, **common)
    if "no defense" not in order:
        before = 100 * rows[f"{value}_before"].mean()
        ax.axhline(before, color=COLORS["no defense"], linestyle="--", linewidth=1, label="no defense")
    ax.set(xscale="log", xlabel=xlabel, ylabel=METRICS[value], ylim=(-4, 104))
    places = sorted(rows[x].unique())
    ax.set_xticks(places, [str(place) for place in places], fontsize=8)
    ax.minorticks_off()
    ax.legend(title=None, fontsize=8)
    return ax


def acc_and_asr(rows: pd.DataFrame, label: str, ax: Axes) -> Axes:
    """ACC and ASR, one line for each value of the column `label`: every seed a point, a bar at the mean."""
    tidy = rows.melt(id_vars=[label, "seed"], value_vars=["acc", "asr"], var_name="metric", value_name="share")
    tidy = tidy.assign(percent=100 * tidy["share"], metric=tidy["metric"].str.upper())
    common = {
        "x": "percent",
        "y": label,
        "hue": "metric",
        "palette": {"ACC": _PALETTE[0], "ASR": _PALETTE[3]},
        "ax": ax,
    }
    sns.stripplot(tidy, alpha=0.7, jitter=False, dodge=True, **common)
    sns.pointplot(tidy, linestyle="none", marker="|", markersize=9, dodge=0.4, errorbar=None, legend=False, **common)
    ax.set(xlabel="ACC, ASR (%)", ylabel="", xlim=(-4, 104))
    ax.grid(axis="y", linewidth=0.3)
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)  # beside the points, never on them
    return ax


def heatmap(
    table: pd.DataFrame, marked: pd.DataFrame, ax: Axes, title: str, *, good_is_high: bool, low: int = 0
) -> Axes:
    """Percent in each cell of a table of fractions (rows: methods, columns: attacks); darker is worse, a dash where it is not known.

    marked: True for the cells whose number gets a dagger, of the same form; low: percent at which the colors start.
    """
    percent = 100 * table
    texts = percent.map("{:.0f}".format) + marked.replace({True: "†", False: ""})
    sns.heatmap(
        percent, ax=ax, annot=texts, fmt="", vmin=low, vmax=100, cbar=False, linewidths=0.5, annot_kws={"fontsize": 8},
        cmap="rocket" if good_is_high else "rocket_r",
    )  # fmt: skip
    for row, column in np.argwhere(table.isna().to_numpy()):
        ax.text(column + 0.5, row + 0.5, "–", ha="center", va="center", fontsize=8, color="gray")
    ax.set(xlabel="", ylabel="")
    ax.set_title(f"{title} (%)", fontsize=10)
    ax.tick_params(axis="y", rotation=0, labelsize=8)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    return ax


def budget_grid(rows: pd.DataFrame) -> Figure:
    """ACC and ASR over the clean budget, a small plot for each value of the column `method`: mean line, every seed a point."""
    tidy = rows.melt(
        id_vars=["method", "budget", "seed"], value_vars=["acc", "asr"], var_name="metric", value_name="share"
    )
    tidy = tidy.assign(percent=100 * tidy["share"], metric=tidy["metric"].str.upper())
    colors = {"ACC": _PALETTE[0], "ASR": _PALETTE[3]}
    grid = sns.FacetGrid(tidy, col="method", col_wrap=5, height=1.9, aspect=1.2)
    for draw in (sns.lineplot, sns.scatterplot):
        how = {"errorbar": None} if draw is sns.lineplot else {"s": 22, "alpha": 0.7, "legend": False}
        grid.map_dataframe(draw, x="budget", y="percent", hue="metric", hue_order=list(colors), palette=colors, **how)
    places = sorted(rows["budget"].unique())
    # A number whose neighbor on the right would run into it is left out; its tick stays.
    shown = [
        str(place) if after / place > 1.4 else ""
        for place, after in zip(places, [*places[1:], float("inf")], strict=True)
    ]
    grid.set(xscale="log", xticks=places, xticklabels=shown, ylim=(-4, 104))
    for ax in grid.axes.flat:
        ax.minorticks_off()
        ax.tick_params(labelsize=8)
    grid.set_titles("{col_name}", size=9).set_axis_labels("clean images", "ACC, ASR (%)")
    grid.add_legend(title="")
    return grid.figure


def costs(rows: pd.DataFrame, ax: Axes, x: str, xlabel: str, scale: str) -> Axes:
    """The column `x` on a "log" or "linear" scale, a line for each `method`: every run a point, a bar at the median."""
    common = {"data": rows, "x": x, "y": "method", "ax": ax}
    sns.stripplot(color=_PALETTE[0], alpha=0.6, jitter=False, size=4, **common)
    sns.pointplot(
        color="black", linestyle="none", marker="|", markersize=10, errorbar=None, estimator="median", **common
    )
    ax.set(xscale=scale, xlabel=xlabel, ylabel="")
    if scale == "linear":
        ax.set_xlim(left=0)
    ax.grid(axis="y", linewidth=0.3)
    return ax


def draws(rows: pd.DataFrame, methods: Sequence[str], order: list[str], ax: Axes) -> Axes:
    """ASR of every run in percent, a line for each `method`, side by side in it a color for each `draw`, in these orders."""
    rows = rows.assign(asr=100 * rows["asr"])
    sns.stripplot(
        rows, x="asr", y="method", order=methods, hue="draw", hue_order=order,
        palette=[_PALETTE[k] for k in (0, 3, 2, 4)][: len(order)], dodge=True, jitter=False, size=4, alpha=0.7, ax=ax,
    )  # fmt: skip
    ax.set(xlim=(-4, 104), xlabel=METRICS["asr"], ylabel="")
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", linewidth=0.3)
    return ax


def printed_against_ours(ledger: pd.DataFrame, verdicts: list[str], near: float, ax: Axes) -> Axes:
    """ASR that a defense leaves, a point for each line of the ledger with one of these verdicts: printed (x) and ours (y), percent.

    ledger: as `results.ledger` gives it.  near: points within which ASR counts as equal, the gray band.
    """
    ax.fill_between(
        (0, 100), (-near, 100 - near), (near, 100 + near), color=COLORS["no defense"], alpha=0.25, linewidth=0
    )
    sns.scatterplot(
        ledger[ledger["verdict"].isin(verdicts)], x="ASR, printed", y="ASR, ours", hue="verdict", hue_order=verdicts,
        style="verdict", style_order=verdicts, palette=[_PALETTE[k] for k in (2, 0, 1, 3)], alpha=0.75, s=36, ax=ax,
    )  # fmt: skip
    ax.set(xlabel="ASR left, printed (%)", ylabel="ASR left, ours (%)", xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
    ax.legend(title=None, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def roc(truth: pd.Series, scores: dict[str, pd.Series], ax: Axes) -> Axes:
    """ROC curve of each score, higher where a network is more suspect, over those that have it; truth: 1 = backdoored."""
    from sklearn.metrics import roc_auc_score, roc_curve

    for (name, score), color, style in zip(scores.items(), _PALETTE, ("-", "--", ":"), strict=False):
        known = score.notna()
        called, found, _ = roc_curve(truth[known], score[known])
        label = f"{name}, AUROC {roc_auc_score(truth[known], score[known]):.2f}"
        if not known.all():
            label += f" ({known.sum()} networks)"
        ax.plot(called, found, label=label, color=color, linestyle=style)
    ax.plot([0, 1], [0, 1], color=COLORS["no defense"], linewidth=0.8)
    ax.set(xlabel="clean networks called backdoored (share)", ylabel="backdoored networks found (share)")
    ax.legend(fontsize=8, loc="lower right")
    return ax


def cam_grid(images: dict[str, torch.Tensor], maps: dict[str, dict[str, torch.Tensor]]) -> Figure:
    """Grad-CAM maps over images: a row for each key of `images` (name -> (N, C, H, W)), a block of N columns for each key of `maps`.

    maps: name of the network -> name of the images -> (N, H, W) in [0, 1].
    """
    count = len(next(iter(images.values())))
    size = (1.15 * (count * len(maps)) + 1, 1.25 * len(images) + 0.6)
    figure, axes = plt.subplots(len(images), count * len(maps), figsize=size, layout="constrained", squeeze=False)
    for row, (kind, pictures) in enumerate(images.items()):
        for block, (network, by_kind) in enumerate(maps.items()):
            for k in range(count):
                ax = axes[row, block * count + k]
                ax.imshow(pictures[k].permute(1, 2, 0).cpu().numpy().squeeze(), cmap="gray", vmin=0, vmax=1)
                ax.imshow(by_kind[kind][k].cpu().numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.55)
                ax.set(xticks=[], yticks=[])
                if not row and not k:
                    ax.set_title(network, loc="left", fontsize=10)
        axes[row, 0].set_ylabel(kind, fontsize=10)
    return figure


def scatter(points: pd.DataFrame, ax: Axes, title: str = "", legend: bool = True) -> Axes:
    """Points of a t-SNE: columns x, y and group, a class or "triggered" (black crosses).  The axes have no unit, so no ticks."""
    clean, triggered = points[points["group"] != "triggered"], points[points["group"] == "triggered"]
    classes = sorted(clean["group"].unique())
    palette = sns.color_palette("tab10" if len(classes) <= 10 else "husl", len(classes))
    common = {"x": "x", "y": "y", "linewidth": 0, "ax": ax}
    sns.scatterplot(clean, hue="group", hue_order=classes, palette=palette, s=16, alpha=0.8, **common)
    ax.scatter(triggered["x"], triggered["y"], color="black", marker="x", s=9, linewidth=0.6, label="triggered")
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="", title=title)
    ax.legend(title=None, fontsize=7, markerscale=1.3, loc="upper left", bbox_to_anchor=(1, 1))
    if not legend:
        ax.get_legend().remove()
    return ax


def histogram(values: pd.DataFrame, x: str, hue: str, ax: Axes, xlabel: str) -> Axes:
    """Distributions of the column `x`, one for each value of the column `hue`, each summing to 100%."""
    sns.histplot(
        values, x=x, hue=hue, bins=30, element="step", stat="percent", common_norm=False, palette="colorblind", ax=ax
    )
    ax.set(xlabel=xlabel, ylabel="images (%)")
    ax.get_legend().set_title(None)
    return ax


def effects(table: pd.DataFrame, ax: Axes) -> Axes:
    """Effect sizes: a column for each norm, a row for each channel; every channel a point, a bar at the mean."""
    tidy = table.rename(columns=NORM_NAMES).melt(var_name="norm", value_name="effect")
    common = {"x": "norm", "y": "effect", "ax": ax}
    sns.swarmplot(tidy, color=_PALETTE[0], size=3, alpha=0.6, **common)  # unlike jitter the same at every drawing
    sns.pointplot(tidy, color="black", linestyle="none", marker="_", markersize=24, errorbar=None, **common)
    ax.axhline(0, color=COLORS["no defense"], linewidth=0.8)
    ax.set(xlabel="norm of the feature map", ylabel="effect of the trigger (Cohen's d)")
    return ax


def pruning_curve(rows: pd.DataFrame, value: str, ax: Axes) -> Axes:
    """`value` (acc or asr) over the number of pruned channels for each order: mean line over seeds, every seed a point.

    rows: with the columns order and channels.
    """
    rows = rows.assign(percent=100 * rows[value], order=rows["order"].replace(NORM_NAMES))
    common = {"x": "channels", "y": "percent", "hue": "order", "palette": "colorblind", "ax": ax}
    sns.lineplot(rows, errorbar=None, style="order", **common)  # orders may prune the same channels
    sns.scatterplot(rows, alpha=0.5, s=12, legend=False, **common)
    ax.set(xlabel="channels pruned", ylabel=METRICS[value], ylim=(-4, 104))
    ax.legend(title=None, fontsize=8)
    return ax


def epochs(table: pd.DataFrame, ax: Axes, ylabel: str, hue: str | None = None) -> Axes:
    """The mean of the column `value` over the column `epoch`, a line for each value of the column `hue`."""
    sns.lineplot(
        table, x="epoch", y="value", hue=hue, errorbar=None, marker="o", palette="colorblind" if hue else None, ax=ax
    )
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if hue:
        ax.legend(title=None, fontsize=8)
    return ax


def phases(table: pd.DataFrame, ax: Axes) -> Axes:
    """ACC and ASR along the phases of a method; `table` has the columns phase, step, acc and asr, in order."""
    places = range(len(table))
    for value, color in (("acc", _PALETTE[0]), ("asr", _PALETTE[3])):
        ax.plot(places, 100 * table[value], marker="o", color=color, label=value.upper())
    ends = [k for k in places[1:] if table["phase"].iloc[k] != table["phase"].iloc[k - 1]]
    for start in (0, *ends):
        ax.axvline(start - 0.5, color=COLORS["no defense"], linewidth=0.8)
        ax.text(start - 0.4, 104, table["phase"].iloc[start], fontsize=9, va="bottom")
    ax.set(ylabel="ACC, ASR (%)", ylim=(-4, 112), xlabel="")
    ax.set_xticks(places, table["step"], rotation=45, ha="right", fontsize=8)
    ax.legend(fontsize=8, loc="center left")
    return ax


def threshold_sweep(table: pd.DataFrame, chosen: float, oracle: float, ax: Axes) -> Axes:
    """ACC, ASR and held-out clean accuracy over the threshold; the chosen one and the oracle as vertical lines."""
    lines = {"acc": ("ACC, test", _PALETTE[0], "-"), "held": ("accuracy, held-out clean", _PALETTE[0], ":")}
    for value, (label, color, style) in (lines | {"asr": ("ASR, test", _PALETTE[3], "-")}).items():
        ax.plot(table["threshold"], 100 * table[value], color=color, linestyle=style, marker=".", label=label)
    ax.axvline(chosen, color="black", linewidth=1, label="chosen without the trigger")
    ax.axvline(oracle, color=COLORS["no defense"], linewidth=1, linestyle="--", label="oracle")
    ax.set(xlabel="threshold on the mask", ylabel="share of images (%)", ylim=(-4, 104))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def ranked(table: pd.DataFrame, values: list[str], ax: Axes, xlabel: str, ylabel: str) -> Axes:
    """The columns `values` as lines over the row's rank; every second is dashed, as lines may lie on each other."""
    for name, color, style in zip(values, _PALETTE, cycle(("-", "--")), strict=False):
        ax.plot(range(1, len(table) + 1), table[name], style, label=name, color=color, linewidth=1.4)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)
    return ax


def confusion(table: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Percent of each true class (row) that is called each class (column)."""
    sns.heatmap(
        table,
        cmap="rocket_r",
        vmin=0,
        vmax=100,
        annot=len(table) <= 10,
        fmt=".0f",
        annot_kws={"size": 7},
        square=True,
        ax=ax,
        cbar=False,
    )
    ax.set(xlabel="called", ylabel="true class", title=title)
    return ax


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (150 dpi) and `path`.svg, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "bdlib"}):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            write_atomic(
                path.with_name(path.name + suffix),
                lambda file, s=suffix, m=metadata: figure.savefig(
                    file, format=s[1:], dpi=150, bbox_inches="tight", metadata=m
                ),
            )
    plt.close(figure)
