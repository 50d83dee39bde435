#!/usr/bin/env python3
"""What the training loop costs beside its arithmetic: bdlib's `fit` against a bare loop of the same steps on one fixed batch.

The difference is everything that is not forward, backward and step: order, crops, flips, conversion, bookkeeping.
Prints seconds of both, taken in turns, their ratio, and the peak memory of the process.  Run it on a machine with nothing else to do.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from bdlib import data, experiment, models, places, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--arch", default="preact_resnet18:16")
    parser.add_argument("--images", type=int, default=6400, help="images of one epoch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    whole, _ = data.load(options.dataset, places.data_root())
    split = whole.subset(slice(options.images))
    split = data.replace(split, crop_padding=4, flip=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = train.TrainConfig(epochs=1, batch_size=128, lr=0.01)
    seconds: dict[str, list[float]] = {"bare": [], "fit": []}
    for name, loop in (("bare", bare), ("fit", fit)) * (options.rounds + 1):
        seconds[name].append(timed(loop, split, options.arch, config, device))
    bare_time, fit_time = (statistics.median(seconds[name][1:]) for name in ("bare", "fit"))  # the first round warms up
    print(
        f"{options.dataset}, {options.arch}, {len(split)} images an epoch, {experiment.describe_device(torch.device(device))}"
    )
    print(
        f"bare loop {bare_time:.2f} s, fit {fit_time:.2f} s: {fit_time / bare_time:.3f} x (medians of {options.rounds})"
    )
    print(
        f"peak memory {experiment.peak_memory_mb(torch.device(device))} MB, all {len(whole)} training images in memory"
    )


def timed(loop, split: data.Dataset, arch: str, config: train.TrainConfig, device: str) -> float:
    model = models.build(arch, split.images, len(split.classes), generator=torch.Generator().manual_seed(0)).to(device)
    split = split.to(device)
    with experiment.stopwatch() as seconds:
        loop(model, split, config)
    return seconds[0]


def fit(model: torch.nn.Module, split: data.Dataset, config: train.TrainConfig) -> None:
    train.fit(model, split, config, generator=torch.Generator().manual_seed(0))


def bare(model: torch.nn.Module, split: data.Dataset, config: train.TrainConfig) -> None:
    """The same number of steps, always on the first batch."""
    images, labels = data.to_float(split.images[: config.batch_size]), split.labels[: config.batch_size]
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    model.train()
    for _ in range(config.epochs * (len(split) // config.batch_size)):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"({time.perf_counter() - start:.0f} s in all)")
