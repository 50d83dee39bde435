"""Images a second in training: ours, one fixed batch, and the way of the papers' codes; and the share of the machine's matmul rate.

python -m benchmarks.train                                   width 16, 6,400 images an epoch: minutes on a CPU
python -m benchmarks.train --arch preact_resnet18 --images 50000 --epochs 20 --batches 128 512 --ways ours peers

ours           bdlib.train.fit: the split on the device, crops and flips of a whole batch; on a GPU bfloat16, each step one launch,
               compiled from a million images on (--images times --epochs)
fixed batch    forward, backward and step, always on the first batch, not compiled: what ours could be at most without
peers          a Dataset of PIL images, one transform a sample, a DataLoader with workers, float32, the loss read after every step
compiled       the fixed batch through torch.compile, on a GPU each step one launch

A line a way: the median over the epochs but the first, which warms up.  share = FLOPs of forward and backward a second
(torch.utils.flop_counter), over those of a large matrix product measured in the same run (bfloat16 on a GPU, float32 on a CPU).
Run it on a machine with nothing else to do.  Writes OUT.csv and OUT.png.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from bdlib import data, experiment, gpu, models, places, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--arch", default="preact_resnet18:16")
    parser.add_argument("--images", type=int, default=6400, help="of one epoch")
    parser.add_argument("--batches", type=int, nargs="+", default=[128], help="batch sizes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4, help="of the peers' DataLoader")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ours", "fixed batch", "peers"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = data.load(options.dataset, places.data_root())[0].subset(slice(options.images))
    most, work = matmul_rate(device), flops(options.arch, split)
    print(
        f"{experiment.describe_device(device)}, torch {torch.__version__}: a matrix product makes {most / 1e12:.2f} TFLOP/s"
    )
    print(f"{options.arch}: {work / 1e9:.3f} GFLOP forward and backward for an image")
    rows = []
    for batch_size in options.batches:
        for name in options.ways:
            times = list(WAYS[name](split, options, batch_size, device))
            rate = batch_size * (len(split) // batch_size) / statistics.median(times[1:])
            rows.append(
                {
                    "way": name, "arch": options.arch, "batch": batch_size, "images_per_s": round(rate, 1),
                    "share": round(rate * work / most, 3), "first_epoch_s": round(times[0], 2),
                    "device": experiment.describe_device(device), "torch": torch.__version__,
                }
            )  # fmt: skip
            print(f"batch {batch_size}, {name:12s} {rate:9.0f} images/s, share {rows[-1]['share']:.2f}", flush=True)
    save(pd.DataFrame(rows), options.out)


def ours(split: data.Dataset, options: argparse.Namespace, batch_size: int, device: torch.device) -> Iterator[float]:
    model, config = fresh(split, options.arch, device), train.TrainConfig(epochs=options.epochs, batch_size=batch_size)
    times: list[float] = []

    def note(epochs: range) -> Iterator[int]:
        for epoch in epochs:
            start = now(device)
            yield epoch
            times.append(now(device) - start)

    train.fit(model, split.to(device), config, generator=torch.Generator().manual_seed(0), watch=note)
    yield from times


def fixed_batch(
    split: data.Dataset, options: argparse.Namespace, batch_size: int, device: torch.device, *, compiled: bool = False
) -> Iterator[float]:
    model = fresh(split, options.arch, device).train()
    images, labels = split.subset(slice(batch_size)).floats().to(device), split.labels[:batch_size].to(device)
    optimizer = gpu.sgd(model.parameters(), device, lr=0.01, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(model) if compiled else model

    def descend(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with gpu.half(device):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = gpu.replayed(descend, device)
    for _ in range(options.epochs):
        start = now(device)
        for _ in range(len(split) // batch_size):
            step(images, labels)
        yield now(device) - start


def compiled(
    split: data.Dataset, options: argparse.Namespace, batch_size: int, device: torch.device
) -> Iterator[float]:
    return fixed_batch(split, options, batch_size, device, compiled=True)


def peers(split: data.Dataset, options: argparse.Namespace, batch_size: int, device: torch.device) -> Iterator[float]:
    loader = pictures_loader(split, batch_size, options.workers, device)
    model = fresh(split, options.arch, device).to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(options.epochs):
        start, total = now(device), 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield now(device) - start


def pictures_loader(split: data.Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """The peers' batches."""
    from PIL import Image
    from torchvision import transforms

    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    pictures = [Image.fromarray(image) for image in split.images.permute(0, 2, 3, 1).numpy()]
    dataset = Pictures(pictures, split.labels.tolist(), transforms.Compose(steps))
    pinned = device.type == "cuda"
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned)


class Pictures(torch.utils.data.Dataset):
    """PIL images with a transform for each sample."""

    def __init__(self, pictures: list, labels: list[int], transform):
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


WAYS = {"ours": ours, "fixed batch": fixed_batch, "peers": peers, "compiled": compiled}


def fresh(split: data.Dataset, arch: str, device: torch.device) -> nn.Module:
    return models.build(arch, split.images, len(split.classes), generator=torch.Generator().manual_seed(0)).to(device)


def random_split(count: int) -> data.Dataset:
    """Random pixels of CIFAR-10's size, with its crops and flips."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return data.Dataset("random", images, torch.arange(count) % 10, tuple("0123456789"), crop_padding=4, flip=True)


def now(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product of random numbers, the median of several."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13):
        start = now(device)
        a @ b
        times.append(now(device) - start)
    return 2 * size**3 / statistics.median(times[3:])


def flops(arch: str, split: data.Dataset) -> int:
    """Floating-point operations of forward and backward for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    model = fresh(split, arch, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(split.subset(slice(2)).floats()), split.labels[:2]).backward()
    return counter.get_total_flops() // 2


def save(rows: pd.DataFrame, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out.with_suffix(".csv"), index=False)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (value, label), ax in zip(
        {"images_per_s": "images/s", "share": "share of the matmul rate"}.items(), axes, strict=True
    ):
        sns.barplot(rows, x="way", y=value, hue="batch", palette="colorblind", ax=ax)
        ax.set(xlabel="", ylabel=label)
    figure.suptitle(f"{rows['arch'].iloc[0]} · {rows['device'].iloc[0]}", fontsize=10)
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
