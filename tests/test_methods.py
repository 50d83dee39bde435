"""What every defense of the catalog keeps: the contract, and errors where it cannot work."""

import copy
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bdlib import train
from bdlib.defenses import catalog
from bdlib.defenses.abl import AblConfig
from bdlib.defenses.anp import AnpConfig
from bdlib.defenses.awm import AwmConfig
from bdlib.defenses.cbd import CbdConfig
from bdlib.defenses.dbd import DbdConfig
from bdlib.defenses.ep import EpConfig
from bdlib.defenses.fine_pruning import FinePruningConfig
from bdlib.defenses.ft_sam import FtSamConfig
from bdlib.defenses.i_bau import IBauConfig
from bdlib.defenses.linf_pruning import LinfConfig
from bdlib.defenses.mcr import McrConfig
from bdlib.defenses.mixmatch import MixmatchConfig
from bdlib.defenses.nad import NadConfig
from bdlib.defenses.nc import NcConfig
from bdlib.defenses.rnp import RnpConfig
from bdlib.defenses.simclr import SimclrConfig
from bdlib.explain import SynthesisConfig
from bdlib.selection import OutlierConfig
from bdlib.train import TrainConfig
from tests.conftest import same, state

TUNING = TrainConfig(epochs=2, batch_size=12, lr=0.05)
SAM = FtSamConfig(epochs=2, batch_size=12)
SMALL = {
    "fine_tuning": TUNING,
    "fine_pruning": FinePruningConfig(tuning=TUNING),
    "linf_pruning": LinfConfig(synthesis=SynthesisConfig(steps=3)),
    "nad": NadConfig(training=TUNING, betas=(1.0, 1.0)),
    "anp": AnpConfig(steps=4, batch_size=12),
    "i_bau": IBauConfig(rounds=2, batch_size=12),
    "nc": NcConfig(rounds=2, steps=2, batch_size=12, index=0.01, tuning=TUNING),
    "mcr": McrConfig(t=0.5, end=TUNING, path=TUNING),
    "mcr + second network": McrConfig(t=0.5, end=TUNING, path=TUNING),
    "clp": OutlierConfig(u=None, max_drop=0.5),
    "bnp": OutlierConfig(u=None, max_drop=0.5),
    "ep": EpConfig(u=None, max_drop=0.5, batch_size=12),
    "awm": AwmConfig(outer_epochs=2, inner_epochs=1, batch_size=12),
    "rnp": RnpConfig(batch_size=10, unlearn_lr=0.2, accuracy_floor=0.4, recover_epochs=2, max_drop=0.9),
    "ft_sam": SAM,
    "fine_pruning + ft_sam": FinePruningConfig(tuning=SAM),
    "anp + ft_sam": AnpConfig(steps=4, batch_size=12, tuning=SAM),
    "abl": AblConfig(batch_size=12, isolation_epochs=1, epochs=2, unlearning_epochs=1, share=0.1, lr=0.05),
    "dbd": DbdConfig(
        simclr=SimclrConfig(epochs=2, batch_size=12, lr=0.05),
        warmup_epochs=2,
        mixmatch=MixmatchConfig(epochs=2, steps=3, batch_size=6),
    ),
    "cbd": CbdConfig(batch_size=12, biased_epochs=1, epochs=2, lr=0.05, biased_lr=0.05),
}
EVERY = pytest.mark.parametrize("name", list(catalog.METHODS))


def small_network() -> nn.Module:
    """Feature maps of two sizes, batch norm behind a convolution and one apart, dropout, a linear layer at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.fixture
def trained(tiny):
    """A network that tells the tiny images apart, in training mode with gradients on: a method must leave it so."""
    model, config = small_network(), TrainConfig(epochs=8, batch_size=12, lr=0.1)
    train.fit(model, tiny, config, generator=torch.Generator().manual_seed(0)).zero_grad()
    return model.train()


def held(model: nn.Module, split) -> catalog.Held:
    def fresh(generator: torch.Generator) -> nn.Module:
        model = small_network()
        with torch.no_grad():
            model[0].weight += 0.01 * torch.randn(model[0].weight.shape, generator=generator)
        return model

    second = fresh(torch.Generator().manual_seed(8))
    return catalog.Held(model=model, second_model=lambda: second, clean=split, train_set=split, make_model=fresh)


def defended(name: str, model: nn.Module, split, seed: int = 0) -> nn.Module:
    method = catalog.METHODS[name]
    return method.call(held(model, split), SMALL[name], torch.Generator().manual_seed(seed), iter)


def test_every_method_is_tried():
    assert list(SMALL) == list(catalog.METHODS), "SMALL must name every method, in the catalog's order"


@EVERY
def test_input_and_global_random_state_are_as_before(name, trained, tiny, untouched):
    before, flags = state(trained), [p.requires_grad for p in trained.parameters()]
    images, labels = tiny.images.clone(), tiny.labels.clone()
    result = defended(name, trained, tiny)
    assert same(before, state(trained)) and trained.training
    assert [p.requires_grad for p in trained.parameters()] == flags and all(
        p.grad is None for p in trained.parameters()
    )
    assert torch.equal(images, tiny.images) and torch.equal(labels, tiny.labels)
    assert not any(part.training for part in result.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in trained.modules())
    own = {p.data_ptr() for p in result.parameters()}
    assert not own & {p.data_ptr() for p in trained.parameters()}
    logits = result(tiny.floats())
    assert logits.shape == (36, 3) and torch.isfinite(logits).all()


@EVERY
def test_same_generator_same_weights(name, trained, tiny):
    once, again = (state(defended(name, trained, tiny, seed=5)) for _ in range(2))
    assert same(once, again)


DRAWS = [name for name in catalog.METHODS if name not in ("clp", "bnp", "ep", "rnp", "linf_pruning")]


@pytest.mark.parametrize("name", DRAWS)
def test_another_generator_other_weights(name, trained, tiny):
    one, other = (state(defended(name, trained, tiny, seed=seed)) for seed in (5, 6))
    assert not same(one, other)


@EVERY
def test_no_images_is_an_error(name, trained, tiny):
    with pytest.raises(ValueError, match="image"):
        defended(name, trained, tiny.subset(torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize("name", ["anp", "clp", "bnp", "ep", "rnp", "anp + ft_sam"])
def test_a_network_without_batch_norm_is_an_error(name, tiny):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="batch norm"):
        defended(name, model, tiny)


@pytest.mark.parametrize("name", ["fine_tuning", "nad", "i_bau", "mcr", "ft_sam", "abl", "dbd", "cbd", "anp", "awm"])
def test_a_loss_that_is_no_number_is_an_error(name, trained, tiny):
    broken = copy.deepcopy(trained)
    broken[9].weight.data[0, 0] = float("nan")
    source = held(broken, tiny)
    source = replace(source, make_model=lambda generator: copy.deepcopy(broken))
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        catalog.METHODS[name].call(source, SMALL[name], torch.Generator().manual_seed(0), iter)


@EVERY
def test_recipes_fit_any_budget(name, trained, tiny):
    """The settings for three images (one-shot), for all, and for a network of wide layers are made and are of one kind."""
    for count in (3, 36):
        config = catalog.METHODS[name].config(held(trained, tiny.subset(torch.arange(count))))
        assert type(config) is type(SMALL[name])


def test_the_example_of_a_new_defense_keeps_the_contract(trained, tiny, untouched, monkeypatch):
    """CONTRIBUTING.md: its file of about twenty lines and its one line make a method of the catalog."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    file, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = types.ModuleType("recalibration")
    monkeypatch.setitem(sys.modules, "recalibration", example)  # where dataclass looks its annotations up
    exec(file, example.__dict__)
    known = vars(catalog) | vars(example)
    methods = eval("{" + line + "}", known)
    monkeypatch.setitem(catalog.METHODS, "recalibration", methods["recalibration"])
    monkeypatch.setitem(SMALL, "recalibration", example.RecalibrationConfig(batch_size=36))
    before = state(trained)
    result = defended("recalibration", trained, tiny)
    assert same(before, state(trained)) and trained.training and not result.training
    with torch.no_grad():
        seen = result[0](tiny.floats())
    assert torch.allclose(result[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert not torch.allclose(trained[1].running_mean, result[1].running_mean, atol=1e-3)
    test_no_images_is_an_error("recalibration", trained, tiny)
    test_recipes_fit_any_budget("recalibration", trained, tiny)
