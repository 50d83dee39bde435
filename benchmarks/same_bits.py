"""Whether two CPUs give the same bits: a hash of the quick profile's network after six steps, and the settings that matter.

    export OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE      as `make reproduce` does
    python -m benchmarks.same_bits
    qemu-x86_64 -cpu EPYC-Rome .venv/bin/python -m benchmarks.same_bits        another CPU, emulated: a quarter of an hour

Prints what stands in benchmarks/same_bits.csv behind the name of the CPU; the last two columns are hashes after five steps of Adam,
plain and fused.

PyTorch takes a square root by MKL's vector functions.  On an AMD EPYC with AVX-512 these end otherwise than on the emulated CPUs, in
the last bit of every seventh number, and heed none of the settings.  So does plain Adam; fused, it takes the CPU's own root.
"""

import hashlib
import os
from collections.abc import Iterable

import torch

from bdlib import experiment, gpu, models, train


def main() -> None:
    split, _ = experiment.load_data("quick", "signs")
    some = split.subset(slice(96))
    generator = torch.Generator().manual_seed(0)
    model = models.build("preact_resnet18:8", some.images, len(some.classes), generator=generator)
    train.fit(model, some, train.TrainConfig(epochs=2, batch_size=32, lr=0.1), generator=generator)
    settings = " ".join(f"{name}={os.environ[name]}" for name in gpu.SAME_BITS if name in os.environ) or "none"
    hashes = digest(model.state_dict().values()), adam(), adam(fused=True)
    print(settings, torch.backends.cpu.get_cpu_capability(), torch.__version__, *hashes, sep=",")


def adam(*, fused: bool = False) -> str:
    """A hash of 5,000 numbers after five steps of Adam."""
    generator = torch.Generator().manual_seed(0)
    numbers, goal = torch.rand(2, 5000, generator=generator)
    weight = torch.nn.Parameter(numbers)
    optimizer = torch.optim.Adam([weight], lr=0.01, fused=fused)
    for _ in range(5):
        weight.grad = weight.detach() - goal
        optimizer.step()
    return digest([weight.detach()])


def digest(tensors: Iterable[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    main()
