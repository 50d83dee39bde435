"""Every defense by name, with the settings that fit what the defender holds.  A new defense is one file and one line here."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from bdlib import selection
from bdlib.data import Dataset
from bdlib.defenses import (
    abl,
    anp,
    awm,
    bnp,
    cbd,
    clp,
    dbd,
    ep,
    fine_pruning,
    fine_tuning,
    ft_sam,
    i_bau,
    linf_pruning,
    mcr,
    nad,
    nc,
    rnp,
)
from bdlib.train import MakeModel, TrainConfig, Watch

TWO_NETWORKS = "clean images, two networks"


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a defender may hold: a network and clean images, or the poisoned training set and the way to a fresh network.

    second_model: gives another network of the same attacker, or of the same honest source.
    """

    model: nn.Module
    second_model: Callable[[], nn.Module]
    clean: Dataset
    train_set: Dataset
    make_model: MakeModel

    @property
    def budget(self) -> int:
        """Number of clean images."""
        return len(self.clean)


@dataclass(frozen=True)
class Method:
    """A defense: what it needs, the settings for what is held, and the call with both; it returns a model in eval()."""

    needs: str  # "clean images", "training set", "both", or TWO_NETWORKS
    config: Callable[[Held], object]
    call: Callable[[Held, object, torch.Generator, Watch], nn.Module]

    def run(self, held: Held, *, generator: torch.Generator, watch: Watch = iter) -> nn.Module:
        """The defended model, in eval(), with the settings that fit.  Raises TypeError if the method returns anything else."""
        model = self.call(held, self.config(held), generator, watch)
        if not isinstance(model, nn.Module):
            raise TypeError(f"a method must return the defended model, got {model!r}")
        return model


def on_clean(method: Callable, config: Callable[[Held], object]) -> Method:
    """A method that changes a copy of the network with clean images."""
    return Method("clean images", config, lambda held, c, g, w: method(held.model, held.clean, c, generator=g, watch=w))


def in_training(method: Callable, config: Callable[[Held], object]) -> Method:
    """A method that trains a fresh network on the poisoned set."""
    return Method(
        "training set", config, lambda held, c, g, w: method(held.make_model, held.train_set, c, generator=g, watch=w)
    )


def _with_ft_sam(config: object, held: Held) -> object:
    return replace(config, tuning=ft_sam.recipe(held.budget))


def _with_as_many_steps(held: Held) -> TrainConfig:
    """Fine-tuning in FT-SAM's batches: the same number of epochs, and so of steps."""
    return replace(fine_tuning.CONFIG, batch_size=ft_sam.recipe(held.budget).batch_size)


METHODS: dict[str, Method] = {
    "fine_tuning": on_clean(fine_tuning.fine_tuning, lambda held: fine_tuning.CONFIG),
    "fine_pruning": on_clean(fine_pruning.fine_pruning, lambda held: fine_pruning.FinePruningConfig()),
    "linf_pruning": on_clean(linf_pruning.linf_pruning, lambda held: linf_pruning.LinfConfig()),
    "nad": on_clean(nad.nad, lambda held: nad.recipe(held.budget)),
    "anp": on_clean(anp.anp, lambda held: anp.recipe(held.budget)),
    "i_bau": on_clean(i_bau.i_bau, lambda held: i_bau.recipe(held.budget)),
    "nc": on_clean(nc.nc, lambda held: nc.recipe(held.budget)),
    "mcr": on_clean(mcr.mcr, lambda held: mcr.recipe(held.budget)),
    "mcr + second network": Method(
        TWO_NETWORKS,
        lambda held: mcr.recipe(held.budget),
        lambda held, config, generator, watch: mcr.mcr(
            held.model, held.clean, config, generator=generator, watch=watch, other=held.second_model()
        ),
    ),
    "clp": Method(
        "clean images",
        lambda held: selection.recipe(held.model),
        lambda held, config, generator, watch: clp.clp(held.model, held.clean, config),
    ),
    "bnp": Method(
        "clean images",
        lambda held: selection.recipe(held.model),
        lambda held, config, generator, watch: bnp.bnp(held.model, held.clean, config, generator=generator),
    ),
    "ep": Method(
        "both",
        lambda held: ep.EpConfig(u=selection.recipe(held.model).u),
        lambda held, config, generator, watch: ep.ep(
            held.model, held.train_set, config, generator=generator, held=held.clean
        ),
    ),
    "awm": on_clean(awm.awm, lambda held: awm.recipe(held.budget, len(held.clean.classes))),
    "rnp": on_clean(rnp.rnp, lambda held: rnp.recipe(held.model, held.budget)),
    "ft_sam": on_clean(ft_sam.ft_sam, lambda held: ft_sam.recipe(held.budget)),
    "fine_pruning + ft_sam": on_clean(
        fine_pruning.fine_pruning, lambda held: _with_ft_sam(fine_pruning.FinePruningConfig(), held)
    ),
    "anp + ft_sam": on_clean(anp.anp, lambda held: _with_ft_sam(anp.recipe(held.budget), held)),
    "abl": in_training(abl.abl, lambda held: abl.recipe(len(held.train_set))),
    "dbd": in_training(dbd.dbd, lambda held: dbd.recipe(len(held.train_set))),
    "cbd": in_training(cbd.cbd, lambda held: cbd.recipe(len(held.train_set))),
}
# The baselines of FT-SAM with as many steps as it makes: what is left between them is the method.
AS_MANY_STEPS: dict[str, Method] = {
    "fine_tuning": on_clean(fine_tuning.fine_tuning, _with_as_many_steps),
    "fine_pruning": on_clean(
        fine_pruning.fine_pruning, lambda held: fine_pruning.FinePruningConfig(tuning=_with_as_many_steps(held))
    ),
}
