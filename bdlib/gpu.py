"""What keeps a GPU busy: steps replayed in one launch, kernels side by side, compiled networks, optimizers and draws on it, bfloat16.

A network for 32 x 32 pixels has a thousand small kernels a step, and a GPU runs them faster than Python can ask for them.
On a CPU everything here but Adam and the root is plain PyTorch, to the bit.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

Made = TypeVar("Made")
Step = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
LONG = 1_000_000  # images of a training, about, that pay for the time it takes to find or make faster kernels
# One kernel for many small ones, as the casts of all weights: 4% of a training at batch 128 on an H200.
_COMPILE = {"max_autotune_pointwise": True, "combo_kernels": True}
_BEFORE = 3  # calls before a step is recorded: libraries choose their kernels, optimizers make their buffers

# What the Makefile sets so that every x86-64 CPU with AVX2 gives the same bits (benchmarks/same_bits.py).  MKL takes other ways on
# Intel's and AMD's CPUs with every other MKL_CBWR (its developer guide, "Specifying Code Branches").
SAME_BITS = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
}


def same_bits() -> bool:
    """Whether this process was started with SAME_BITS."""
    return all(os.environ.get(name) == value for name, value in SAME_BITS.items())


def arithmetic(device: torch.device) -> str:
    """How `train.fit` computes there, for the keys of stored models: other arithmetic, other weights."""
    if device.type == "cpu" and same_bits():
        return "cpu, the same bits on all"
    return "cuda, bfloat16, compiled" if device.type == "cuda" else device.type


def root(values: torch.Tensor) -> torch.Tensor:
    """The square root, with the same bits on every CPU: of float32 PyTorch takes MKL's, whose last bit heeds no setting."""
    return values.double().sqrt().to(values.dtype)


def half(device: torch.device) -> AbstractContextManager:
    """A block whose matrix products and convolutions run in bfloat16 on a GPU; weights and their gradients stay float32."""
    if device.type != "cuda":
        return nullcontext()
    # No cache of cast weights: it would outlast a recorded step.
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def compiled(model: nn.Module, device: torch.device, images: int, batch_size: int) -> Callable:
    """The model; on a GPU, for a training on so many images, its compiled form for full batches: the same weights, a third faster.

    Compiled once for all networks of one architecture and batch size in a process.  On an H200 that took 13 to 47 s, and saves 7 s of
    30 epochs on CIFAR-10.  TORCH_COMPILE_DISABLE=1 switches it off.
    """
    if not _is_long(device, images) or not _can_compile():
        return model
    fast = torch.compile(model, dynamic=False, options=_COMPILE)
    # The rest of an epoch is not worth compiling for its size.
    return lambda batch: (fast if len(batch) == batch_size else model)(batch)


def _is_long(device: torch.device, images: int) -> bool:
    """Whether a training on so many images pays there for a search for faster kernels."""
    return device.type == "cuda" and images >= LONG


@functools.cache
def _can_compile() -> bool:
    """Whether torch.compile works here: it asks for Triton, a C compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1, options=_COMPILE)(torch.zeros(1, device="cuda"))
    except Exception as error:  # each of the three is missed in its own way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"training goes on without torch.compile, which does not work here: {reason}")
        return False
    print("compiling for the GPU: up to a minute before the first epoch, once for each kind of network")
    return True


@contextmanager
def fastest_convolutions(device: torch.device, images: int) -> Iterator[None]:
    """A block, a training on so many images, in which a GPU tries each way to compute a convolution once and keeps to the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or _is_long(device, images)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def side_by_side(device: torch.device, first: Callable[[], Made], second: Callable[[], Made]) -> tuple[Made, Made]:
    """What both calls return; neither may need what the other makes.  On a GPU they run at the same time: small kernels leave room."""
    if device.type != "cuda":
        return first(), second()
    now, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(now)
    with torch.cuda.stream(beside):
        later = second()
    made = first()
    now.wait_stream(beside)
    return made, later


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on the device: this very one if it is there, otherwise one that starts where this one's next draw says."""
    if generator.device.type == device.type:
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))


def sgd(parameters: Iterable[torch.Tensor], device: torch.device, *, lr: float, **settings: object) -> torch.optim.SGD:
    """SGD.  On a GPU it is one kernel, and the rate lies there, so that schedulers change it in a recorded step too."""
    if device.type != "cuda":
        return torch.optim.SGD(parameters, lr=lr, **settings)
    return torch.optim.SGD(parameters, lr=torch.tensor(lr, device=device), fused=True, **settings)


def adam(
    parameters: Iterable[torch.Tensor], device: torch.device, *, lr: float, **settings: object
) -> torch.optim.Adam:
    """Adam, likewise; one kernel on a CPU too: it takes exact roots there, see `root`."""
    if device.type != "cuda":
        return torch.optim.Adam(parameters, lr=lr, fused=True, **settings)
    return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), fused=True, capturable=True, **settings)


def set_gradients(weights: dict[str, nn.Parameter], gradients: dict[str, torch.Tensor]) -> None:
    """Give each weight its gradient, laid out in memory as the weight is, which a fused optimizer asks for."""
    for name, weight in weights.items():
        gradient = gradients[name]
        same = gradient.stride() == weight.stride()
        weight.grad = gradient if same else torch.empty_like(weight).copy_(gradient)


def replayed(step: Step, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Step:
    """The step; on a GPU it is recorded once for each shape of its inputs (a CUDA graph), and later calls replay the recording.

    A recorded step must work on tensors alone: what Python decides, or reads from a tensor, is decided while recording.  What it
    returns is overwritten by the next call.  generators: those on the device that it draws from, but for PyTorch's own.
    """
    return _Replayed(step, generators) if device.type == "cuda" else step


class _Replayed:
    def __init__(self, step: Step, generators: Sequence[torch.Generator]):
        self.step, self.generators = step, generators
        self.stream = torch.cuda.Stream()
        self.calls: Counter = Counter()
        self.recordings: dict[tuple, tuple] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.recordings:
            self.calls[shapes] += 1
            if self.calls[shapes] <= _BEFORE:
                return self._plainly(inputs)
            self.recordings[shapes] = self._record(inputs)
        graph, places, outputs = self.recordings[shapes]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return outputs

    def _plainly(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The step itself, on the stream on which it will be recorded."""
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            outputs = self.step(*inputs)
        now.wait_stream(self.stream)
        return outputs

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> tuple:
        """(recording, where it reads its inputs, where it writes its outputs); nothing is computed yet."""
        places = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = self.step(*places)
        return graph, places, outputs
