"""All methods under one protocol: the same network, clean images and seed for each; rows are read where they are stored."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from bdlib import experiment, results
from bdlib.defenses import catalog, clp, nc, rnp
from bdlib.experiment import Lab
from bdlib.poison import Poisoned
from bdlib.selection import NoResult
from bdlib.train import Watch

EXTRAS = ("control", "oracle", "detection", "steps")  # what 06 measures beside the methods
STEPS = "as many steps"  # variant of FT and FP in FT-SAM's batches
GROUPS = ("all", "post-training", "in training")  # of methods, as `chosen` reads them
# A stored row stands for a run of the same network with the same values in these columns.  A change of a method's code does not show
# in them: then leave the stored rows out.
KEY = [
    "profile", "dataset", "dataset_sha256", "arch", "attack", "poison_rate", "target_label", "budget", "seed", "defense", "variant",
    "config_sha256",
]  # fmt: skip


def held(lab: Lab) -> catalog.Held:
    """What a defender may hold of the lab."""
    return catalog.Held(
        model=lab.model, second_model=functools.cache(lab.second_model), clean=lab.clean,
        train_set=lab.poisoned.train, make_model=lab.fresh_model,
    )  # fmt: skip


def control(lab: Lab) -> Lab:
    """The same lab around the network that was trained without the attack, and its training split without poison."""
    model = lab.vanilla_model()
    nobody = torch.zeros(0, dtype=torch.long)
    return dataclasses.replace(
        lab, model=model, before=lab.measure(model), poisoned=Poisoned(lab.train, nobody, nobody)
    )


def chosen(methods: str) -> list[str]:
    """The names of the methods that these words stand for: a group, or names with commas between them.

    "post-training": those that change a trained network; "in training": those that train one on the poisoned set.
    Raises ValueError for a name that is no method.
    """
    if methods in GROUPS:
        trains = {name: method.needs == "training set" for name, method in catalog.METHODS.items()}
        return [name for name in trains if methods == "all" or trains[name] == (methods == "in training")]
    names = [name.strip() for name in methods.split(",")]
    unknown = [name for name in names if name not in catalog.METHODS]
    if unknown:
        raise ValueError(
            f"methods must be {', '.join(GROUPS)}, or names out of {', '.join(catalog.METHODS)}, got {', '.join(unknown)}"
        )
    return names


def chosen_extras(extras: str) -> list[str]:
    """The extras that are named, with commas between them; "" = none.  Raises ValueError for any other word."""
    names = [name.strip() for name in extras.split(",") if name.strip()]
    unknown = [name for name in names if name not in EXTRAS]
    if unknown:
        raise ValueError(f"extras must be out of {', '.join(EXTRAS)}, or empty, got {', '.join(unknown)}")
    return names


def rows(
    lab: Lab,
    names: Sequence[str],
    stored: pd.DataFrame,
    *,
    variant: str = "default",
    detect: bool = False,
    measured: Path | None = None,
    watch: Watch = experiment.progress,
) -> list[dict[str, object]]:
    """A row for each method, first the undefended network's: read from the stored rows, or measured now.

    detect: the undefended network's row also says, in `measures`, how suspect it looks (see `detection`).
    measured: a CSV file in which every row is kept as soon as it is there, and read by the next call: a run that was cut off goes on.
    Delete it after a change of a method's code.
    """
    stored = with_so_far(stored, measured)
    return kept(each_row(lab, names, stored, variant=variant, detect=detect, watch=watch), measured)


def rows_with_as_many_steps(
    lab: Lab,
    names: Sequence[str],
    stored: pd.DataFrame,
    *,
    measured: Path | None = None,
    watch: Watch = experiment.progress,
) -> list[dict[str, object]]:
    """A row, variant "as many steps", for each of the methods that `catalog.AS_MANY_STEPS` has; as in `rows`."""
    stored = with_so_far(stored, measured)
    methods = catalog.AS_MANY_STEPS.items()
    found = (method_row(lab, name, stored, STEPS, watch, method=method) for name, method in methods if name in names)
    return kept(found, measured)


def overview(lab: Lab) -> pd.DataFrame:
    """What each method gets, and the settings that its own rule changes for this lab: those that are not the method's default."""
    source, lines = held(lab), {}
    for name, method in catalog.METHODS.items():
        config = method.config(source)
        default = {field.name: field.default for field in dataclasses.fields(config)}
        changed = {key: value for key, value in vars(config).items() if value != default[key]}
        plain = {key: value for key, value in changed.items() if not dataclasses.is_dataclass(value)}
        lines[name] = {"gets": method.needs, "settings": ", ".join(f"{key} {value}" for key, value in plain.items())}
    return pd.DataFrame(lines).T


def each_row(
    lab: Lab, names: Sequence[str], stored: pd.DataFrame, *, variant: str, detect: bool, watch: Watch
) -> Iterator[dict[str, object]]:
    """The rows one by one, the undefended network's first."""
    yield undefended_row(lab, stored, variant, detect, watch)
    for name in names:
        yield method_row(lab, name, stored, variant, watch)


def so_far(measured: Path | None) -> pd.DataFrame:
    """The rows in the file; none where it is not there."""
    return results.load(measured) if measured and measured.exists() else results.load()


def with_so_far(stored: pd.DataFrame, measured: Path | None) -> pd.DataFrame:
    """The rows in the file, then the stored ones: of a run on two networks both, as `same_run` tells them apart."""
    tables = [rows for rows in (so_far(measured), stored) if len(rows)]
    return pd.concat(tables, ignore_index=True) if tables else stored


def kept(rows: Iterable[dict[str, object]], measured: Path | None) -> list[dict[str, object]]:
    """The rows, each written to the file as soon as it is there."""
    found = []
    for row in rows:
        found.append(row)
        if measured:
            results.save(results.once(results.table([row]), so_far(measured)), measured)
    return found


def undefended_row(lab: Lab, stored: pd.DataFrame, variant: str, detect: bool, watch: Watch) -> dict[str, object]:
    """The row of the network as it is."""
    known = same_run(stored, lab, {"defense": "none", "variant": variant, "budget": len(lab.clean)}, None)
    if known is not None and (known["measures"] != "{}" or not detect):
        return known
    measures = detection(lab, watch=watch) if detect else None
    return lab.row("none", variant, lab.model, budget=len(lab.clean), seconds=0.0, config=None, measures=measures)


def method_row(
    lab: Lab, name: str, stored: pd.DataFrame, variant: str, watch: Watch, *, method: catalog.Method | None = None
) -> dict[str, object]:
    """The row of the method of this name, as it is in the catalog or as given.

    A method that says it cannot work here leaves the network as it is, and `failed` = 1 in `measures`.
    """
    method, source = method or catalog.METHODS[name], held(lab)
    config = method.config(source)
    budget = len(source.train_set) if method.needs == "training set" else len(source.clean)
    known = same_run(stored, lab, {"defense": name, "variant": variant, "budget": budget}, config)
    if known is not None:
        return known
    measured, failed = lab.model, None
    # On the CPU, so that it is no part of the device's peak memory.
    as_it_was = {key: value.cpu().clone() for key, value in lab.model.state_dict().items()}
    if method.needs == catalog.TWO_NETWORKS:
        source.second_model()  # into the store, as the first one is: its training is no part of the method's seconds
    experiment.forget_peak_memory(lab.device)
    with experiment.stopwatch() as seconds:
        try:
            measured = method.run(source, generator=lab.setting.generator(name), watch=watch)
        except NoResult as error:
            print(f"{name}: {error}")
            failed = {"failed": 1.0}
    if not all(torch.equal(now.cpu(), as_it_was[key]) for key, now in lab.model.state_dict().items()):
        raise RuntimeError(f"{name} changed the network that it was given: a method must work on a copy")
    row = lab.row(name, variant, measured, budget=budget, seconds=seconds[0], config=config, measures=failed)
    print(f"{name}, measured now: ACC {row['acc']:.3f}, ASR {row['asr']:.3f}, {seconds[0]:.0f} s")
    return row


def same_run(stored: pd.DataFrame, lab: Lab, chosen: dict[str, object], config: object) -> dict[str, object] | None:
    """The stored row of this very run, if there is one.

    The same seed is another network on another CPU, with another number of threads or on a GPU: its rows say nothing of this one.
    """
    wanted = lab.identity(config) | chosen
    fits = stored
    for name in KEY:
        fits = fits[fits[name] == wanted[name]]
    if fits.empty:
        return None
    here = fits
    for name in ("acc", "asr", "ra"):
        here = here[(here[f"{name}_before"] - lab.before[name]).abs() <= 1e-9]
    if here.empty:
        row = fits.iloc[0]
        print(
            f"{chosen['defense']}, {chosen['variant']}: the stored row is of another network (ACC {row['acc_before']:.4f}, "
            f"ASR {row['asr_before']:.4f}; here {lab.before['acc']:.4f}, {lab.before['asr']:.4f}), so it is measured now"
        )
        return None
    return here.iloc[0][results.COLUMNS].to_dict()


def detection(lab: Lab, *, watch: Watch = experiment.progress) -> dict[str, float]:
    """What three methods say of the lab's network before they change it, for `measures`.

    nc: largest anomaly index of Neural Cleanse; rnp: largest share of clean images that the unlearned network calls one class (1/C at
    random); clp: how many deviations the largest Lipschitz bound lies above its layer's mean.  Each is higher for a suspect network.
    nc_right, rnp_right: 1 where the class that the method names is the attacker's; NaN for an all-to-all attack, which has no one
    class.  Without rnp where its unlearning gave up.
    """
    source, threat = held(lab), lab.setting.threat

    def right(label: int | torch.Tensor) -> float:
        # Not left out: `report.suspects` takes the networks that have nc_right.
        return math.nan if threat.all_to_all else float(label == threat.target_label)

    inverted = nc.run(
        lab.model, lab.clean, nc.recipe(source.budget), generator=lab.setting.generator("nc"), watch=watch
    )
    said, config = {}, rnp.recipe(lab.model, source.budget)
    try:
        unlearned = rnp.unlearn(lab.model, lab.clean, config, generator=lab.setting.generator("rnp"), watch=watch)
        label, shares = rnp.suspected_label(unlearned, lab.clean)
        said = {"rnp": shares.max().item(), "rnp_right": right(label)}
    except NoResult as error:
        print(f"rnp says nothing of this network: {error}")
    bounds = clp.channel_bounds(lab.model, lab.clean.floats()[:1]).values()
    return {
        "nc": inverted.indices.max().item(),
        "nc_right": right(inverted.indices.argmax()),
        **said,
        "clp": max(((bound - bound.mean()) / bound.std()).max().item() for bound in bounds),
    }
