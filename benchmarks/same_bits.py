"""Whether two CPUs give the same bits: hashes of a small network after training and after five defenses, and the settings that matter.

    export OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE      as `make reproduce` does
    python -m benchmarks.same_bits
    qemu-x86_64 -cpu EPYC-Rome .venv/bin/python -m benchmarks.same_bits        another CPU, emulated: three minutes

Prints what stands in benchmarks/same_bits.csv behind the name of the CPU: hashes of the weights after `train.fit`, by SGD, then after
AWM, CBD and I-BAU, by Adam, of the triggers of NC and the scores of CLP.  The last column is PyTorch's plain Adam, which nothing here
uses: it takes square roots by MKL's vector functions, which end otherwise on an AMD EPYC with AVX-512 than on the emulated CPUs, in
the last bit of every seventh number, and heed none of the settings.
"""

import hashlib
import os
from collections.abc import Iterable

import torch

from bdlib import experiment, gpu, models, train
from bdlib.defenses import awm, cbd, clp, i_bau, nc


def main() -> None:
    split, _ = experiment.load_data("quick", "signs")
    some = split.subset(slice(96))
    generator = torch.Generator().manual_seed(0)

    def make(generator: torch.Generator) -> torch.nn.Module:
        return models.build("preact_resnet18:8", some.images, len(some.classes), generator=generator)

    model = make(generator)
    train.fit(model, some, train.TrainConfig(epochs=2, batch_size=32, lr=0.1), generator=generator)
    clean = split.subset(slice(96, 104))
    generator = torch.Generator().manual_seed(1)
    made = [
        model,
        awm.awm(model, clean, awm.AwmConfig(outer_epochs=2, inner_epochs=2), generator=generator),
        cbd.cbd(make, clean, cbd.CbdConfig(batch_size=4, biased_epochs=1, epochs=2, lr=0.03), generator=generator),
        i_bau.i_bau(model, clean, i_bau.IBauConfig(rounds=2, radius=10.0), generator=generator),
    ]
    hashes = [digest(one.state_dict().values()) for one in made]
    triggers = nc.run(model, clean, nc.NcConfig(rounds=1, steps=2), generator=generator).triggers
    bounds = clp.channel_bounds(model, clean.floats()[:1])
    hashes += [digest(trigger.pattern for trigger in triggers), digest(bounds.values()), plain_adam()]
    settings = " ".join(f"{name}={os.environ[name]}" for name in gpu.SAME_BITS if name in os.environ) or "none"
    print(settings, torch.backends.cpu.get_cpu_capability(), torch.__version__, *hashes, sep=",")


def plain_adam() -> str:
    """A hash of 5,000 numbers after five steps of PyTorch's Adam as it is by default."""
    generator = torch.Generator().manual_seed(0)
    numbers, goal = torch.rand(2, 5000, generator=generator)
    weight = torch.nn.Parameter(numbers)
    optimizer = torch.optim.Adam([weight], lr=0.01)
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
