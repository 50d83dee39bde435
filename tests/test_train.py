"""The training loop: one step by hand, schedules, the same bits twice, and errors instead of bad results."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib import models, train
from bdlib.data import replace
from bdlib.train import TrainConfig
from tests.conftest import same, state


def test_one_step_is_sgd_with_momentum_and_weight_decay(tiny):
    plain = replace(tiny, crop_padding=0, flip=False)
    start = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.load_state_dict(start.state_dict())
    train.fit(
        model,
        plain,
        TrainConfig(epochs=1, batch_size=36, lr=0.5, weight_decay=0.1, schedule="constant"),
        generator=torch.Generator(),
    )
    loss = F.cross_entropy(start(plain.floats()), plain.labels)
    gradient = torch.autograd.grad(loss, start[1].weight)[0] + 0.1 * start[1].weight
    assert torch.allclose(model[1].weight, start[1].weight - 0.5 * gradient, atol=1e-6)


def test_every_image_is_seen_once_an_epoch(tiny, monkeypatch):
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    monkeypatch.setattr(train, "crop_flip", lambda padded, picks, *_, generator: (seen.append(picks), padded[picks])[1])
    train.fit(
        model,
        replace(tiny, crop_padding=0),
        TrainConfig(epochs=2, batch_size=12),
        generator=torch.Generator().manual_seed(0),
    )
    assert [len(picks) for picks in seen] == [12] * 6
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(36))
    assert torch.cat(seen[:3]).tolist() != torch.cat(seen[3:]).tolist() != list(range(36))


def test_a_batch_is_never_larger_than_the_split(tiny, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        train, "crop_flip", lambda padded, picks, *_, generator: (sizes.append(len(picks)), padded[picks])[1]
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    train.fit(model, replace(tiny, crop_padding=0), TrainConfig(epochs=3, batch_size=500), generator=torch.Generator())
    assert sizes == [36, 36, 36]


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [16, 16]), (False, [16, 16, 4])])
def test_the_last_batch_is_left_out_or_not(tiny, monkeypatch, drop_last, sizes):
    seen = []
    monkeypatch.setattr(
        train, "crop_flip", lambda padded, picks, *_, generator: (seen.append(len(picks)), padded[picks])[1]
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    config = TrainConfig(epochs=1, batch_size=16, drop_last=drop_last)
    train.fit(model, replace(tiny, crop_padding=0), config, generator=torch.Generator())
    assert seen == sizes


def test_training_learns_and_ends_in_eval(tiny, network, generator):
    train.fit(network, tiny, TrainConfig(epochs=20, batch_size=12, lr=0.1), generator=generator)
    assert not network.training
    assert (network(tiny.floats()).argmax(1) == tiny.labels).float().mean() > 0.9


def test_the_same_seed_gives_the_same_bits(tiny, untouched):
    def once(seed):
        source = torch.Generator().manual_seed(seed)
        model = models.build("preact_resnet18:2", tiny.images, 3, generator=source)
        return state(train.fit(model, tiny, TrainConfig(epochs=2, batch_size=12, lr=0.1), generator=source))

    assert same(once(0), once(0)) and not same(once(0), once(1))


# If this fails, trained weights changed: raise train.VERSION, so that no stored model passes for a new one, then the number here.
def test_version_stands_for_these_weights(tiny):
    source = torch.Generator().manual_seed(0)
    model = models.build("preact_resnet18:2", tiny.images, 3, generator=source)
    train.fit(model, tiny, TrainConfig(epochs=1, batch_size=12, lr=0.1), generator=source)
    assert (train.VERSION, model.linear.weight.abs().sum().item()) == (2, pytest.approx(6.2137, rel=1e-3))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1, 0.854, 0.5, 0.146, 0]),
        ("one_cycle", [0.05, 0.938, 0.625, 0.313, 0]),
        ("constant", [1, 1, 1, 1, 1]),
    ],
)
def test_schedules_at_quarters_of_the_way(schedule, expected):
    factor = train.lr_factor(schedule, 100)
    assert [factor(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected, abs=1e-3)


def test_one_cycle_peaks_at_a_fifth():
    factor = train.lr_factor("one_cycle", 100)
    assert max(range(101), key=factor) in (19, 20) and factor(19) == pytest.approx(1)


def test_a_loss_that_is_no_number_is_an_error(tiny, network, generator):
    with pytest.raises(FloatingPointError, match=r"loss became (nan|inf) in epoch 1 of 3 at lr 1e\+30"):
        train.fit(network, tiny, TrainConfig(epochs=3, batch_size=12, lr=1e30), generator=generator)


def test_an_empty_split_is_an_error(tiny, network, generator):
    with pytest.raises(ValueError, match="at least one image"):
        train.fit(network, tiny.subset(slice(0)), TrainConfig(), generator=generator)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"batch_size": 0}, "batch_size"),
        ({"schedule": "step"}, "schedule must be one of"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def batches_of(dataset, batch_size=8, seed=0, **settings):
    source = torch.Generator().manual_seed(seed)
    return train.Batches(dataset, batch_size, torch.device("cpu"), generator=source, **settings)


def test_an_epoch_of_batches_is_every_image_once_with_its_label_and_position(tiny):
    plain = replace(tiny, crop_padding=0, flip=False)
    batches = batches_of(plain)
    epoch = list(batches)
    assert [len(labels) for _, labels, _ in epoch] == [8, 8, 8, 8, 4] and len(batches) == 5
    assert sorted(torch.cat([picks for _, _, picks in epoch]).tolist()) == list(range(36))
    for images, labels, picks in epoch:
        assert torch.equal(images, plain.images[picks].float() / 255) and torch.equal(labels, plain.labels[picks])


def test_batches_without_the_last_are_all_full(tiny):
    batches = batches_of(tiny, drop_last=True)
    assert [len(labels) for _, labels, _ in batches] == [8, 8, 8, 8] and len(batches) == 4
    assert [len(labels) for _, labels, _ in batches_of(tiny, 12, drop_last=True)] == [12, 12, 12]
    assert [len(labels) for _, labels, _ in batches_of(tiny, 500, drop_last=True)] == [36]


def test_the_order_of_batches_differs_between_epochs_and_repeats_with_the_seed(tiny, untouched):
    order = lambda batches: torch.cat([picks for _, _, picks in batches]).tolist()
    batches, again = batches_of(tiny), batches_of(tiny)
    first, second = order(batches), order(batches)
    assert first != second and (first, second) == (order(again), order(again))
    assert first != order(batches_of(tiny, seed=1)) and list(range(36)) not in (first, second)


def test_batches_are_cropped_and_flipped_where_the_dataset_allows(tiny):
    everything = lambda dataset: next(iter(batches_of(dataset, 36)))
    images, _, picks = everything(replace(tiny, crop_padding=0, flip=True))
    original = tiny.floats()[picks]
    flipped = [torch.equal(image, other.flip(2)) for image, other in zip(images, original, strict=True)]
    untouched = [torch.equal(image, other) for image, other in zip(images, original, strict=True)]
    assert 5 < sum(flipped) < 31 and sum(flipped) + sum(untouched) == 36
    images, _, picks = everything(replace(tiny, crop_padding=1, flip=False))
    padded = F.pad(tiny.floats()[picks], (1, 1, 1, 1))
    windows = [padded[:, :, dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)]
    hits = torch.stack([(images == window).flatten(1).all(1) for window in windows])
    assert hits.any(0).all() and (hits.sum(1) > 0).sum() > 5


def test_batches_of_nothing_are_an_error(tiny):
    with pytest.raises(ValueError, match="training needs at least one image, got an empty split"):
        batches_of(tiny.subset(slice(0)))


class Brightest(nn.Module):
    """Calls an image after its brightest channel in eval(), and after the darkest in train()."""

    def __init__(self):
        super().__init__()
        self.sign = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.mean((2, 3)) * (-self.sign if self.training else self.sign)


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_by_hand_in_eval_with_the_mode_put_back(tiny, training):
    many = tiny.subset(torch.arange(720) % 36)  # more than one pass
    wrong = torch.arange(720) >= 630
    model = Brightest().train(training)
    assert train.accuracy(model, many) == 1.0
    labels = torch.where(wrong, (many.labels + 1) % 3, many.labels)
    assert train.accuracy(model, replace(many, labels=labels)) == 0.875
    assert model.training == training and model.sign.requires_grad


def test_prediction_uses_eval_and_puts_the_mode_back(tiny, network):
    network.train()
    statistics = network[1].running_mean.clone()
    first = train.predict(network, tiny.images)
    assert torch.equal(first, train.predict(network, tiny.images)) and network.training
    assert torch.equal(statistics, network[1].running_mean)


def test_the_accuracy_on_no_image_is_refused(tiny):
    with pytest.raises(ValueError, match="accuracy needs at least one image, got none"):
        train.accuracy(torch.nn.Flatten(), tiny.subset(slice(0)))
