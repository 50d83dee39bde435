"""What it costs to choose a threshold without the trigger: the best one by the test images, which no defender can know."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from bdlib import compare, experiment, metrics
from bdlib.defenses import anp, bnp, catalog, clp, rnp
from bdlib.defenses.catalog import Held
from bdlib.experiment import Lab
from bdlib.masks import prune, without_channels
from bdlib.selection import NoResult, OutlierConfig, Values, outliers
from bdlib.train import Watch

VARIANT = "oracle threshold"
Models = Iterator[tuple[float, nn.Module]]  # each threshold with the network that it leaves


def mask_models(
    run: Callable, held: Held, config: anp.AnpConfig | rnp.RnpConfig, generator: torch.Generator, watch: Watch
) -> Models:
    """Of the masks that the method's `run` learns."""
    masks = run(held.model, held.clean, config, generator=generator, watch=watch).masks
    return ((threshold, prune(held.model, masks, threshold)) for threshold in config.thresholds)


def clp_models(held: Held, config: OutlierConfig, generator: torch.Generator, watch: Watch) -> Models:
    """Of CLP's Lipschitz bounds."""
    return outlier_models(held.model, clp.channel_bounds(held.model, held.clean.floats()[:1]), config)


def bnp_models(held: Held, config: OutlierConfig, generator: torch.Generator, watch: Watch) -> Models:
    """Of BNP's divergences."""
    measured, _ = bnp.split(held.clean, config, generator=generator)
    return outlier_models(held.model, bnp.divergences(held.model, measured.floats()), config)


def outlier_models(model: nn.Module, values: Values, config: OutlierConfig) -> Models:
    """One for each candidate of u."""
    return ((u, without_channels(model, outliers(values, u))) for u in config.candidates)


# Methods that choose a threshold by clean accuracy.
SWEEPS: dict[str, Callable[[Held, object, torch.Generator, Watch], Models]] = {
    "anp": partial(mask_models, anp.run),
    "clp": clp_models,
    "bnp": bnp_models,
    "rnp": partial(mask_models, rnp.run),
}


def rows(
    lab: Lab,
    names: Sequence[str],
    stored: pd.DataFrame,
    *,
    measured: Path | None = None,
    watch: Watch = experiment.progress,
) -> list[dict[str, object]]:
    """A row, variant "oracle threshold", for each of the methods that has a threshold; read where it is stored.

    A method that gives up on this network has none.  measured: as in `compare.rows`.
    """
    stored = compare.with_so_far(stored, measured)
    found = (oracle_row(lab, name, stored, watch) for name in names if name in SWEEPS)
    return compare.kept((row for row in found if row is not None), measured)


def each_threshold(lab: Lab, name: str, *, watch: Watch = experiment.progress) -> Iterator[dict[str, object]]:
    """A row for each threshold of the method, variant "threshold T": what the papers' logs print.  None if it gives up."""
    source = compare.held(lab)
    config = catalog.METHODS[name].config(source)
    try:
        for threshold, model in SWEEPS[name](source, config, lab.setting.generator(name), watch):
            variant = f"threshold {threshold:g}"
            yield lab.row(name, variant, model, budget=source.budget, seconds=0.0, config=config)
    except NoResult as error:
        print(f"{name}: {error}")


def oracle_row(lab: Lab, name: str, stored: pd.DataFrame, watch: Watch) -> dict[str, object] | None:
    """The row of the threshold with the highest DER on the test images, the milder of two that are equal."""
    source = compare.held(lab)
    config, budget = catalog.METHODS[name].config(source), source.budget
    known = compare.same_run(stored, lab, {"defense": name, "variant": VARIANT, "budget": budget}, config)
    if known is not None:
        return known
    with experiment.stopwatch() as seconds:
        try:
            models = SWEEPS[name](source, config, lab.setting.generator(name), watch)
        except NoResult as error:
            print(f"{name}: {error}")
            return None
        best = max(models, key=lambda pair: metrics.der(lab.before, lab.measure(pair[1])))
    print(f"{name}: the best threshold by the test images is {best[0]:g}")
    return lab.row(
        name, VARIANT, best[1], budget=budget, seconds=seconds[0], config=config, measures={"threshold": best[0]}
    )
