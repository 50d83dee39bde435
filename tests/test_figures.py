"""Figures: what is on the axes, the same color for the same method, the same bytes for the same figure."""

import json
from pathlib import Path

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
        figures.save(report.budget_figure(rows, report.AWM), tmp_path / name)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_report_collects_rows_once_and_draws_them(tmp_path, rows):
    ablated = results.table(row(variant="tau=10", budget=200, seed=s) for s in range(3))
    for name, part in (("one", rows), ("two", pd.concat([rows, ablated]))):
        results.save(part, tmp_path / "runs" / name / "results.csv")
    gallery = tmp_path / "runs" / "gallery" / "00_backdoors" / "run" / "attacks.png"
    gallery.parent.mkdir(parents=True)
    gallery.write_bytes(b"drawn by the notebook")
    report.main(tmp_path / "runs", tmp_path / "out")
    assert len(results.load(tmp_path / "out" / "awm_rows.csv")) == len(rows) + 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [
            "attacks.png",
            "awm_rows.csv",
            "ledger.csv",
            *(f"awm_{n}.{s}" for n in ("budget", "sensitivity", "ladder") for s in ("png", "svg")),
        ]
    )


def test_report_leaves_the_primers_rows_out(tmp_path):
    results.save(results.table([row(notebook="00_backdoors")]), tmp_path / "runs" / "results.csv")
    report.main(tmp_path / "runs", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_report_keeps_the_rows_of_all_attacks_by_dataset(tmp_path):
    rows = [
        row(notebook="00_backdoors", dataset=dataset, attack=attack, defense=defense, variant="default", poison_rate=rate)
        for dataset, attack, rate in (
            ("cifar10", "badnets", 0.1), ("cifar10", "blended", 0.1), ("cifar10", "sig", 0.05), ("signs", "blended", 0.1),
        )
        for defense in ("none", "fine_tuning")
    ]  # fmt: skip
    results.save(results.table(rows), tmp_path / "runs" / "results.csv")
    report.main(tmp_path / "runs", tmp_path / "out")
    names = [f"attacks_cifar10.{suffix}" for suffix in ("csv", "png", "svg")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "ledger.csv"]
    assert len(results.load(tmp_path / "out" / "attacks_cifar10.csv")) == 6


def test_a_batch_has_a_figure_for_each_network(tmp_path):
    rows = [
        row(attack="blended:/x/kitty.png", arch=arch, poison_rate=rate) for arch in ("a:8", "b") for rate in (0.01, 0.1)
    ]
    names = report.draw_batch(results.table(rows), tmp_path)
    assert names == [f"signs_blended-x-kitty.png_{arch}_{rate}.png" for arch in ("a-8", "b") for rate in (0.01, 0.1)]
    pictures = [path.with_suffix(suffix).name for path in map(Path, names) for suffix in (".png", ".svg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures)
    figure = report.methods_figure(results.table(rows[:1]))
    assert figure.axes[0].get_title().endswith("1% poisoned")
    plt.close(figure)
    assert report.draw_batch(results.table(rows[:1]), tmp_path) == ["signs_blended-x-kitty.png_a-8.png"]


def test_a_batch_of_pictures_in_a_deep_folder_has_its_figures(tmp_path):
    rows = [row(dataset="folder:/" + 214 * "d", attack=f"blended:/{210 * 'p'}{k}.png") for k in range(2)]
    names = report.draw_batch(results.table(rows), tmp_path)
    assert len(set(names)) == 2 and all((tmp_path / name).exists() for name in names)


def test_planted_attacks_stand_by_strength_with_an_unusual_rate():
    rows = [
        row(attack=attack, defense=defense, asr=asr, poison_rate=rate)
        for attack, asr, rate in (("badnets", 0.8, 0.1), ("sig", 0.9, 0.05), ("wanet", 0.1, 0.1))
        for defense in ("none", "fine_tuning")
    ]
    figure = report.planted_figure(results.table(rows))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["sig (5%)", "badnets", "wanet"]
    title = figure.axes[0].get_title()
    assert "3 attacks" in title and title.endswith("poison rate 10% where not marked")
    plt.close(figure)
    empty = report.planted_figure(results.load())
    assert "make figures" in empty.axes[0].texts[0].get_text()
    plt.close(empty)


def test_the_title_counts_the_seeds_of_every_line(rows):
    assert report.setting_title(rows).endswith("· 3 seeds")
    fewer = results.table(row(variant="tau=10", budget=200, seed=s) for s in range(2))
    assert report.setting_title(pd.concat([rows, fewer])).endswith("· 2 to 3 seeds")
    assert report.setting_title(fewer[fewer["seed"] == 0]).endswith("· 1 seed")


def test_a_curve_shows_the_attack_that_most_rows_have(rows):
    other = results.table(row(attack="badnets", defense="awm", variant="soft", budget=b, seed=0) for b in (10, 200))
    figure = report.budget_figure(pd.concat([other, rows]), report.AWM)
    assert "blended" in figure.get_suptitle() and "badnets" not in figure.get_suptitle()
    plt.close(figure)


def test_no_stored_rows_is_said_in_the_figure():
    figure = report.budget_figure(results.load(), report.AWM)
    assert "make figures" in figure.axes[0].texts[0].get_text()
    plt.close(figure)


def test_every_figure_of_every_paper_says_it_has_no_rows_where_there_are_none():
    for figures_of_paper in report.FIGURES.values():
        for draw in figures_of_paper.values():
            figure = draw(results.load())
            assert "make figures" in figure.axes[0].texts[0].get_text()
            plt.close(figure)


def test_the_pruning_curve_has_a_line_for_each_order():
    names = [f"{order}, {count} channels" for order in ("linf", "random") for count in (0, 4)]
    rows = [row(defense="linf_pruning", variant=name, asr=0.9 - k / 10) for k, name in enumerate([*names, "linf"])]
    figure = report.pruning_figure(results.table(rows))
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert [line.get_ydata().tolist() for line in lines] == [pytest.approx([90, 80]), pytest.approx([70, 60])]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 4], [0, 4]]
    plt.close(figure)


def test_effects_are_drawn_for_each_attack_on_the_three_norms():
    effect = lambda attack, values: row(
        attack=attack, measures=json.dumps(dict(zip(("d_l1", "d_l2", "d_linf"), values, strict=True)))
    )
    figure = report.effects_figure(results.table([effect("badnets", (1, 2, 3)), effect("blended", (3, 2, 1)), row()]))
    assert [ax.get_title().split(" · ")[1] for ax in figure.axes] == ["badnets", "blended"]
    assert [point.get_offsets()[0][1] for point in figure.axes[0].collections] == [1, 2, 3]
    plt.close(figure)


def test_variants_are_compared_with_the_default_at_their_budget():
    rows = [
        row(variant="soft", budget=200, acc=0.9),
        row(variant="soft", budget=50, acc=0.1),
        row(variant="tau=10", budget=200),
    ]
    figure = report.variants_figure(results.table(rows), "awm", "soft")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["default", "tau=10"]
    assert 10.0 not in {x for line in figure.axes[0].collections for x, _ in line.get_offsets()}
    plt.close(figure)


def test_the_threshold_sweep_marks_the_choice_and_the_oracle(ax):
    table = pd.DataFrame({"threshold": [0.0, 0.1], "acc": [0.9, 0.8], "asr": [1.0, 0.0], "held": [1.0, 0.9]})
    figures.threshold_sweep(table, 0.0, 0.1, ax)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["ASR, test"].get_ydata().tolist() == [100, 0]
    assert lines["chosen without the trigger"].get_xdata()[0] == 0.0 and lines["oracle"].get_xdata()[0] == 0.1


def test_phases_are_named_where_they_begin(ax):
    table = pd.DataFrame(
        {"phase": ["1 a", "1 a", "2 b"], "step": ["x", "y", "z"], "acc": [1, 0.5, 0.7], "asr": [1, 1, 0.2]}
    )
    figures.phases(table, ax)
    assert [(text.get_text(), text.get_position()[0]) for text in ax.texts] == [("1 a", -0.4), ("2 b", 1.6)]


def test_a_cam_grid_has_a_row_for_each_kind_and_a_block_for_each_network():
    images = {kind: torch.rand(2, 3, 8, 8) for kind in ("clean", "triggered")}
    maps = {network: {kind: torch.rand(2, 8, 8) for kind in images} for network in ("vanilla", "backdoored")}
    figure = figures.cam_grid(images, maps)
    assert len(figure.axes) == 8 and all(len(ax.images) == 2 for ax in figure.axes)
    assert [ax.get_title(loc="left") for ax in figure.axes[:4]] == ["vanilla", "", "backdoored", ""]
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == ["clean", "triggered"]
    plt.close(figure)


def test_a_rate_curve_has_a_line_for_plain_training_and_one_for_cbd():
    rows = [
        row(defense=d, variant="default", poison_rate=r, asr=asr, acc=0.9)
        for r in (0.01, 0.1)
        for d, asr in (("none", 0.9), ("cbd", r))
    ]
    other_attack = row(defense="cbd", variant="default", poison_rate=0.1, attack="badnets", asr=0.7)
    figure = report.rates_figure(results.table([*rows, other_attack]))
    lines = {line.get_color(): line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2}
    assert lines[figures.COLORS["CBD"]].get_ydata().tolist() == pytest.approx([1, 10])
    assert lines[figures.COLORS["no defense"]].get_ydata().tolist() == pytest.approx([90, 90])
    assert figure.axes[0].get_xlabel() == "poison rate"
    plt.close(figure)


def test_attacks_are_compared_at_one_poison_rate():
    rows = [
        row(defense=d, variant="default", attack=a, poison_rate=0.1)
        for a in ("signal", "badnets")
        for d in ("none", "cbd")
    ]
    figure = report.attacks_figure(results.table([*rows, row(defense="cbd", variant="default", poison_rate=0.5)]))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["signal, no defense", "signal, CBD", "badnets, no defense", "badnets, CBD"]
    plt.close(figure)


def test_variants_are_compared_with_the_default_of_their_own_attack():
    rows = [
        row(defense="cbd", variant="default", attack="badnets", acc=0.1),
        row(defense="cbd", variant="default", acc=0.9),
        row(defense="cbd", variant="neither", acc=0.8),
    ]
    figure = report.variants_figure(results.table(rows), "cbd")
    assert 10.0 not in {x for points in figure.axes[0].collections for x, _ in points.get_offsets()}
    plt.close(figure)


def test_epochs_are_means_for_each_kind_of_image(ax):
    table = pd.DataFrame(
        {"epoch": [1, 1, 2, 2, 1, 2], "images": ["clean"] * 4 + ["poisoned"] * 2, "value": [1.0, 3, 4, 6, 0.5, 0.25]}
    )
    assert figures.epochs(table, ax, "loss", "images") is ax
    lines = [line.get_ydata().tolist() for line in ax.get_lines() if len(line.get_xdata())]
    assert lines == [[2, 5], [0.5, 0.25]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_the_gallery_has_a_row_for_each_attack_with_its_facts():
    facts = {"psnr": 21.26, "ssim": 0.5, "needs": "nothing", "labels": "kept"}
    pictures = {"clean": torch.zeros(2, 3, 4, 4), "triggered": torch.ones(2, 3, 4, 4)}
    figure = figures.gallery([("first", pictures, facts), ("second", pictures, facts | {"needs": "generator"})])
    axes = figure.axes
    assert len(axes) == 4 and [ax.get_title(loc="left") for ax in axes] == ["clean", "triggered", "", ""]
    assert axes[3].get_images()[0].get_array()[2, 2].tolist() == [1, 1, 1]
    words = [text.get_text() for ax in axes for text in ax.texts]
    assert (
        words[0] == "first"
        and words[2] == "second"
        and "PSNR 21.3 dB, SSIM 0.50" in words[1]
        and "generator" in words[3]
    )
    plt.close(figure)


def test_a_heatmap_says_percent_with_daggers_and_a_dash_where_nothing_is_known(ax):
    table = pd.DataFrame({"badnets": [0.05, 0.5], "sig": [0.995, None]}, index=["AWM", "FT"])
    marked = pd.DataFrame({"badnets": [False, True], "sig": [False, False]}, index=["AWM", "FT"])
    assert figures.heatmap(table, marked, ax, "ASR", good_is_high=False) is ax
    assert [text.get_text() for text in ax.texts] == ["5", "100", "50†", "–"] and ax.get_title() == "ASR (%)"
    assert ax.texts[-1].get_position() == (1.5, 1.5)  # the cell of FT and SIG
    cells = ax.collections[0].get_facecolors()[:, :3].sum(1)
    assert cells[1] < cells[2] < cells[0]  # the more success, the darker


def test_a_heatmap_of_accuracy_is_dark_where_it_is_low(ax):
    table = pd.DataFrame({"badnets": [0.1, 0.9]}, index=["AWM", "FT"])
    figures.heatmap(table, table > 1, ax, "ACC", good_is_high=True)
    low, high = ax.collections[0].get_facecolors()[:, :3].sum(1)
    assert low < high


@pytest.fixture
def compared():
    """Rows of 06: two methods after training and one in training, two attacks and the control, two budgets, two seeds."""
    rows = []
    for attack, variant in (("blended", results.CONTROL), ("blended", "default"), ("badnets", "default")):
        for seed in range(2):
            runs = (("none", 200), ("fine_tuning", 200), ("anp", 200), ("anp", 10), ("abl", 5000), ("none", 10))
            for k, (defense, budget) in enumerate(runs):
                looks = {"nc": 3.0 - (variant != "default"), "nc_right": 1, "rnp": 0.5, "rnp_right": 0, "clp": 1.0}
                rows.append(
                    row(notebook="06_all_five", attack=attack, variant=variant, seed=seed, defense=defense, budget=budget,
                        asr=0.2 * k + 0.1 * seed, acc=0.9, der=0.8, seconds=k + 1, device="cpu x 1",
                        measures=json.dumps(looks) if k == 0 else "{}")
                )  # fmt: skip
    rows.append(rows[-2] | {"defense": "anp", "variant": "oracle threshold", "budget": 200, "asr": 0.77})
    return results.table(rows)


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        (("none", "default"), "no defense"),
        (("fine_pruning + ft_sam", "default"), "FP + FT-SAM"),
        (("mcr + second network", "default"), "MCR + 2nd network"),
        (("i_bau", "default"), "I-BAU"),
        (("awm", "soft"), "AWM"),
        (("awm", "default"), "AWM"),
        (("awm", "thresholded"), "AWM, mask thresholded"),
        (("rnp", "oracle threshold"), "RNP, oracle threshold"),
        (("linf_pruning", "random"), "l-inf pruning, random"),
    ],
)
def test_a_method_is_called_what_the_field_calls_it(pair, name):
    assert figures.method_name(*pair) == name


def test_the_heatmap_has_every_method_and_the_control_last(compared):
    figure = report.FIGURES["all_five"]["heatmap"](compared)
    asr = figure.axes[1]
    assert [label.get_text() for label in asr.get_xticklabels()] == ["blended", "badnets", "no attack"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["no defense", "FT", "ANP", "ABL"]
    assert [text.get_text() for text in asr.texts[:9:3]] == [
        "5",
        "25",
        "45",
    ]  # means over the seeds; budget 10 left out
    assert "200 clean images" in figure.get_suptitle() and "2 seeds" in figure.get_suptitle()
    plt.close(figure)


def test_the_heatmap_marks_a_method_that_gave_up_in_one_run_and_what_was_not_run(compared):
    one = (compared["defense"] == "anp") & (compared["attack"] == "badnets") & (compared["seed"] == 1)
    gave_up = compared.assign(measures=compared["measures"].mask(one, json.dumps({"failed": 1.0})))
    figure = report.heatmap_figure(gave_up[(gave_up["defense"] != "abl") | (gave_up["attack"] != "badnets")])
    asr = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in figure.axes[1].texts}
    badnets = [asr[row + 0.5, 1.5] for row in range(4)]  # no defense, FT, ANP, ABL
    assert badnets == ["5", "25", "45†", "–"] and sum("†" in text for text in asr.values()) == 1
    assert figure.get_supxlabel().startswith("† the method gave up") and figure.get_supxlabel().endswith("– not run")
    plt.close(figure)
    figure = report.heatmap_figure(compared)
    assert figure.get_supxlabel() == ""  # nothing to explain
    plt.close(figure)


def test_budget_curves_are_of_methods_with_more_than_one_budget(compared):
    figure = report.FIGURES["all_five"]["budget"](compared)
    assert [ax.get_title() for ax in figure.axes] == ["ANP"]
    plt.close(figure)


def test_removals_count_networks_and_star_the_means_within_the_claims_bounds():
    def of(method, attack, asr, lost=0.0, before=0.8):
        same = {"method": method, "dataset": "signs", "attack": attack, "asr_before": before, "drop": lost}
        return [same | {"asr": left, "seed": seed} for seed, left in enumerate(asr)]

    runs = of("A", "badnets", (0.0, 0.1, 0.9)) + of("A", "lf", (0.0, 0.0, 0.5)) + of("B", "lf", (0.1, 0.2, 0.19), 0.11)
    table = report.removals(pd.DataFrame(runs + of("B", "badnets", (0.2, 0.2), 0.09)))
    assert table[("signs", "badnets")].to_dict() == {"A": "2 of 3", "B": "2 of 2 *"}
    assert table[("signs", "lf")].to_dict() == {"A": "2 of 3 *", "B": "0 of 3"}  # B costs too much
    assert table[("all", "verdict")].to_dict() == {"A": "removes at least one", "B": "removes at least one"}
    hardly_planted = pd.DataFrame(runs + of("B", "wanet", (0.0,), before=0.79))
    assert report.removals(hardly_planted).equals(report.removals(pd.DataFrame(runs)))
    assert report.removals(hardly_planted)[("all", "verdict")]["B"] == "removes none"


def test_draws_are_the_runs_that_both_sets_have_each_a_point_at_its_asr(compared):
    again = compared[(compared["seed"] == 0) & (compared["defense"] != "fine_tuning")]
    figure = report.draws_figure(
        report.common_runs({"one CPU": compared, "another CPU": again.assign(asr=again["asr"] + 0.05)})
    )
    # There is nothing to remove from the control.
    assert [ax.get_title() for ax in figure.axes] == ["blended", "badnets"]
    points = [float(x) for drawn in figure.axes[0].collections for x, _ in drawn.get_offsets()]
    # No defense, ANP and ABL, each once a set; FT, the second seed and the other budget are in one set alone or not shown.
    assert points == pytest.approx([0, 5, 40, 45, 80, 85])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["no defense", "ANP", "ABL"]
    legends = [ax.get_legend() for ax in figure.axes]
    assert legends[0] is None and [text.get_text() for text in legends[1].get_texts()] == ["one CPU", "another CPU"]
    plt.close(figure)


def test_draws_of_a_run_that_two_of_three_sets_have_are_shown(compared):
    sets = {"one": compared, "another": compared[compared["seed"] == 0], "none": compared[:0]}
    runs = report.common_runs(sets)
    assert set(runs["draw"]) == {"one", "another"} and set(runs["seed"]) == {0}


def test_each_panel_of_draws_has_the_same_colors_and_the_legend_all_of_them(compared):
    one = compared[compared["attack"] == "blended"]
    figure = report.draws_figure(report.common_runs({"one": one, "another": compared, "a third": compared}))
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["one", "another", "a third"]
    colors = [
        {tuple(drawn.get_facecolors()[0]) for drawn in ax.collections if len(drawn.get_offsets())} for ax in figure.axes
    ]
    assert len(colors[0]) == 3 and len(colors[1]) == 2 and colors[1] < colors[0]
    plt.close(figure)


def test_draws_without_a_run_in_common_say_so(compared):
    figure = report.draws_figure(report.common_runs({"one CPU": compared, "another CPU": compared[:0]}))
    assert "no stored rows" in figure.axes[0].texts[0].get_text()
    plt.close(figure)


def test_costs_show_every_run(compared):
    figure = report.FIGURES["all_five"]["costs"](compared)
    points = sum(len(drawn.get_offsets()) for drawn in figure.axes[0].collections)
    assert points == 3 * 2 * 3 and figure.axes[0].get_xscale() == "log" and figure.axes[0].get_xlabel() == "seconds"
    plt.close(figure)


def test_the_roc_tells_backdoored_from_clean_networks(compared):
    networks = report.suspects(compared)
    assert networks["backdoored"].tolist() == [0, 0, 1, 1, 1, 1]
    figure = report.FIGURES["all_five"]["detection"](compared)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == [
        "NC, anomaly index, AUROC 1.00",
        "RNP, share of one class, AUROC 0.50",
        "CLP, largest outlier, AUROC 0.50",
    ]
    assert figure.axes[0].get_title() == "4 backdoored and 2 clean networks"
    plt.close(figure)
    gave_up = networks.index[-1]
    measures = {
        name: value for name, value in json.loads(compared.loc[gave_up, "measures"]).items() if "rnp" not in name
    }
    compared.loc[gave_up, "measures"] = json.dumps(measures)
    figure = report.FIGURES["all_five"]["detection"](compared)
    assert "RNP, share of one class, AUROC 0.50 (5 networks)" in [
        text.get_text() for text in figure.axes[0].get_legend().get_texts()
    ]
    plt.close(figure)


def test_the_ledger_takes_each_method_as_it_is_by_default():
    shown = [
        ("awm", "soft"),
        ("awm", "thresholded"),
        ("rnp", "oracle threshold"),
        ("rnp", "default"),
        ("awm", "default"),
    ]
    rows = results.table([row(defense=d, variant=v, asr=k / 10) for k, (d, v) in enumerate(shown)])
    assert report.usual(rows)[["method", "asr"]].values.tolist() == [["AWM", 0.0], ["RNP", 0.3]]


def test_the_ledger_takes_a_run_of_two_notebooks_once_and_its_seeds_together():
    once = {"defense": "awm", "variant": "soft", "budget": 500}
    own = [row(**once, notebook="02_awm", seed=seed, asr=seed / 10) for seed in range(3)]
    every = row(**once | {"variant": "default"}, notebook="06_all_five", seed=0, asr=0.9)
    found = report.usual(results.table([every, *own]))
    assert results.over_seeds(found)[["asr", "seeds"]].values.tolist() == [[pytest.approx(0.1), 3]]


def test_the_ledger_is_written_from_the_rows_beside_it(tmp_path):
    report.save_ledger(tmp_path)
    assert not list(tmp_path.iterdir())
    rows = [
        row(
            dataset="cifar10",
            attack="badnets",
            defense="anp",
            variant="default",
            acc=0.9,
            acc_before=0.95,
            asr=0.01,
            seed=0,
        )
    ]
    results.save(results.table(rows), tmp_path / "rows.csv")
    for _ in range(2):
        report.save_ledger(tmp_path)
    found = pd.read_csv(tmp_path / "ledger.csv")
    assert set(found["defense"]) == {"anp"} and len(found) == (results.published()["defense"] == "anp").sum()
    assert (found["verdict"] != "not available").any() and found["source"].notna().all()


def test_the_ladder_goes_from_anp_to_awm_at_one_budget():
    pairs = [
        ("awm", "soft"),
        ("awm", "gamma=0"),
        ("anp", "soft masks"),
        ("anp", "weight masks"),
        ("anp", "ANP"),
        ("awm", "tau=10"),
    ]
    rows = [row(defense=d, variant=v, budget=200) for d, v in pairs] + [row(defense="awm", variant="soft", budget=10)]
    figure = report.ladder_figure(results.table(rows))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(report.LADDER.values())
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 10  # ACC and ASR of five steps
    plt.close(figure)


def test_the_ledgers_figure_has_a_point_for_each_judged_line_at_its_asr():
    verdicts = ["reproduced", "neither", "not planted", "neither", "gave up"]
    lines = {"ASR, printed": [5.0, 2, 3, 90, 1], "ASR, ours": [7.0, 60, 4, 10, 99], "verdict": verdicts}
    figure = report.ledger_figure(pd.DataFrame(lines))
    (ax,) = figure.axes
    band, drawn = ax.collections
    assert drawn.get_offsets().tolist() == [[5, 7], [2, 60], [90, 10]]
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= {"reproduced", "neither"}
    assert band.get_datalim(ax.transData).get_points().tolist() == [[0, -5], [100, 105]]  # five points on either side
    plt.close(figure)


def test_names_stand_over_their_images(ax):
    figures.image_strip(torch.zeros(3, 3, 8, 8), ax, "three", ["a b", "Right-of-way at the next intersection"])
    # The middle of images of 8 with a gap of 1 on each side.
    assert [text.get_position()[0] for text in ax.texts] == [5, 15]
    assert ax.texts[0].get_text() == "a b" and ax.texts[1].get_text() == "Right-of-way\nat the next …"
