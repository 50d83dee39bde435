"""Seconds and peak memory of each method alone, on one backdoored network (from the store, or trained first).

python -m benchmarks.defenses                                                    quick profile, signs: half an hour on one CPU core
python -m benchmarks.defenses --profile paper_fast --dataset cifar10 --arch preact_resnet18 --budget 500

Each method runs --rounds times; the last one counts, so that what PyTorch does once in a process is not charged to the method.
Run it on a machine with nothing else to do.  Writes OUT.csv: rows of results, as the notebooks' own.
"""

import argparse
from pathlib import Path

import torch

from bdlib import compare, experiment, results
from bdlib.experiment import Setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--dataset", default="signs")
    parser.add_argument("--attack", default="badnets")
    parser.add_argument("--arch", default="preact_resnet18:8")
    parser.add_argument("--budget", default="200")
    parser.add_argument("--methods", nargs="+", default=compare.chosen("post-training"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/defenses"))
    options = parser.parse_args()
    setting = Setting(
        notebook="06_all_five", profile=options.profile, dataset=options.dataset, attack=options.attack, arch=options.arch,
        budget=options.budget, poison_rate=0.1, target_label=0, seed=0,
    )  # fmt: skip
    lab = experiment.prepare(setting, "cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in compare.chosen(",".join(options.methods)):
        for _ in range(options.rounds):
            undefended, row = compare.rows(lab, [name], results.load(), watch=iter)
        rows += [row] if rows else [undefended, row]
        print(f"{name:24s} {row['seconds']:8.1f} s {row['peak_memory_mb']:8d} MB   {row['device']}", flush=True)
        results.save(results.table(rows), options.out.with_suffix(".csv"))


if __name__ == "__main__":
    main()
