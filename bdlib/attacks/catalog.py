"""Every attack by name: what it puts on images, which images, what it needs.  A new one is a line here and its name in names.py."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bdlib import triggers
from bdlib.attacks import input_aware, label_consistent, lira, pattern, ssba, wanet
from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.triggers.partial import blended_in_part, one_of_four

POOLS = ("all", "non_target", "target")
VERSION = 4  # part of every stored trigger's key: raise it when a change in bdlib/attacks alters what is learned


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How an attack differs from a fixed trigger on random images.

    pool: which training images it poisons unless told otherwise; "target" = images of the target class, whose labels stay true.
    covers: images that carry it and keep their label, for each poisoned one.  build: attacker -> what makes its triggers, before
    training; fit: trains that; stamps: what it puts on images.  trains_model: the attacker trains the classifier too.
    """

    # What the attacker must have: "nothing", "clean network", "generator" or "control of training".
    needs: str = "nothing"
    pool: str = "all"
    covers: float = 0.0
    build: Callable[[Attacker], nn.Module] | None = None
    fit: Callable[[nn.Module, Attacker], None] | None = None
    stamps: Callable[[nn.Module], Stamps] = lambda module: Stamps(test=module)
    trains_model: bool = False


# Attacks that are more than one trigger of bdlib.triggers on random images.  Sources stand in their modules.
KINDS: dict[str, Kind] = {
    # SIG as its authors and BackdoorBench have it: the wave on images of the target class, labels unchanged.  The poison rate is a
    # share of the whole split; DIFFERS: RNP's code takes it of the target class, so its .1 is .01 here on CIFAR-10.
    "sig": Kind(pool="target", stamps=lambda module: Stamps(triggers.make("signal"))),
    "sig_rnp": Kind(pool="target", stamps=lambda module: Stamps(triggers.make("signal_rnp"))),
    "trojannn": Kind(needs="clean network", build=pattern.build, fit=pattern.fit_trojannn),
    "lf": Kind(needs="clean network", build=pattern.build, fit=pattern.fit_lf),
    "label_consistent": Kind(
        needs="clean network", pool="target", build=label_consistent.build, stamps=label_consistent.stamps
    ),
    "wanet": Kind(
        needs="control of training", covers=wanet.COVERS, build=wanet.build, fit=wanet.fit, stamps=wanet.stamps, trains_model=True
    ),
    "input_aware": Kind(
        needs="control of training", covers=input_aware.COVERS, build=input_aware.build, fit=input_aware.fit,
        stamps=input_aware.stamps, trains_model=True,
    ),
    "lira": Kind(needs="control of training", build=lira.build, fit=lira.fit, stamps=lira.stamps, trains_model=True),
    "ssba": Kind(needs="generator", build=ssba.build, fit=ssba.fit, stamps=ssba.stamps),
    "adaptive_blend": Kind(
        covers=1.0,
        stamps=lambda module: Stamps(
            triggers.make("adaptive_blend"), lambda images, generator: blended_in_part(images, generator=generator)
        ),
    ),
    "adaptive_patch": Kind(
        covers=2.0,
        stamps=lambda module: Stamps(
            triggers.make("adaptive_patch"), lambda images, generator: one_of_four(images, generator=generator)
        ),
    ),
}  # fmt: skip

# Attacks of the papers that are not here, and why.
NOT_BUILT = {
    "fc": "feature collision has no trigger in the image, so ASR would need another definition, and no reference code is known",
    "dfst": "its style generator and its training rounds are not described in any source at hand",
    "awp": "it changes a trained network's weights, and its bounds and steps are not described in any source at hand",
}


def names() -> list[str]:
    """Every attack, without its all-to-all form."""
    return [*triggers.TRIGGERS, *(name for name in KINDS if name not in triggers.TRIGGERS)]


def kind(name: str) -> Kind:
    """What the attack of this name does; `blended:FILE` blends that picture.  Raises ValueError if there is no such attack."""
    if name in KINDS:
        return KINDS[name]
    if name in NOT_BUILT:
        raise ValueError(f"attack {name!r} is not built: {NOT_BUILT[name]}")
    if name.partition(":")[0] not in triggers.TRIGGERS:
        raise ValueError(
            f"attack must be one of {', '.join(names())}, or blended:FILE, those that change labels also with _a2a behind it "
            f"for all-to-all (badnets_a2a), got {name!r}"
        )
    trigger = triggers.make(name)
    return Kind(stamps=lambda module: Stamps(trigger))
