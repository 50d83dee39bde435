"""One run of a notebook: checked parameters in, a backdoored model to defend and rows of results out."""

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import bdlib
from bdlib import data, gpu, metrics, models, poison, profiles, results, store, train
from bdlib.attacks import catalog
from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.data import Dataset
from bdlib.names import PAPERS
from bdlib.places import data_root, home, project_root


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The parameters of a notebook, checked.  Raises ValueError that says what is allowed."""

    notebook: str
    profile: str
    dataset: str
    attack: str
    arch: str
    budget: int | str
    poison_rate: float
    target_label: int
    seed: int

    def __post_init__(self) -> None:
        if self.notebook not in PAPERS:
            raise ValueError(f"notebook must be one of {', '.join(PAPERS)}, got {self.notebook!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0 on, got {self.seed!r}")
        profiles.require(self.profile)
        models.parse(self.arch)
        self.threat  # noqa: B018 - raises where the attack's values are off

    @property
    def threat(self) -> poison.Attack:
        """The attack that these parameters name."""
        return poison.Attack(name=self.attack, target_label=self.target_label, poison_rate=self.poison_rate)

    def require_fits(self, train_split: Dataset) -> None:
        """Raises ValueError if the budget, the attack or the network does not fit this training split."""
        count = self.images(train_split)
        if self.notebook not in profiles.BUDGET_IS_TRAINING_SET:
            data.require_even(train_split, count)
        poison.eligible(train_split, self.threat)
        models.require_size(self.arch, train_split.images.shape[1:])
        if not self.threat.kind.build:  # others have their triggers only once those are learned
            poison.triggered_test(train_split.subset(slice(1)), self.threat)

    def images(self, train_split: Dataset) -> int:
        """The budget as a number of images of this training split.  Raises ValueError if it does not fit."""
        if self.notebook in profiles.BUDGET_IS_TRAINING_SET and str(self.budget) == "0":
            return len(train_split)
        return data.resolve_budget(self.budget, train_split)

    def generator(self, use: str) -> torch.Generator:
        """A random source of its own for each use, all from the one seed."""
        digest = hashlib.sha256(f"{self.seed}/{use}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


@dataclasses.dataclass(frozen=True)
class Lab:
    """What a notebook works with.  A defense may be given `model` and `clean`, nothing else of this."""

    setting: Setting
    train: Dataset  # the training split before the attack, or the part of it that the budget allows
    test: Dataset
    poisoned: poison.Poisoned
    triggered: poison.Triggered
    stamps: Stamps  # what the attacker puts on images
    model: nn.Module  # the backdoored model, in eval()
    before: dict[str, float]  # its acc, asr, ra, ...
    clean: Dataset  # the defender's images; none where the budget is training images
    device: torch.device

    def clean_subset(self, budget: int | str, *, balanced: bool = True) -> Dataset:
        """Clean images for another budget of the same seed; not balanced: drawn without a look at the classes."""
        count, generator = data.resolve_budget(budget, self.train), self.setting.generator("clean")
        if not balanced:
            return self.train.subset(torch.randperm(len(self.train), generator=generator)[:count])
        return self.train.subset(data.clean_subset(self.train, count, generator=generator))

    def fresh_model(self, generator: torch.Generator) -> nn.Module:
        """A network of this setting that nobody trained yet, on the device."""
        return fresh_model(self.setting, self.train, self.device, generator)

    def vanilla_model(self) -> nn.Module:
        """The same network trained on the same images without the attack, from the store or now."""
        return trained_model(self.setting, self.train, "no attack", self.device)

    def second_model(self) -> nn.Module:
        """Another network from where this one came: the same training with the next seed, from the store or made now."""
        setting = dataclasses.replace(self.setting, seed=self.setting.seed + 1)
        if not len(self.poisoned.indices):
            return trained_model(setting, self.train, "no attack", self.device)
        return backdoored(setting, self.train, self.device)[2]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """acc, asr, ra, asr_all_classes, acc_non_target of a model on the test split."""
        return metrics.evaluate(model, self.test, self.triggered.test, self.triggered.wanted)

    def row(
        self,
        defense: str,
        variant: str,
        model: nn.Module,
        *,
        budget: int,
        seconds: float,
        config: object,
        measures: dict[str, float] | None = None,
    ) -> dict[str, object]:
        """A row of results: the model measured, beside the setting it came from.

        budget: images used; measures: further numbers of this notebook, by name.
        """
        after = self.measure(model)
        return self.identity(config) | {
            "budget": budget, "defense": defense, "variant": variant,
            **{f"{name}_before": self.before[name] for name in ("acc", "asr", "ra")},
            **after, "der": metrics.der(self.before, after),
            "measures": json.dumps({name: round(float(value), 4) for name, value in (measures or {}).items()}),
            "seconds": round(seconds, 2), "peak_memory_mb": peak_memory_mb(self.device), "device": describe_device(self.device),
            "torch": torch.__version__, "bdlib": bdlib.__version__,
        }  # fmt: skip

    def identity(self, config: object) -> dict[str, object]:
        """The columns of a row that say which run it is, but for budget, defense and variant.

        Raises TypeError for settings that are no dataclass, as rows could not tell theirs apart; None = no settings.
        """
        if config is not None and not dataclasses.is_dataclass(config):
            raise TypeError(f"settings must be a dataclass, got {config!r}")
        setting = self.setting
        described = json.dumps({} if config is None else dataclasses.asdict(config), sort_keys=True)
        return {
            "paper": PAPERS[setting.notebook], "notebook": setting.notebook, "profile": setting.profile, "dataset": setting.dataset,
            "dataset_sha256": self.train.sha256()[:12], "arch": setting.arch, "attack": setting.attack,
            "poison_rate": setting.poison_rate, "target_label": setting.target_label, "seed": setting.seed,
            "config": described, "config_sha256": hashlib.sha256(described.encode()).hexdigest()[:12],
        }  # fmt: skip


def prepare(setting: Setting, device: torch.device | str) -> Lab:
    """Data, poison, backdoored model (from the store, or trained now and stored), and the defender's clean images.

    Raises ValueError if a parameter does not fit the dataset.
    """
    device = torch.device(device)
    whole, test = load_data(setting.profile, setting.dataset)
    train_split = training_part(setting, whole)
    if setting.notebook in profiles.BUDGET_IS_TRAINING_SET:
        clean_indices = torch.zeros(0, dtype=torch.long)
    else:
        count = setting.images(train_split)
        clean_indices = data.clean_subset(train_split, count, generator=setting.generator("clean"))
    stamps, poisoned, model = backdoored(setting, train_split, device)
    triggered = poison.triggered_test(test, setting.threat, stamps)
    test = test.to(device)
    triggered = poison.Triggered(triggered.test.to(device), triggered.wanted.to(device))
    before = metrics.evaluate(model, test, triggered.test, triggered.wanted)
    clean = train_split.subset(clean_indices)
    return Lab(setting, train_split, test, poisoned, triggered, stamps, model, before, clean, device)


def require_planted(before: dict[str, float]) -> None:
    """Raises RuntimeError if the network does its task, or answers to the trigger, too seldom to judge a defense on it.

    before: `Lab.before`.  The limits are ours: far above chance, far below what every stored network has.
    """
    if before["acc"] < 0.6 or before["asr"] < 0.75:
        raise RuntimeError(
            f"the backdoor was not planted: ACC {before['acc']:.3f} (.6 is needed), ASR {before['asr']:.3f} (.75): no "
            "defense can be judged on this.  Take more training images (a few thousand), a higher poison rate or another attack"
        )


def training_part(setting: Setting, train_split: Dataset) -> Dataset:
    """The training split, or the part of it that the budget allows where that counts training images.

    Raises ValueError if the setting does not fit it.
    """
    setting.require_fits(train_split)
    if setting.notebook in profiles.BUDGET_IS_TRAINING_SET:
        return data.fixed_part(train_split, setting.images(train_split))
    return train_split


def backdoored(
    setting: Setting, train_split: Dataset, device: torch.device | str
) -> tuple[Stamps, poison.Poisoned, nn.Module]:
    """What the attack puts on images, the split that it poisoned, and the network trained on that (from the store, or made now)."""
    stamps, model = arm(setting, train_split, device)
    poisoned = poison.poison(train_split, setting.threat, stamps, generator=setting.generator("poison"))
    return stamps, poisoned, model or trained_model(setting, poisoned.train, setting.attack, torch.device(device))


def arm(setting: Setting, train_split: Dataset, device: torch.device | str) -> tuple[Stamps, nn.Module | None]:
    """What the setting's attack puts on images, and the backdoored network, in eval(), if the attacker trains that himself.

    What an attack learns or crafts comes from the store, or is made now and stored.
    """
    kind, threat, device = setting.threat.kind, setting.threat, torch.device(device)
    if not kind.build:
        return threat.stamps(), None
    attacker = Attacker(
        train=train_split, wanted=lambda labels: threat.wanted(labels, len(train_split.classes)),
        target_label=setting.target_label, poison_rate=setting.poison_rate,
        fresh_model=lambda generator: fresh_model(setting, train_split, device, generator),
        clean_model=lambda: trained_model(setting, train_split, "no attack", device),
        training=profiles.training(setting.profile, setting.dataset.partition(":")[0]), quick=setting.profile == "quick",
        device=device, generator=lambda use: setting.generator(f"attack/{use}"), watch=progress,
    )  # fmt: skip
    module = kind.build(attacker)
    if kind.fit:
        fields = _made_from(setting, train_split, device) | {
            "what": "what the attack made", "attack": dataclasses.asdict(threat), "quick": attacker.quick, "attacks": catalog.VERSION,
        }  # fmt: skip

        def make() -> nn.Module:
            print(f"{setting.attack} on {setting.dataset}, seed {setting.seed}: once, then kept in the store")
            kind.fit(module, attacker)
            return module

        module.load_state_dict(store.fetch(home() / "store", fields, make))
    module.eval().requires_grad_(False)
    return kind.stamps(module), module.classifier if kind.trains_model else None


def load_data(profile: str, dataset: str) -> tuple[Dataset, Dataset]:
    """Train and test split; the quick profile keeps a class-balanced part of a large training split, the same for every seed."""
    train_split, test = data.load(dataset, data_root())
    limit = profiles.train_limit(profile)
    return (data.fixed_part(train_split, limit) if limit else train_split), test


def trained_model(setting: Setting, split: Dataset, attack: str, device: torch.device) -> nn.Module:
    """The setting's network trained on this split, on the device, in eval(), its weights without gradient.

    Trained once for each split and seed, then read from the store; `attack` says what was done to the split.
    """
    config = profiles.training(setting.profile, setting.dataset.partition(":")[0])
    fields = _made_from(setting, split, device) | {"what": "model trained on this split", "attack": attack}

    def make() -> nn.Module:
        what = f"{setting.arch} on {setting.dataset} with {attack}, seed {setting.seed}"
        print(f"training {what}: once, then kept in the store")
        model = fresh_model(setting, split, device, setting.generator("init"))
        with stopwatch() as seconds:
            train.fit(model, split.to(device), config, generator=setting.generator("order"), watch=progress)
        print(f"trained {what}: {seconds[0]:.0f} s")
        return model

    weights = store.fetch(home() / "store", fields, make)
    model = fresh_model(setting, split, device, setting.generator("init"))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def attack_pictures(
    setting: Setting, names: Iterable[str], device: torch.device | str, count: int = 2
) -> list[tuple[str, dict[str, torch.Tensor], dict[str, object]]]:
    """For each attack its name, pictures of the first `count` test images, and what it needs and changes.

    pictures: clean, triggered, ten times the difference (gray = none), and as a poisoned training image, (count, C, H, W) in [0, 1].
    Clean-label attacks poison a twentieth of the images, so that any class has enough.
    """
    train_split, test = load_data(setting.profile, setting.dataset)
    clean, sample = test.subset(slice(count)).floats(), test.subset(slice(200)).floats()
    shown = []
    for name in names:
        chosen = dataclasses.replace(setting, attack=name)
        if chosen.threat.pool == "target":
            chosen = dataclasses.replace(chosen, poison_rate=0.05)
        stamps, _ = arm(chosen, train_split, device)
        triggered = stamps.test(clean)
        pictures = {
            "clean": clean, "triggered": triggered, "difference x 10": (0.5 + 5 * (triggered - clean)).clamp(0, 1),
            "poisoned, to train on": stamps.on_poisoned(clean, setting.generator("gallery")),
        }  # fmt: skip
        kind = chosen.threat.kind
        facts = {"needs": kind.needs, "labels": "kept" if kind.pool == "target" else "changed"}
        shown.append((name, pictures, facts | metrics.visibility(sample, stamps.test(sample))))
    return shown


def _made_from(setting: Setting, split: Dataset, device: torch.device) -> dict[str, object]:
    """What decides the bits of anything trained on this split."""
    config = profiles.training(setting.profile, setting.dataset.partition(":")[0])
    return {
        "split": split.sha256(), "crop_padding": split.crop_padding, "flip": split.flip, "arch": setting.arch, "seed": setting.seed,
        "training": dataclasses.asdict(config), "version": train.VERSION, "dataset": setting.dataset, "device": gpu.arithmetic(device),
    }  # fmt: skip


def fresh_model(setting: Setting, split: Dataset, device: torch.device, generator: torch.Generator) -> nn.Module:
    """An untrained network of the setting for images like these, on the device."""
    return models.build(setting.arch, split.images, len(split.classes), generator=generator).to(device)


def progress(epochs: range) -> Iterator[int]:
    """The epochs, with a progress bar that shows the time left."""
    from tqdm import tqdm

    # Plain text on stdout: a stored notebook shows it without widgets, and not as an error.
    return iter(tqdm(epochs, unit="epoch", leave=False, mininterval=1, file=sys.stdout))


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """`with stopwatch() as seconds:` leaves the seconds that the block took in seconds[0]."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


def peak_memory_mb(device: torch.device) -> int:
    """Most memory used since `forget_peak_memory`: allocated on a GPU, resident size of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    status = Path("/proc/self/status")
    if status.exists():  # Linux: the peak that can be forgotten
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) >> 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def forget_peak_memory(device: torch.device) -> None:
    """Start the measurement of `peak_memory_mb` anew.  On a CPU on Linux alone; elsewhere the peak is the process's whole life's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"


def out_folder(out: str) -> Path:
    """The folder of a notebook's `out` parameter: as it is, or where it is relative below the project.

    Below the current folder where the project cannot be written, as on a machine that a class shares.
    """
    root = project_root()
    return (root if os.access(root, os.W_OK) else Path.cwd()) / out


def stored_rows(name: str) -> pd.DataFrame:
    """Rows that `make figures`, `attacks` or `paper` measured: figures/NAME.csv; none, with a word on it, where it is not there."""
    path = project_root() / "figures" / f"{name}.csv"
    if not path.exists():
        by = next((target for target in ("attacks", "paper") if name.startswith(target)), "figures")
        print(f"no stored rows: `make {by}` writes figures/{name}.csv")
        return results.load()
    return results.load(path)
