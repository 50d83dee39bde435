"""Small fixtures: a dataset with three batches an epoch, a network with every kind of layer, a random source; the book, built once."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bdlib.data import Dataset
from tests.stored import ROOT

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def tiny() -> Dataset:
    """36 images of 3 classes, 8 x 8, told apart by their brightest channel."""
    source = torch.Generator().manual_seed(1)
    labels = torch.arange(36) % 3
    images = torch.randint(0, 120, (36, 3, 8, 8), generator=source)
    images[torch.arange(36), labels] += 120
    return Dataset(
        "tiny", images.to(torch.uint8), labels, ("red", "green", "blue"), crop_padding=1, flip=True, least_area=0.5
    )


@pytest.fixture
def network() -> nn.Module:
    """Convolutions with and without bias, batch norm, dropout and a linear layer, in training mode; not one of ours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(4, 6, 1, bias=False),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


@pytest.fixture(scope="session")
def s3():
    """A server that speaks S3, for this process and those that it starts."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    yield
    os.environ.clear()
    os.environ |= before
    server.stop()


@pytest.fixture
def bucket(s3, request):
    """An empty bucket of the test's own."""
    from upath import UPath

    found = UPath(f"s3://{abs(hash(request.node.nodeid))}", use_listings_cache=False)
    found.fs.mkdir(found.path)
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The book, built once: the finished process, and the folder of the site."""
    out = tmp_path_factory.mktemp("site") / "book"
    command = [sys.executable, "-m", "bdlib.book", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False), out


@pytest.fixture
def untouched():
    """Fails the test if the global random state changed in it."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state was touched"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
