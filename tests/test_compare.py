"""All methods under one protocol: what each is given, which rows are read, what a failure leaves, the control."""

import dataclasses
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from bdlib import compare, data, experiment, figures, models, profiles, report, results
from bdlib.defenses import catalog
from bdlib.selection import NoResult
from bdlib.train import TrainConfig
from tests.conftest import same, state
from tests.test_experiment import VALUES


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A lab on 200 drawn images and one epoch."""
    train, test = data.load("signs")
    monkeypatch.setattr(data, "load", lambda name, root: (train.subset(slice(200)), test.subset(slice(100))))
    monkeypatch.setattr(profiles, "training", lambda profile, dataset: TrainConfig(epochs=1, batch_size=50, lr=0.1))
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path))
    return experiment.prepare(experiment.Setting(**VALUES), "cpu")


@pytest.fixture
def counted(monkeypatch):
    """Two methods that change nothing but say that they ran, one for each kind of defender, and one that gives up."""
    ran = []

    def method(name, needs):
        def call(held, config, generator, watch):
            ran.append((name, held, config, torch.rand((), generator=generator).item()))
            if name == "hopeless":
                raise NoResult("no threshold is small enough")
            return held.model

        return catalog.Method(needs, lambda held: TrainConfig(epochs=7), call)

    kinds = {"after": "clean images", "during": "training set", "hopeless": "clean images"}
    monkeypatch.setattr(catalog, "METHODS", {name: method(name, needs) for name, needs in kinds.items()})
    return ran


def test_each_method_gets_what_it_may_hold(lab, counted):
    rows = compare.rows(lab, ["after", "during"], results.load())
    assert [(row["defense"], row["budget"]) for row in rows] == [("none", 20), ("after", 20), ("during", 200)]
    _, held, _, drawn = counted[0]
    assert held.model is lab.model and held.clean is lab.clean and held.train_set is lab.poisoned.train
    assert (
        '"epochs": 7' in rows[1]["config"] and drawn == torch.rand((), generator=lab.setting.generator("after")).item()
    )
    assert results.table(rows).shape == (3, len(results.COLUMNS))


def test_stored_rows_are_read_and_others_are_measured(lab, counted):
    first = results.table(compare.rows(lab, ["after", "during"], results.load()))
    first.loc[first["defense"] == "after", "asr"] = 0.123
    again = compare.rows(lab, ["after", "during"], first[first["defense"] != "during"])
    assert [name for name, *_ in counted] == ["after", "during", "during"]
    assert again[1]["asr"] == 0.123 and results.table(again).shape == first.shape


@pytest.mark.parametrize("name", [name for name in compare.KEY if name not in ("defense",)])
def test_a_row_of_another_setting_is_not_read(lab, counted, name):
    stored = results.table(compare.rows(lab, ["after"], results.load()))
    other = 99 if isinstance(stored[name].iloc[0], (int, float)) else "other"
    stored[name] = other
    compare.rows(lab, ["after"], stored)
    assert len(counted) == 2


def test_rows_survive_a_file(lab, counted, tmp_path):
    """What was saved and loaded again is found: no type changes on the way."""
    results.save(results.table(compare.rows(lab, ["after"], results.load())), tmp_path / "rows.csv")
    compare.rows(lab, ["after"], results.load(tmp_path / "rows.csv"))
    assert len(counted) == 1


def test_a_method_that_gives_up_leaves_the_network(lab, counted, capsys):
    row = compare.rows(lab, ["hopeless"], results.load())[1]
    assert row["measures"] == '{"failed": 1.0}' and row["der"] == 0.5 and row["acc"] == row["acc_before"]
    assert "hopeless: no threshold is small enough" in capsys.readouterr().out


def test_the_stored_rows_are_of_the_methods_as_they_are():
    """Else 06 would measure at its defaults what it claims to read: after a change of a method's settings, `make figures`."""
    train, _ = data.load("signs")
    model = models.build(
        "preact_resnet18:8", train.images, len(train.classes), generator=torch.Generator().manual_seed(0)
    )
    held = catalog.Held(
        model=model, second_model=lambda: model, clean=train.subset(slice(200)), train_set=train, make_model=lambda generator: model
    )  # fmt: skip
    stored = experiment.stored_rows("all_five_rows").query("budget == 200 and defense != 'none'")
    # A new method has none yet: 06 measures it each time, until `make figures` or a run of its own puts its rows there.
    assert len(set(stored["defense"]) & set(catalog.METHODS)) == 17
    for row in stored.itertuples():
        methods = catalog.AS_MANY_STEPS if row.variant == compare.STEPS else catalog.METHODS
        config = dataclasses.asdict(methods[row.defense].config(held))
        assert json.loads(row.config) == json.loads(json.dumps(config)), row.defense


def test_the_baselines_of_ft_sam_make_as_many_steps_in_rows_of_their_own(lab, tmp_path):
    """With 20 images one step an epoch either way, with 200 seven."""
    for count in (20, 200):
        held = dataclasses.replace(compare.held(lab), clean=lab.train.subset(slice(count)))
        sam = catalog.METHODS["ft_sam"].config(held)
        plain = catalog.AS_MANY_STEPS["fine_tuning"].config(held)
        assert (plain.batch_size, plain.epochs) == (sam.batch_size, sam.epochs) and not plain.drop_last
        assert catalog.AS_MANY_STEPS["fine_pruning"].config(held).tuning == plain
    kept = tmp_path / "measured.csv"
    (row,) = compare.rows_with_as_many_steps(lab, ["fine_tuning", "anp"], results.load(), measured=kept)
    assert (row["defense"], row["variant"], json.loads(row["config"])["batch_size"]) == (
        "fine_tuning",
        "as many steps",
        32,
    )
    assert compare.rows_with_as_many_steps(lab, ["fine_tuning"], results.load(kept)) == [row]
    assert figures.method_name(row["defense"], row["variant"]) == "FT, as many steps"


def test_any_other_error_is_not_taken_for_a_result(lab, counted, monkeypatch):
    def broken(held, config, generator, watch):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(catalog.METHODS, "after", catalog.Method("clean images", lambda held: None, broken))
    with pytest.raises(RuntimeError, match="out of memory"):
        compare.rows(lab, ["after"], results.load())


def test_methods_are_named_by_group_or_one_by_one(counted):
    assert compare.chosen("all") == ["after", "during", "hopeless"]
    assert compare.chosen("post-training") == ["after", "hopeless"]
    assert compare.chosen("in training") == ["during"]
    assert compare.chosen("hopeless, after") == ["hopeless", "after"]


@pytest.mark.parametrize("methods", ["before", "after, before", "", "post training"])
def test_an_unknown_method_is_refused(counted, methods):
    with pytest.raises(ValueError, match="or names out of after, during, hopeless, got "):
        compare.chosen(methods)


def test_the_overview_shows_what_a_methods_rule_changed(lab):
    """With 20 images ANP makes fewer steps on smaller batches."""
    table = compare.overview(lab)
    assert table.index.tolist() == list(catalog.METHODS)
    assert table.loc["anp", "settings"] == "steps 400, batch_size 32" and table.loc["anp", "gets"] == "clean images"
    assert table.loc["linf_pruning", "settings"] == "" and table.loc["ep", "gets"] == "both"
    assert table.loc["fine_tuning", "settings"] == "batch_size 256, drop_last False"


def test_extras_are_named_with_commas():
    assert compare.chosen_extras("") == [] and compare.chosen_extras("oracle, control") == ["oracle", "control"]
    with pytest.raises(
        ValueError, match="extras must be out of control, oracle, detection, steps, or empty, got orcale"
    ):
        compare.chosen_extras("control, orcale")


def test_the_undefended_network_is_looked_at_once(lab, counted, monkeypatch):
    looks = []
    monkeypatch.setattr(compare, "detection", lambda lab, watch: looks.append(lab) or {"nc": 2.5})
    plain = compare.rows(lab, [], results.load())
    assert plain[0]["measures"] == "{}" and not looks
    looked = compare.rows(lab, [], results.table(plain), detect=True)
    assert looked[0]["measures"] == '{"nc": 2.5}' and looks == [lab]
    assert compare.rows(lab, [], results.table(looked), detect=True) == looked and len(looks) == 1


def test_the_control_is_the_network_without_the_attack(lab, counted):
    control = compare.control(lab)
    assert same(state(control.model), state(lab.vanilla_model())) and not same(state(control.model), state(lab.model))
    assert torch.equal(control.poisoned.train.images, lab.train.images)
    row = compare.rows(control, ["during"], results.load(), variant=results.CONTROL)[1]
    assert row["variant"] == "no attack" and row["acc_before"] == pytest.approx(control.before["acc"])
    assert counted[0][1].train_set is lab.train


def test_detection_reads_the_three_methods_and_goes_on_where_rnp_gives_up(lab, monkeypatch, capsys):
    size = {label: 20.0 + label for label in range(10)} | {0: 1.0}
    found = compare.nc.NcResult(lab.model, (), compare.nc.anomaly_indices(torch.tensor(list(size.values()))), (0,))
    monkeypatch.setattr(compare.nc, "run", lambda *rest, **named: found)
    monkeypatch.setattr(compare.rnp, "unlearn", lambda *rest, **named: lab.model)
    shares = torch.zeros(10)
    shares[3] = 0.7
    monkeypatch.setattr(compare.rnp, "suspected_label", lambda *rest: (3, shares))
    monkeypatch.setattr(compare.clp, "channel_bounds", lambda *rest: {"a": torch.tensor([1.0, 1.0, 1.0, 5.0])})
    seen = compare.detection(lab)
    assert seen["nc"] == pytest.approx(found.indices.max().item()) and seen["nc"] > 2
    assert (seen["nc_right"], seen["rnp_right"], seen["rnp"]) == (1.0, 0.0, pytest.approx(0.7))
    assert seen["clp"] == pytest.approx(1.5)  # (5 - 2) / 2
    elsewhere = replace(lab, setting=replace(lab.setting, target_label=3))
    assert compare.detection(elsewhere)["rnp_right"] == 1.0
    to_all = replace(lab, setting=replace(lab.setting, attack="badnets_a2a"))
    row = to_all.row(
        "none", "default", lab.model, budget=20, seconds=0, config=None, measures=compare.detection(to_all)
    )
    (suspect,) = report.suspects(results.table([row])).to_dict("records")
    assert suspect["nc"] == pytest.approx(seen["nc"], abs=1e-3) and suspect["rnp"] == 0.7
    assert pd.isna(suspect["nc_right"]) and pd.isna(suspect["rnp_right"])  # no one class is the attacker's

    def give_up(*rest, **named):
        raise NoResult("unlearning reached a clean accuracy of 0.225")

    monkeypatch.setattr(compare.rnp, "unlearn", give_up)
    left = compare.detection(lab)
    assert left == {name: value for name, value in seen.items() if "rnp" not in name}
    assert "rnp says nothing of this network: unlearning reached" in capsys.readouterr().out


def test_a_run_that_was_cut_off_goes_on(lab, counted, monkeypatch, tmp_path):
    measured = tmp_path / "measured.csv"

    def interrupted(held, config, generator, watch):
        raise KeyboardInterrupt

    method = catalog.METHODS["during"]
    monkeypatch.setitem(catalog.METHODS, "during", replace(method, call=interrupted))
    with pytest.raises(KeyboardInterrupt):
        compare.rows(lab, ["after", "during"], results.load(), measured=measured)
    assert results.load(measured)["defense"].tolist() == ["after", "none"] and [name for name, *_ in counted] == [
        "after"
    ]
    monkeypatch.setitem(catalog.METHODS, "during", method)
    rows = compare.rows(lab, ["after", "during"], results.load(), measured=measured)
    assert [name for name, *_ in counted] == ["after", "during"]  # not "after" again
    assert [row["defense"] for row in rows] == ["none", "after", "during"]
    compare.rows(compare.control(lab), ["after"], results.load(), variant=results.CONTROL, measured=measured)
    assert len(results.load(measured)) == 5  # rows of both networks side by side


def test_a_row_of_another_network_is_not_taken_for_one_of_this(lab, counted, capsys):
    """The same seed on another CPU, say."""
    stored = results.table(compare.rows(lab, ["after"], results.load()))
    for name in ("acc_before", "asr_before", "ra_before"):
        other = stored.assign(**{name: stored[name] + 0.01})
        counted.clear()
        assert compare.rows(lab, ["after"], other)[1]["defense"] == "after" and [name for name, *_ in counted] == [
            "after"
        ]
        assert "after, default: the stored row is of another network (ACC" in capsys.readouterr().out


def test_what_a_cut_off_run_measured_is_read_before_a_row_of_another_network(lab, counted, tmp_path):
    measured = tmp_path / "measured.csv"
    stored = results.table(compare.rows(lab, ["after"], results.load(), measured=measured))
    counted.clear()
    compare.rows(lab, ["after"], stored.assign(acc_before=0.0), measured=measured)
    assert not counted


def test_a_row_of_another_network_that_a_run_left_hides_no_stored_one(lab, counted, tmp_path):
    """The notebook run by hand, with other bits, and then by `make lab`."""
    measured = tmp_path / "measured.csv"
    stored = results.table(compare.rows(lab, ["after"], results.load()))
    results.save(stored.assign(acc_before=0.0), measured)
    counted.clear()
    compare.rows(lab, ["after"], stored, measured=measured)
    assert not counted


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda held, config, generator, watch: held.model.requires_grad_(False).linear.weight.zero_(), "changed"),
        (lambda held, config, generator, watch: None, "must return the defended model, got None"),
    ],
)
def test_a_method_that_breaks_its_promise_is_an_error(lab, counted, monkeypatch, call, error):
    def broken(*arguments):
        found = call(*arguments)
        return arguments[0].model if error == "changed" else found

    monkeypatch.setitem(catalog.METHODS, "after", replace(catalog.METHODS["after"], call=broken))
    with pytest.raises((RuntimeError, TypeError), match=error):
        compare.rows(lab, ["after"], results.load())


def test_settings_that_rows_cannot_tell_apart_are_refused(lab):
    with pytest.raises(TypeError, match="settings must be a dataclass, got {'scale': 1.0}"):
        lab.identity({"scale": 1.0})
    assert lab.identity(None)["config"] == "{}"


def test_stored_rows_may_be_none_at_all(lab):
    assert (
        compare.same_run(
            pd.DataFrame(columns=results.COLUMNS), lab, {"defense": "x", "variant": "y", "budget": 1}, None
        )
        is None
    )
