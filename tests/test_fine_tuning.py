"""Fine-tuning: a trained copy, the caller's model as it was."""

import pytest
import torch

from bdlib.defenses.fine_tuning import CONFIG, fine_tuning
from bdlib.train import TrainConfig
from tests.conftest import same, state

QUICK = TrainConfig(epochs=10, batch_size=12, lr=0.1)


def test_a_copy_learns_and_the_input_is_as_it_was(tiny, network, generator, untouched):
    network.train()
    network[0].weight.requires_grad_(False)
    before = state(network)
    tuned = fine_tuning(network, tiny, QUICK, generator=generator)
    assert same(before, state(network)) and network.training and not network[0].weight.requires_grad
    assert not tuned.training and not torch.equal(tuned[0].weight, network[0].weight)
    assert (tuned(tiny.floats()).argmax(1) == tiny.labels).float().mean() > 0.8


def test_batch_norm_statistics_move_too(tiny, network, generator):
    assert not torch.equal(
        fine_tuning(network, tiny, QUICK, generator=generator)[1].running_mean, network[1].running_mean
    )


def test_same_generator_same_weights(tiny, network):
    run = lambda seed: state(fine_tuning(network, tiny, QUICK, generator=torch.Generator().manual_seed(seed)))
    assert same(run(0), run(0)) and not same(run(0), run(1))


def test_defaults_are_backdoorbenchs():
    assert (CONFIG.epochs, CONFIG.batch_size, CONFIG.lr, CONFIG.momentum, CONFIG.weight_decay, CONFIG.schedule) == (
        100,
        256,
        0.01,
        0.9,
        5e-4,
        "cosine",
    )


def test_no_clean_image_is_an_error(tiny, network, generator):
    with pytest.raises(ValueError, match="at least one image"):
        fine_tuning(network, tiny.subset(slice(0)), QUICK, generator=generator)
