"""Figures: what is on the axes, the same color for the same method, the same bytes for the same figure."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from bdlib import figures, report, results
from tests.test_results import row


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.fixture
def rows():
    methods = [("awm", "soft"), ("awm", "thresholded"), ("fine_tuning", "default")]
    return results.table(
        row(defense=d, variant=v, budget=b, seed=s, asr=0.1 * s, acc=0.9, asr_before=0.95, acc_before=0.98)
        for d, v in methods
        for b in (10, 200)
        for s in range(3)
    )


def test_budget_curve_shows_every_seed_in_the_methods_color(ax, rows):
    figures.budget_curve(rows, "asr", ax)
    assert ax.get_xlabel() == "clean budget (images)" and ax.get_ylabel() == "ASR (%)"
    assert sum(len(points.get_offsets()) for points in ax.collections) == len(rows)
    means = {line.get_color(): list(line.get_ydata()) for line in ax.get_lines() if len(line.get_ydata())}
    assert means[figures.COLORS["AWM"]] == means[figures.COLORS["FT"]] == pytest.approx([10, 10])
    assert means[figures.COLORS["no defense"]] == pytest.approx([95, 95])


def test_every_figure_function_returns_its_axes(ax, rows):
    for returned in (
        figures.acc_and_asr(rows, "variant", ax),
        figures.image_strip(torch.rand(3, 3, 8, 8), ax),
        figures.signed_image(torch.randn(1, 8, 8), ax),
    ):
        assert returned is ax


def test_image_strip_lays_images_side_by_side(ax):
    figures.image_strip(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), ax)
    shown = ax.get_images()[0].get_array()
    assert shown.shape == (6, 12, 3) and shown[2, 2].tolist() == [0, 0, 0] and shown[2, 8].tolist() == [1, 1, 1]


def test_signed_image_puts_zero_at_gray(ax):
    figures.signed_image(torch.tensor([[[0.0, -2.0, 1.0]]]), ax)
    assert ax.get_images()[0].get_array()[1, 1:4].tolist() == [0.5, 0.0, 0.75]


def test_mask_histogram_is_on_a_log_scale(ax):
    figures.mask_histogram(
        pd.DataFrame(
            {"mask": [0.0, 0.5, 1.0, 1.0], "layers": ["8 channels", "8 channels", "16 channels", "16 channels"]}
        ),
        ax,
    )
    assert ax.get_yscale() == "log" and "0 = weight removed" in ax.get_xlabel()


def test_the_same_figure_gives_the_same_bytes(tmp_path, rows):
    for name in ("a", "b"):
        figures.save(report.budget_figure(rows), tmp_path / name)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_report_collects_rows_once_and_draws_them(tmp_path, rows):
    ablated = results.table(row(variant="tau=10", budget=200, seed=s) for s in range(3))
    for name, part in (("one", rows), ("two", pd.concat([rows, ablated]))):
        results.save(part, tmp_path / "runs" / name / "results.csv")
    report.main(tmp_path / "runs", tmp_path / "out")
    assert len(results.load(tmp_path / "out" / "awm_rows.csv")) == len(rows) + 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["awm_rows.csv", *(f"awm_{n}.{s}" for n in ("budget", "sensitivity") for s in ("png", "svg"))]
    )


def test_no_stored_rows_is_said_in_the_figure():
    figure = report.budget_figure(results.load())
    assert "make figures" in figure.axes[0].texts[0].get_text()
    plt.close(figure)
