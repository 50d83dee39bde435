"""Whether two CPUs give the same bits: a hash of the quick profile's network after six steps, and the settings that matter.

    export OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE      as `make reproduce` does
    python -m benchmarks.same_bits
    qemu-x86_64 -cpu EPYC-Rome .venv/bin/python -m benchmarks.same_bits        another CPU, emulated: a quarter of an hour

Prints what stands in benchmarks/same_bits.csv behind the name of the CPU.
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


if __name__ == "__main__":
    main()
