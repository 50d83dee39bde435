"""Whether two CPUs give the same bits: a hash of the quick profile's network after six steps, and the settings that matter.

    export OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE      as `make reproduce` does
    python -m benchmarks.same_bits
    qemu-x86_64 -cpu EPYC-Rome .venv/bin/python -m benchmarks.same_bits        another CPU, emulated: a quarter of an hour

Prints what stands in benchmarks/same_bits.csv behind the name of the CPU.  Its last two columns are hashes after five steps of Adam,
plain and fused:

    python -c "from benchmarks import same_bits; print(same_bits.adam(), same_bits.adam(fused=True))"

PyTorch takes a square root by MKL's vector functions.  On an AMD EPYC with AVX-512 these end otherwise than on the emulated CPUs, in
the last bit of every seventh number, and heed none of the settings.  So does plain Adam; fused, it takes the CPU's own root.
"""

import hashlib
import os

import torch

from bdlib import experiment, gpu, models, train


def main() -> None:
    split, _ = experiment.load_data("quick", "signs")
    some = split.subset(slice(96))
    generator = torch.Generator().manual_seed(0)
    model = models.build("preact_resnet18:8", some.images, len(some.classes), generator=generator)
    train.fit(model, some, train.TrainConfig(epochs=2, batch_size=32, lr=0.1), generator=generator)
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    settings = " ".join(f"{name}={os.environ[name]}" for name in gpu.SAME_BITS if name in os.environ) or "none"
    print(settings, torch.backends.cpu.get_cpu_capability(), torch.__version__, digest.hexdigest()[:12], sep=",")


def adam(*, fused: bool = False) -> str:
    """A hash of 5,000 numbers after five steps of Adam."""
    generator = torch.Generator().manual_seed(0)
    numbers, goal = torch.rand(2, 5000, generator=generator)
    weight = torch.nn.Parameter(numbers)
    optimizer = torch.optim.Adam([weight], lr=0.01, fused=fused)
    for _ in range(5):
        weight.grad = weight.detach() - goal
        optimizer.step()
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
