"""Figures: each function takes a tidy table (or images) and an Axes, draws, and returns the Axes."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdlib.files import write_atomic

# The same method has the same color everywhere (seaborn's color-blind safe palette).
_PALETTE = sns.color_palette("colorblind").as_hex()
COLORS = {"no defense": _PALETTE[7], "FT": _PALETTE[0], "AWM": _PALETTE[2], "AWM, mask thresholded": _PALETTE[1]}
METRICS = {"acc": "ACC (%)", "asr": "ASR (%)", "ra": "RA (%)"}


def method_name(defense: str, variant: str) -> str:
    """How a row's defense and variant are called in figures."""
    return {
        ("none", "default"): "no defense",
        ("fine_tuning", "default"): "FT",
        ("awm", "soft"): "AWM",
        ("awm", "thresholded"): "AWM, mask thresholded",
    }.get((defense, variant), f"{defense}, {variant}")


def labels(rows: pd.DataFrame) -> list[str]:
    """For each row its method with the clean budget, as a figure's axis shows it."""
    triples = zip(rows["defense"], rows["variant"], rows["budget"], strict=True)
    return [
        method_name(defense, variant) + ("" if defense == "none" else f", {budget} images")
        for defense, variant, budget in triples
    ]


def image_strip(images: torch.Tensor, ax: Axes, title: str = "") -> Axes:
    """Images, float (N, C, H, W) in [0, 1], side by side with a white gap."""
    padded = torch.nn.functional.pad(images.detach().cpu().float().clamp(0, 1), (1, 1, 1, 1), value=1.0)
    strip = torch.cat(list(padded), dim=2).permute(1, 2, 0).numpy()
    ax.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=10)
    return ax


def signed_image(values: torch.Tensor, ax: Axes, title: str = "") -> Axes:
    """A perturbation (C, H, W), stretched so that 0 is gray and its largest value is black or white."""
    values = values.detach().cpu()
    scaled = 0.5 + values / (2 * values.abs().max().clamp(min=1e-12))
    return image_strip(scaled[None], ax, title)


def mask_histogram(values: pd.DataFrame, ax: Axes) -> Axes:
    """Distribution of mask values; `values` has the columns mask and layers."""
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
    ax.set(xlabel="mask value (0 = weight removed, 1 = kept)", ylabel="weights of these layers (%)", yscale="log")
    return ax


def budget_curve(rows: pd.DataFrame, value: str, ax: Axes) -> Axes:
    """`value` (acc, asr or ra) over the clean budget for each method: mean line, every seed a point."""
    rows = rows.assign(method=[method_name(*pair) for pair in zip(rows["defense"], rows["variant"], strict=True)])
    rows = rows.assign(percent=100 * rows[value])
    order = [name for name in COLORS if name in set(rows["method"])]
    common = {"x": "budget", "y": "percent", "hue": "method", "hue_order": order, "palette": COLORS, "ax": ax}
    sns.lineplot(rows, errorbar=None, legend=True, **common)
    sns.scatterplot(rows, alpha=0.7, s=28, legend=False, **common)
    before = 100 * rows[f"{value}_before"].mean()
    ax.axhline(before, color=COLORS["no defense"], linestyle="--", linewidth=1, label="no defense")
    ax.set(xscale="log", xlabel="clean budget (images)", ylabel=METRICS[value], ylim=(-4, 104))
    budgets = sorted(rows["budget"].unique())
    ax.set_xticks(budgets, [str(budget) for budget in budgets], fontsize=8)
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
                path.with_suffix(suffix),
                lambda file, s=suffix, m=metadata: figure.savefig(
                    file, format=s[1:], dpi=150, bbox_inches="tight", metadata=m
                ),
            )
    plt.close(figure)
