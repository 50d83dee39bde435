"""The oracle: the best threshold by the test images, over the very thresholds that the method chooses from."""

from dataclasses import replace

import pytest
import torch

from bdlib import compare, metrics, oracle, results
from bdlib.defenses import anp, bnp, catalog, clp
from bdlib.masks import prune
from bdlib.selection import NoResult, OutlierConfig
from tests.conftest import same, state
from tests.test_compare import lab  # noqa: F401 - a fixture


@pytest.fixture
def few_steps(monkeypatch):
    """Each method as it is, but for a few steps."""
    configs = {
        "anp": anp.AnpConfig(steps=3, batch_size=10, mask_lr=20),
        "clp": OutlierConfig(u=None),
        "bnp": OutlierConfig(u=None),
    }
    for name, config in configs.items():
        method = catalog.METHODS[name]
        monkeypatch.setitem(catalog.METHODS, name, catalog.Method(method.needs, lambda held, c=config: c, method.call))
    return configs


def test_the_oracle_takes_the_highest_der(lab, monkeypatch):  # noqa: F811
    best, other = lab.fresh_model(torch.Generator().manual_seed(1)).eval(), lab.model
    der = {id(best): 0.9, id(other): 0.5}
    monkeypatch.setitem(oracle.SWEEPS, "anp", lambda *rest: iter([(0.0, other), (0.3, best), (0.6, other)]))
    monkeypatch.setattr(metrics, "der", lambda before, after: after["der"])
    measure = lab.measure
    monkeypatch.setattr(type(lab), "measure", lambda self, model: measure(model) | {"der": der[id(model)]})
    (row,) = oracle.rows(lab, ["fine_tuning", "anp"], results.load())
    assert row["defense"] == "anp" and row["variant"] == "oracle threshold" and row["der"] == 0.9
    assert row["measures"] == '{"threshold": 0.3}'


@pytest.mark.parametrize("name", ["anp", "clp", "bnp"])
def test_the_methods_own_choice_is_among_the_oracles(lab, few_steps, name):  # noqa: F811
    """Same masks or values as the method itself: the network that it returns is one of those the oracle looks at."""
    source = compare.held(lab)
    generators = [lab.setting.generator(name) for _ in range(2)]
    own = catalog.METHODS[name].run(source, generator=generators[0])
    models = [model for _, model in oracle.SWEEPS[name](source, few_steps[name], generators[1], iter)]
    assert any(same(state(own), state(model)) for model in models) or same(state(own), state(lab.model))
    assert any(not same(state(model), state(lab.model)) for model in models)


def test_the_sweep_is_over_the_configs_thresholds(lab, few_steps):  # noqa: F811
    source, config = compare.held(lab), few_steps["anp"]
    found = dict(oracle.SWEEPS["anp"](source, config, lab.setting.generator("anp"), iter))
    assert tuple(found) == config.thresholds
    masks = anp.run(source.model, source.clean, config, generator=lab.setting.generator("anp")).masks
    assert same(state(found[0.5]), state(prune(lab.model, masks, 0.5)))
    values = clp.channel_bounds(lab.model, lab.clean.floats()[:1])
    assert tuple(dict(oracle.outlier_models(lab.model, values, few_steps["clp"]))) == few_steps["clp"].candidates


def test_bnp_is_measured_on_the_images_that_bnp_measures(lab, few_steps, monkeypatch):  # noqa: F811
    seen = []
    measured = bnp.divergences
    monkeypatch.setattr(bnp, "divergences", lambda model, images: seen.append(images) or measured(model, images))
    source, config = compare.held(replace(lab, clean=lab.clean_subset(100))), few_steps["bnp"]
    bnp.bnp(source.model, source.clean, config, generator=lab.setting.generator("bnp"))
    oracle.bnp_models(source, config, lab.setting.generator("bnp"), iter)
    assert torch.equal(*seen) and len(seen[0]) < len(source.clean)


def test_a_stored_row_is_read_and_a_method_that_gives_up_has_none(lab, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(oracle.SWEEPS, "anp", lambda *rest: iter([(0.0, lab.model)]))
    first = oracle.rows(lab, ["anp"], results.load())

    def hopeless(*rest):
        raise NoResult("accuracy never fell")

    monkeypatch.setitem(oracle.SWEEPS, "anp", hopeless)
    assert oracle.rows(lab, ["anp"], results.table(first)) == first
    assert oracle.rows(lab, ["anp"], results.load()) == []
    assert "anp: accuracy never fell" in capsys.readouterr().out
