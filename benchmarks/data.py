"""Images a second that the training loop is fed with, without a network: ours against the papers' codes; and the way there.

python -m benchmarks.data                        10,000 images of CIFAR-10's size
python -m benchmarks.data --images 50000 --workers 4

ours    bdlib.train.Batches: the split on the device, crops and flips of a whole batch
peers   a Dataset of PIL images, one transform a sample, a DataLoader with workers
"""

import argparse
import time

import torch

from bdlib import experiment, train
from benchmarks.train import now, pictures_loader, random_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2, help="of the peers' DataLoader")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = random_split(options.images)
    start = time.perf_counter()
    batches = train.Batches(split, 128, device, generator=torch.Generator().manual_seed(0))
    print(f"{experiment.describe_device(device)}: {options.images} images on the device in {now(device) - start:.2f} s")
    for name, source in (("ours", batches), ("peers", pictures_loader(split, 128, options.workers, device))):
        for epoch in range(options.epochs):
            start = now(device)
            for images, *_ in source:
                images.to(device)
            print(f"{name}, epoch {epoch + 1}: {options.images / (now(device) - start):9.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
