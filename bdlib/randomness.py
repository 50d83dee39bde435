"""The global random state of PyTorch, set from a generator for one block and put back after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[None]:
    """For code that draws from the global state and takes no generator (initial weights, dropout).

    The generator itself is not moved on; the global state, on the CPU and on `device`, is as before after the block.
    """
    device = torch.device(device)
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (), generator=copy)))
        yield
