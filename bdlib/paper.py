"""The papers' tables on one machine, without Jupyter: methods against attacks, the most valuable rows first, until time is up.

  python -m bdlib.paper --minutes 25                   CIFAR-10 first, then GTSRB
  python -m bdlib.paper --dry-run                      what would be measured, in which order
  python -m bdlib.paper --workers 2                    two networks at a time: one is prepared while the other has the GPU
  python -m bdlib.paper --arch preact_resnet18:16      a narrower network, for a CPU

A row is kept as soon as it is measured, below OUT/parts; OUT/results.csv holds them all, in the form of the notebooks' rows.  The same
command again goes on where it stopped, and goes by names alone: after a change of a method's code or settings take another OUT.  Once
the minutes are over nothing new is begun, and what runs is finished.
"""

import argparse
import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from bdlib import compare, data, experiment, files, models, names, oracle, places, poison, profiles, results
from bdlib.experiment import Lab, Setting

DATASETS = ("cifar10", "gtsrb")
# The most telling first.  Attacks on images of the target class alone poison 5%, half of one of CIFAR-10's classes.
ATTACKS = ("badnets", "blended", "blended_picture", "sig", "trojannn", "lf", "wanet", "label_consistent", "input_aware")
SEEDS = (0, 1, 2)
BUDGETS = (500, 2500, 100, 50, 10, 5000)
METHODS = (
    "fine_tuning", "awm", "rnp", "ft_sam", "linf_pruning", "fine_pruning", "anp", "nad", "clp", "bnp", "ep",
)  # fmt: skip
IN_TRAINING, IN_TRAINING_ARCH = "cbd", "wrn_16_1"  # on the whole poisoned training set, with the network of its paper
CLASSES = {"gtsrb": 43, "cifar100": 100, "tiny_imagenet": 200}  # a budget has an image of each class at least
SMALL_TARGET = ("gtsrb",)  # class 0 has too few images for attacks on it alone


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """What one process measures in one go: a network, its clean budget, methods.  Units sort by value, the most valuable first."""

    value: int  # how far from the first choice of dataset, attack, seed and budget
    dataset: str
    attack: str
    seed: int
    budget: int  # clean images; 0: CBD, which has none
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.dataset}_{self.attack}_{self.seed}_{self.budget or IN_TRAINING}"

    def file(self, profile: str, arch: str) -> str:
        """The name of its files: one for each profile and network, as all of them may go to the same OUT."""
        return files.file_name(f"{self.name}_{profile}_{self.setting(profile, arch).arch}")

    def setting(self, profile: str, arch: str) -> Setting:
        """That of the unit's network; the same for all budgets."""
        return Setting(
            notebook="06_all_five" if self.budget else "04_cbd", arch=arch if self.budget else IN_TRAINING_ARCH,
            profile=profile, dataset=self.dataset, attack=self.attack, budget="1/class" if self.budget else 0,
            poison_rate=0.05 if self.attack in names.CLEAN_LABEL else 0.1, target_label=0, seed=self.seed,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is measured; 1: something failed; 3: time was up before; 130: stopped by Ctrl-C."""
    options = parse(arguments)
    units = plan(options.datasets, options.attacks, options.seeds, options.budgets, options.methods)
    if options.dry_run:
        for unit in units:
            print(f"{unit.name}: {', '.join(unit.methods)}")
        print(f"{len(units)} units, {sum(len(unit.methods) for unit in units)} rows beside those without a defense")
        return 0
    deadline = time.time() + 60 * options.minutes if options.minutes else float("inf")
    work = functools.partial(
        measure,
        profile=options.profile,
        arch=options.arch,
        out=options.out,
        deadline=deadline,
        quiet=options.workers > 1,
    )
    failed = unfinished = 0
    try:
        for number, (unit, outcome) in enumerate(run_all(units, work, options.workers), start=1):
            gather(options.out)
            failed += isinstance(outcome, Exception)
            unfinished += outcome is False
            if outcome is not False:
                said = "done" if outcome is True else repr(outcome)
                print(f"{time.strftime('%X')}  {number}/{len(units)} {unit.name}: {said}", flush=True)
    except KeyboardInterrupt:
        print("stopped.  Every row that was measured is kept; the same command goes on from there.")
        return 130
    print(
        f"{len(units)} units: {unfinished} left for the next call, {failed} failed; rows: {options.out / 'results.csv'}"
    )
    return 1 if failed else 3 if unfinished else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(option: str, default: tuple, word: str, **settings) -> None:
        text = f"default: {' '.join(map(str, default))}"
        parser.add_argument(option, nargs="+", default=default, metavar=word, help=text, **settings)

    several("--datasets", DATASETS, "NAME")
    several("--attacks", ATTACKS, "NAME")
    several("--methods", (*METHODS, IN_TRAINING), "NAME")
    several("--seeds", SEEDS, "N", type=number_from(0))
    several("--budgets", BUDGETS, "N", type=number_from(1))
    parser.add_argument(
        "--minutes", type=float, default=0, help="begin nothing new after so many; 0 (default): no limit"
    )
    parser.add_argument(
        "--workers", type=number_from(1), default=1, help="processes, each with its own network (default 1)"
    )
    parser.add_argument("--profile", default="paper_fast", choices=profiles.NAMES, help="default: paper_fast")
    parser.add_argument("--arch", default="preact_resnet18", help="default: preact_resnet18; CBD has its own")
    parser.add_argument(
        "--out", type=Path, default=places.project_root() / "runs" / "paper", help="default: runs/paper"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    options = parser.parse_args(arguments)
    try:
        options.methods = tuple(compare.chosen(",".join(options.methods)))
        models.parse(options.arch)
        for attack in options.attacks:
            poison.Attack(name=attack)
        for dataset in options.datasets:
            if dataset not in data.NAMES and not dataset.startswith("folder:"):
                raise ValueError(f"datasets must be out of {', '.join(data.NAMES)}, or folder:PATH, got {dataset!r}")
        if options.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {options.minutes:g}")
    except ValueError as error:
        parser.error(str(error))
    return options


def number_from(least: int) -> Callable[[str], int]:
    """What makes a whole number, `least` or more, of a word of the command line."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return value

    return number


def plan(
    datasets: Sequence[str],
    attacks: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[int],
    methods: Sequence[str],
) -> list[Unit]:
    """All units, the most valuable first: each list is taken to begin with what matters most."""
    units = []
    after = tuple(name for name in methods if name != IN_TRAINING)
    for (d, dataset), (a, attack), (s, seed) in product(enumerate(datasets), enumerate(attacks), enumerate(seeds)):
        if dataset in SMALL_TARGET and attack in names.CLEAN_LABEL:
            continue
        value = 100 * d + a // 2 * 2 + s  # two attacks, then their other seeds, then two more attacks
        fitting = [(b // 2, budget) for b, budget in enumerate(budgets) if budget >= CLASSES.get(dataset, 10)]
        units += [Unit(value + 2 * b, dataset, attack, seed, budget, after) for b, budget in fitting if after]
        if IN_TRAINING in methods:
            units.append(Unit(value + 1, dataset, attack, seed, 0, (IN_TRAINING,)))
    return sorted(units)


def run_all(
    units: Sequence[Unit], work: Callable[[Unit], bool], workers: int
) -> Iterator[tuple[Unit, bool | Exception]]:
    """Each unit with what `work` returned, or raised, as it ends."""
    if workers == 1:
        for unit in units:
            yield unit, attempt(work, unit)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(attempt, work, unit): unit for unit in units}
        try:
            broken = False
            for done in as_completed(running):
                try:
                    outcome = done.result()
                except BrokenProcessPool as error:
                    # All that was not finished fails with it, what had begun and what had not: one is the failure.
                    outcome, broken = False if broken else error, True
                yield running[done], outcome
        finally:
            pool.shutdown(cancel_futures=True)


def attempt(work: Callable[[Unit], bool], unit: Unit) -> bool | Exception:
    """What `work` makes of the unit; an error is returned, its traceback shown, and the next unit begins."""
    try:
        return work(unit)
    except Exception as error:  # one network that cannot be trained must not end the table
        traceback.print_exc()
        return error


def measure(unit: Unit, *, profile: str, arch: str, out: Path, deadline: float, quiet: bool) -> bool:
    """Measure what is still missing of the unit into OUT/parts; whether all of it is there now."""
    file_name = unit.file(profile, arch)
    log = out / "logs" / f"{file_name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file if quiet else sys.stdout):
        part = out / "parts" / f"{file_name}.csv"
        known = set(compare.so_far(part).query("variant == 'default'")["defense"])
        missing = [name for name in unit.methods if name not in known]
        if not missing:
            return True
        if time.time() > deadline:
            return False
        lab = with_budget(laboratory(unit.setting(profile, arch)), unit.budget)
        for name in missing:
            if time.time() > deadline:
                return False
            if name == "rnp":  # before its own row, which says that all of it is there
                compare.kept(oracle.each_threshold(lab, name), part)
            compare.rows(lab, [name], results.load(), measured=part)
        return True


@functools.lru_cache(maxsize=1)
def laboratory(setting: Setting) -> Lab:
    """The setting's lab; the last one is kept, because the next unit is often another budget of the same network."""
    return experiment.prepare(setting, "cuda" if torch.cuda.is_available() else "cpu")


def with_budget(lab: Lab, budget: int) -> Lab:
    """The same lab with another number of clean images; 0: as it is."""
    if not budget:
        return lab
    return dataclasses.replace(
        lab, setting=dataclasses.replace(lab.setting, budget=budget), clean=lab.clean_subset(budget)
    )


def gather(out: Path) -> None:
    """Write OUT/results.csv, the rows of all parts."""
    parts = sorted((out / "parts").glob("*.csv"))
    if parts:
        results.save(results.once(results.load(*parts)), out / "results.csv")


if __name__ == "__main__":
    sys.exit(main())
