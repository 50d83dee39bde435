"""Seconds and memory to poison CIFAR-10's 50,000 images, for every trigger that needs nothing but a seed.

    python -m benchmarks.poison_time            random pixels of CIFAR-10's size

Prints a line for each: seconds for 10% of the split, and the growth of the process's peak memory in MB.
"""

import resource
import time

import torch

from bdlib import poison
from bdlib.attacks import catalog
from benchmarks.train import random_split


def main() -> None:
    split = random_split(50_000)
    print(f"the split itself: {split.images.numel() / 2**20:.0f} MB")
    for name in (name for name in catalog.names() if not catalog.kind(name).build):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        out = poison.poison(split, poison.Attack(name=name), generator=torch.Generator().manual_seed(1))
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{name:18s} {seconds:6.2f} s  {len(out.indices) + len(out.covers)} images stamped, peak + {grown:.0f} MB"
        )
        del out


if __name__ == "__main__":
    main()
