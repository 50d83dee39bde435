"""CBD: one test for each numbered step that fails when its line is broken, then the contract of every defense."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib.defenses import cbd
from bdlib.defenses.cbd import CbdConfig
from bdlib.explain import WithEmbedding, with_embedding
from bdlib.randomness import seeded
from tests.conftest import same, state

CPU = torch.device("cpu")
QUICK = CbdConfig(batch_size=12, biased_epochs=2, epochs=3)
# Every image in one batch, as it is: then a step can be worked out by hand.
BY_HAND = CbdConfig(
    batch_size=36,
    biased_epochs=3,
    biased_lr=0.3,
    epochs=3,
    lr=0.5,
    schedule="constant",
    momentum=0.8,
    weight_decay=0.1,
    cutout=0,
    mi_weight=0.0,
)


@pytest.fixture
def plain(tiny):
    """The images without crops and flips."""
    return replace(tiny, crop_padding=0, flip=False)


def make_model(generator):
    """A small network with batch norm and an embedding of 4 values."""
    with seeded(generator):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )


def make_smooth(generator):
    """Two linear layers and a tanh: no batch norm, so that an image's loss does not depend on its batch."""
    with seeded(generator):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 3))


def known(seed):
    """A function that makes a smooth network of known weights, and that network."""
    start = make_smooth(torch.Generator().manual_seed(seed))
    return lambda generator: make_copy(start), make_copy(start)


def make_copy(model):
    twin = make_smooth(torch.Generator())
    twin.load_state_dict(model.state_dict())
    return twin


def nesterov(model, velocity, loss, lr):
    """One step of SGD with Nesterov's momentum .8 and weight decay .1, in place; the velocity after it."""
    weights = list(model.parameters())
    velocity = velocity or [torch.zeros_like(weight) for weight in weights]
    for weight, speed, slope in zip(weights, velocity, torch.autograd.grad(loss, weights), strict=True):
        gradient = slope + 0.1 * weight.detach()
        speed.mul_(0.8).add_(gradient)
        weight.data -= lr * (gradient + 0.8 * speed)
    return velocity


def close(a, b):
    return all(torch.allclose(a.state_dict()[name], b.state_dict()[name], atol=1e-5) for name in a.state_dict())


def embedding_by_hand(model, images):
    return torch.tanh(images.flatten(1) @ model[1].weight.T + model[1].bias)


class StandIn(nn.Module):
    """In the critic's place: a known estimate, and a note of what it was asked."""

    made = None

    def __init__(self, width, config, device):
        super().__init__()
        StandIn.made, self.width, self.fits = self, width, 0

    def fit(self, pairs, climb, batches):
        self.fits += 1
        return torch.tensor(float(self.fits))

    def estimate(self, biased, clean):
        return (3 * biased * clean).sum(1).mean() + clean.square().mean()


def test_step_1_by_hand_with_the_losses_at_the_images_positions(plain, generator):
    make, model = known(5)
    expected, velocity = [], None
    for _ in range(3):
        each = F.cross_entropy(model(plain.floats()), plain.labels, reduction="none")
        expected.append(each.detach())
        velocity = nesterov(model, velocity, each.mean(), lr=0.3)
    biased, losses = cbd.train_biased(make, plain, BY_HAND, generator=generator)
    assert losses.shape == (3, 36) and torch.allclose(losses, torch.stack(expected), atol=1e-5)
    assert close(biased, model) and not losses.requires_grad


def test_step_1_each_batch_writes_to_its_own_images(plain, generator):
    make, model = known(5)
    config = replace(BY_HAND, batch_size=8, biased_lr=1e-9)
    _, losses = cbd.train_biased(make, plain, config, generator=generator)
    expected = F.cross_entropy(model(plain.floats()), plain.labels, reduction="none").detach()
    assert torch.allclose(losses, expected.expand(3, 36), atol=1e-4)


def test_step_1_ends_frozen_and_stays_so_while_the_second_network_learns(tiny, generator):
    biased, _ = cbd.train_biased(make_model, tiny, QUICK, generator=generator)
    assert not biased.training and not any(weight.requires_grad for weight in biased.parameters())
    before, modes = state(biased), []
    biased.register_forward_hook(lambda module, inputs, output: modes.append((module.training, output.requires_grad)))
    model, _, _ = cbd.train_clean(make_model, biased, tiny, QUICK, generator=generator)
    assert set(modes) == {(False, False)} and same(before, state(biased)) and not biased.training
    assert not model.training and all(weight.requires_grad for weight in model.parameters())


def test_steps_2_4_and_5_by_hand_without_the_critic(plain, generator):
    (_, biased), (make, model) = known(5), known(6)
    easy = F.cross_entropy(biased(plain.floats()), plain.labels, reduction="none").detach()
    expected, velocity = [], None
    for _ in range(3):
        each = F.cross_entropy(model(plain.floats()), plain.labels, reduction="none")
        weight = (easy / (easy + each)).detach()  # no gradient through the weights
        expected.append(36 * weight / weight.sum())
        velocity = nesterov(model, velocity, (expected[-1] * each).mean(), lr=0.5)
    trained, weights, estimates = cbd.train_clean(make, biased, plain, BY_HAND, generator=generator)
    assert close(trained, model) and torch.allclose(weights, torch.stack(expected), atol=1e-4)
    assert weights.std(1).min() > 0.01 and weights.mean(1).tolist() == pytest.approx([1, 1, 1])
    assert estimates.tolist() == [0, 0, 0]


def test_without_reweighting_every_image_counts_1(plain, generator):
    (_, biased), (make, model) = known(5), known(6)
    nesterov(model, None, F.cross_entropy(model(plain.floats()), plain.labels), lr=0.5)
    config = replace(BY_HAND, epochs=1, reweight=False)
    trained, weights, _ = cbd.train_clean(make, biased, plain, config, generator=generator)
    assert close(trained, model) and (weights == 1).all() and weights.shape == (1, 36)


def test_the_weights_are_of_the_batch_and_at_the_images_positions(plain, generator):
    (_, biased), (make, model) = known(5), known(6)
    easy, hard = (F.cross_entropy(each(plain.floats()), plain.labels, reduction="none") for each in (biased, model))
    config = replace(BY_HAND, batch_size=8, lr=1e-9, epochs=1)
    _, weights, _ = cbd.train_clean(make, biased, plain, config, generator=generator)
    factor = weights[0] / (easy / (easy + hard))  # one factor a batch of 8, 8, 8, 8 and 4
    _, sizes = (factor.detach() * 1000).round().unique(return_counts=True)
    assert sorted(sizes.tolist()) == [4, 8, 8, 8, 8] and weights.mean().item() == pytest.approx(1, abs=1e-4)


def test_step_4_by_hand():
    # .5, .75, 0 with sum 1.25, times 3 / 1.25
    weights = cbd.sample_weights(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert weights.tolist() == pytest.approx([1.2, 1.8, 0.0])
    assert cbd.sample_weights(torch.zeros(2), torch.zeros(2)).tolist() == [0, 0]


def test_step_5_adds_the_critics_estimate_times_its_weight(plain, generator, monkeypatch):
    monkeypatch.setattr(cbd, "Critic", StandIn)
    (_, biased), (make, model) = known(5), known(6)
    images = plain.floats()
    r = embedding_by_hand(biased, images).detach()
    velocity = None
    for _ in range(3):
        z = embedding_by_hand(model, images)
        loss = F.cross_entropy(z @ model[3].weight.T + model[3].bias, plain.labels)
        loss = loss + 0.6 * ((3 * r * z).sum(1).mean() + z.square().mean())
        velocity = nesterov(model, velocity, loss, lr=0.5)
    config = replace(BY_HAND, reweight=False, mi_weight=0.6)
    trained, _, estimates = cbd.train_clean(make, biased, plain, config, generator=generator)
    assert close(trained, model)
    assert estimates.tolist() == [1, 2, 3] and StandIn.made.width == 4  # fitted once in each epoch


def test_no_weight_no_critic(tiny, generator, monkeypatch):
    def fail(*_):
        raise AssertionError("the critic was asked")

    monkeypatch.setattr(cbd.Critic, "fit", fail)
    monkeypatch.setattr(cbd.Critic, "estimate", fail)
    result = cbd.run(make_model, tiny, replace(QUICK, mi_weight=0.0), generator=generator)
    assert result.critic.tolist() == [0, 0, 0]


def hand_made_critic(**settings):
    critic = cbd.Critic(2, CbdConfig(critic_dropout=0.0, **settings), CPU)
    critic.first.weight.data = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, -1.0, 3.0, -2.0]])
    critic.first.bias.data = torch.tensor([0.5, -1.0])
    critic.second.weight.data, critic.second.bias.data = torch.tensor([[2.0, -3.0]]), torch.tensor([0.25])
    return critic


PAIRS = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, -1.0], [1.0, 1.0]])


def value_by_hand(r, z):
    a = r[0] + 2 * r[1] - z[0] + 0.5 * z[1] + 0.5
    b = -r[1] + 3 * z[0] - 2 * z[1] - 1.0
    leaky = lambda x: x if x > 0 else 0.01 * x
    return 2 * leaky(a) - 3 * leaky(b) + 0.25


def test_step_3_the_estimate_by_hand_pairs_against_the_one_before():
    r, z = (each.tolist() for each in PAIRS)
    paired = sum(value_by_hand(r[k], z[k]) for k in range(3)) / 3
    shuffled = (value_by_hand(r[0], z[2]) + value_by_hand(r[1], z[0]) + value_by_hand(r[2], z[1])) / 3
    assert abs(paired - shuffled) > 0.1
    assert hand_made_critic().estimate(*PAIRS).item() == pytest.approx(paired - shuffled, rel=1e-5)


def test_step_3_dropout_before_each_layer_and_always_on(monkeypatch):
    critic = hand_made_critic().eval()
    critic.config = CbdConfig(critic_dropout=0.4)
    critic.first.bias.data.zero_()
    critic.second.bias.data.zero_()
    with seeded(torch.Generator()):
        assert len({critic(*PAIRS).sum().item() for _ in range(20)}) > 1
    plain = F.leaky_relu(torch.cat(PAIRS, 1) @ critic.first.weight.T) @ critic.second.weight.T
    asked = []
    monkeypatch.setattr(F, "dropout", lambda x, p: (asked.append((tuple(x.shape), p)), 2 * x)[1])
    assert torch.allclose(critic(*PAIRS), 4 * plain) and asked == [((3, 4), 0.4), ((3, 2), 0.4)]


@pytest.mark.parametrize(
    ("kind", "first", "first_bias", "second", "second_bias"),
    [
        ("root", [[2.0, 0, 0, 0], [0, 0.5, 0, 0]], [3 / math.sqrt(5), 4 / math.sqrt(5)], [[0.0, 3.0]], [0.5]),
        ("spectral", [[1.0, 0, 0, 0], [0, 0.25, 0, 0]], [0.6, 0.8], [[0.0, 1.0]], [1.0]),
    ],
)
def test_step_3_divides_by_the_largest_singular_value_or_its_root(kind, first, first_bias, second, second_bias):
    critic = hand_made_critic(lipschitz=kind)
    critic.first.weight.data = torch.tensor([[4.0, 0, 0, 0], [0, 1.0, 0, 0]])
    critic.first.bias.data = torch.tensor([3.0, 4.0])
    critic.second.weight.data, critic.second.bias.data = torch.tensor([[0.0, 9.0]]), torch.tensor([0.25])
    critic.smooth()
    assert torch.allclose(critic.first.weight, torch.tensor(first))
    assert torch.allclose(critic.first.bias, torch.tensor(first_bias))
    assert torch.allclose(critic.second.weight, torch.tensor(second))
    assert torch.allclose(critic.second.bias, torch.tensor(second_bias))


@pytest.mark.parametrize("shape", [(64, 128), (1, 64), (64, 1), (5, 3)])
def test_step_3_the_largest_singular_value_by_powers_as_a_gpu_finds_it(generator, shape):
    matrix = torch.randn(shape, generator=generator)
    assert cbd.norm_by_powers(matrix).item() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-5)
    assert 1 - 1e-6 <= cbd.norm_by_powers(torch.eye(64)).item() <= 1.001  # the worst case: all are equal


def test_step_3_a_layer_of_zeros_stays_one():
    critic = hand_made_critic()
    critic.first.bias.data.zero_()
    critic.smooth()
    assert (critic.first.bias == 0).all()


@pytest.fixture
def embedders():
    """f_B and f_C whose embeddings of an image (1, 1, 2) are the image and its mirror image."""
    models = []
    for _ in range(2):
        models.append(nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 3)))
    models[0][1].weight.data, models[1][1].weight.data = torch.eye(2), torch.eye(2).flip(0)
    return models[0].eval().requires_grad_(False), models[1].train()


def batch_of(images):
    return images[:, None, None, :], None, None


def fit(critic, networks, batches):
    with WithEmbedding(networks[0]) as biased, WithEmbedding(networks[1]) as clean:
        pairs = lambda images: cbd.embeddings(biased, clean, images)
        return critic.fit(pairs, lambda images, *earlier: (critic.step(*earlier), *pairs(images)), batches)


def test_step_3_the_critic_climbs_and_reports_its_mean(embedders, generator, monkeypatch):
    monkeypatch.setattr(cbd.Critic, "smooth", lambda self: None)
    critic = hand_made_critic(cutout=0, critic_lr=0.01)
    start = hand_made_critic()
    images = PAIRS[0]
    estimate = start.estimate(images, images.flip(1))
    slopes = torch.autograd.grad(estimate, list(start.parameters()), allow_unused=True)
    critic.first.bias.grad = torch.full((2,), 100.0)  # what f_C's steps left behind does not count
    reported = fit(critic, embedders, [batch_of(images)])
    assert reported.item() == pytest.approx(estimate.item(), rel=1e-5) and not reported.requires_grad
    # Adam's first step is the rate in the direction of the slope
    for after, before, slope in zip(critic.parameters(), start.parameters(), slopes, strict=True):
        moved = torch.where(slope.abs() > 1e-3, slope.sign() * 0.01, 0.0)
        assert torch.allclose((after - before)[slope.abs() > 1e-3], moved[slope.abs() > 1e-3], atol=1e-4)
    assert critic.estimate(images, images.flip(1)) > estimate


def test_step_3_the_mean_is_over_the_batches(embedders, generator, monkeypatch):
    monkeypatch.setattr(cbd.Critic, "smooth", lambda self: None)
    critic = hand_made_critic(cutout=0, critic_lr=1e-9)
    batches = [PAIRS[0], PAIRS[1], PAIRS[0] * 2]
    expected = sum(critic.estimate(images, images.flip(1)).item() for images in batches) / 3
    reported = fit(critic, embedders, [batch_of(images) for images in batches])
    assert reported.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["root", "spectral"])
def test_step_3_the_critic_is_made_smooth_after_each_of_its_steps(embedders, generator, monkeypatch, kind):
    before_smoothing = []
    smooth = cbd.Critic.smooth
    monkeypatch.setattr(cbd.Critic, "smooth", lambda self: (before_smoothing.append(state(self)), smooth(self))[1])
    critic = hand_made_critic(cutout=0, lipschitz=kind)
    fit(critic, embedders, [batch_of(PAIRS[0])] * 4)
    assert len(before_smoothing) == 4
    largest = torch.linalg.svdvals(before_smoothing[-1]["first.weight"])[0].item()
    divisor = math.sqrt(largest) if kind == "root" else largest
    assert torch.allclose(critic.first.weight, before_smoothing[-1]["first.weight"] / divisor, atol=1e-5)


def test_step_3_fits_the_critic_and_no_network(generator, tiny):
    with seeded(generator):
        critic = cbd.Critic(4, CbdConfig(), CPU)
    biased, model = (make_model(generator).train() for _ in range(2))
    biased.eval().requires_grad_(False)
    weights = [weight.detach().clone() for weight in model.parameters()]
    before, mean = [weight.detach().clone() for weight in critic.parameters()], model[1].running_mean.clone()
    with seeded(generator):
        fit(critic, (biased, model), [(tiny.floats(), None, None)])
    assert critic.first.weight.shape == (4, 8) and critic.second.weight.shape == (1, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    assert not torch.equal(mean, model[1].running_mean) and model.training  # as in the code
    assert not any(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))


@pytest.mark.parametrize(("epochs", "expected"), [(20, [0.2, 0.2, 0.2, 0.02, 0.02]), (3, [0.02, 0.002, 0.0002])])
def test_the_critics_rate_falls_every_fifth_of_the_epochs(embedders, generator, epochs, expected):
    critic = hand_made_critic(cutout=0, epochs=epochs)
    assert isinstance(critic.optimizer, torch.optim.Adam)
    rates = []
    for _ in expected:
        fit(critic, embedders, [batch_of(PAIRS[0])])
        rates.append(critic.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)


def test_the_critic_learns_in_a_run(tiny, generator):
    """A dependence that is there: both embeddings show the class, so their pairs can be told from others."""
    config = replace(QUICK, mi_weight=1e-6, biased_epochs=8, epochs=15, critic_lr=0.02, critic_dropout=0.0)
    estimates = cbd.run(make_model, tiny, config, generator=generator).critic
    assert estimates.shape == (15,) and estimates[-5:].min() > 0


def test_embedding_and_logits_are_from_one_pass(plain):
    model = make_smooth(torch.Generator())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    logits, embedding = with_embedding(model, plain.floats())
    assert torch.allclose(embedding, embedding_by_hand(model, plain.floats()), atol=1e-6) and len(calls) == 1
    assert torch.allclose(logits, model[3](embedding), atol=1e-6)
    assert not model[3]._forward_pre_hooks and embedding.requires_grad


def test_cutout_on_every_image_of_both_networks(tiny, generator, monkeypatch):
    asked, seen = [], []
    dark = lambda images, size, generator: (asked.append(size), torch.zeros_like(images))[1]
    monkeypatch.setattr(cbd, "cutout", dark)

    def make(source):
        model = make_model(source)
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].max().item()))
        return model

    cbd.run(make, tiny, replace(QUICK, cutout=5), generator=generator)
    # f_B: 2 epochs of 3 batches; f_C: 3 epochs of 3 for the critic and 3 for itself
    assert asked == [5] * (2 * 3 + 3 * 6) and len(seen) == 2 * 3 + 2 * 3 * 6 and set(seen) == {0.0}
    asked.clear()
    cbd.run(make, tiny, replace(QUICK, cutout=0), generator=generator)
    assert not asked


def test_cutout_keeps_most_of_the_image(generator):
    images = torch.full((20, 3, 8, 8), 0.5)
    out = cbd.augmented(images, CbdConfig(cutout=2), generator)
    holes = (out == 0).all(1).sum((1, 2))
    assert set(holes.tolist()) <= {1, 2, 4} and (images == 0.5).all()
    assert cbd.augmented(images, CbdConfig(cutout=0), generator) is images


def rates_of(monkeypatch, tiny, config):
    """Learning rate of f_B and of f_C at the start of each epoch."""
    optimizers, rates = [], []
    sgd = cbd.sgd
    monkeypatch.setattr(cbd, "sgd", lambda *a: (optimizers.append(sgd(*a)), optimizers[-1])[1])

    def watch(epochs):
        rates.append([])
        for epoch in epochs:
            rates[-1].append(optimizers[-1].param_groups[0]["lr"])
            yield epoch

    cbd.run(make_model, tiny, config, generator=torch.Generator().manual_seed(0), watch=watch)
    return rates


def test_the_rate_falls_after_20_and_70_percent_of_the_epochs(tiny, monkeypatch):
    config = replace(QUICK, biased_epochs=4, biased_lr=0.05, epochs=10, lr=0.2, mi_weight=0.0)
    biased, clean = rates_of(monkeypatch, tiny, config)
    assert biased == [0.05] * 4
    assert clean == pytest.approx([0.2] * 2 + [0.02] * 5 + [0.002] * 3)


def test_the_rates_follow_schedules_of_our_own(tiny, monkeypatch):
    config = replace(QUICK, epochs=4, lr=0.2, mi_weight=0.0, schedule="cosine")
    config = replace(config, biased_epochs=3, biased_lr=0.4, biased_schedule="cosine")
    biased, clean = rates_of(monkeypatch, tiny, config)
    assert biased == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 3)) for k in range(3)])
    assert clean == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_a_run_is_the_two_networks_and_what_was_seen(tiny, generator, monkeypatch):
    made = {}
    for name in ("train_biased", "train_clean"):
        function = getattr(cbd, name)
        spy = lambda *a, f=function, n=name, **k: made.setdefault(n, f(*a, **k))
        monkeypatch.setattr(cbd, name, spy)
    result = cbd.run(make_model, tiny, QUICK, generator=generator)
    assert (result.biased_losses.shape, result.weights.shape, result.critic.shape) == ((2, 36), (3, 36), (3,))
    assert result.biased is made["train_biased"][0] and result.model is made["train_clean"][0] is not result.biased
    assert result.weights.mean(1).tolist() == pytest.approx([1, 1, 1]) and (result.biased_losses > 0).all()
    assert not any(each.requires_grad for each in (result.biased_losses, result.weights, result.critic))
    assert not result.model.training and not result.biased.training


def test_the_defense_is_the_second_network_of_a_run(tiny, untouched):
    model = cbd.cbd(make_model, tiny, QUICK, generator=torch.Generator().manual_seed(3))
    result = cbd.run(make_model, tiny, QUICK, generator=torch.Generator().manual_seed(3))
    assert same(state(model), state(result.model)) and not model.training


def test_it_learns_the_task(tiny, generator):
    model = cbd.cbd(make_model, tiny, replace(QUICK, epochs=15), generator=generator)
    assert (model(tiny.floats()).argmax(1) == tiny.labels).float().mean() > 0.8


def test_the_images_are_as_they_were(tiny, generator):
    before, padding, flip = tiny.sha256(), tiny.crop_padding, tiny.flip
    cbd.cbd(make_model, tiny, QUICK, generator=generator)
    assert (tiny.sha256(), tiny.crop_padding, tiny.flip) == (before, padding, flip)


def test_same_generator_same_weights(tiny, untouched):
    def once(seed):
        result = cbd.run(make_model, tiny, QUICK, generator=torch.Generator().manual_seed(seed))
        return state(result.model) | {"biased": result.biased_losses, "critic": result.critic}

    assert same(once(0), once(0)) and not same(once(0), once(1))


def test_same_generator_same_weights_with_dropout_in_the_network(tiny, untouched):
    def make(generator):
        model = make_model(generator)
        return nn.Sequential(*model[:5], nn.Dropout(0.5), model[5])

    once = lambda: state(cbd.cbd(make, tiny, QUICK, generator=torch.Generator().manual_seed(0)))
    assert same(once(), once())


def test_defaults_are_the_official_codes():
    config = CbdConfig()
    assert (config.batch_size, config.biased_epochs, config.biased_lr, config.epochs, config.lr) == (
        64,
        5,
        0.1,
        100,
        0.1,
    )
    assert (config.momentum, config.weight_decay, config.cutout) == (0.9, 1e-4, 3)
    assert (config.biased_schedule, config.schedule) == ("constant", "steps")
    assert (config.critic_lr, config.critic_dropout, config.lipschitz) == (0.2, 0.2, "root")
    assert config.reweight and config.mi_weight > 0


def test_large_splits_have_the_official_setting_and_small_ones_a_lower_rate_and_fewer_epochs():
    assert cbd.recipe(25_000) == cbd.recipe(50_000) == CbdConfig()
    small = cbd.recipe(24_999)
    assert (small.biased_lr, small.biased_schedule, small.lr, small.schedule) == (0.03, "one_cycle", 0.03, "one_cycle")
    assert (small.biased_epochs, small.epochs) == (2, 10)
    official = replace(
        small, biased_epochs=5, biased_lr=0.1, biased_schedule="constant", epochs=100, lr=0.1, schedule="steps"
    )
    assert official == CbdConfig()  # nothing else differs


def test_the_ablation_switches_off_what_its_names_say():
    variants = cbd.ablation(QUICK)
    off = {name: (not config.reweight, not config.mi_weight) for name, config in variants.items()}
    assert off["re-weighting alone"] == (False, True) and off["mutual information alone"] == (True, False)
    assert off["neither"] == (True, True) and list(off.values()).count((False, False)) == len(off) - 3
    assert [config.biased_epochs for name, config in variants.items() if name.startswith("f_B")] == [1, 4, 8]
    assert variants["critic 1-Lipschitz"] == replace(QUICK, lipschitz="spectral")


def test_the_released_variant_lacks_the_critics_term_alone():
    assert cbd.released_variant(QUICK) == replace(QUICK, mi_weight=0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"biased_epochs": 0}, "biased_epochs must be above 0, got 0"),
        ({"biased_lr": -0.1}, "biased_lr must be above 0, got -0.1"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"critic_lr": 0.0}, "critic_lr must be above 0, got 0.0"),
        ({"mi_weight": -0.01}, "mi_weight must not be negative, got -0.01"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative, got -0.0001"),
        ({"cutout": -1}, "cutout must not be negative, got -1"),
        ({"schedule": "step"}, "schedule must be one of steps, cosine, one_cycle, constant, got 'step'"),
        ({"biased_schedule": "steps"}, "biased_schedule must be one of cosine, one_cycle, constant, got 'steps'"),
        ({"lipschitz": "l1"}, "lipschitz must be one of root, spectral, got 'l1'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CbdConfig(**values)


def test_no_image_and_no_linear_layer_are_errors(tiny, generator):
    with pytest.raises(ValueError, match="at least one image"):
        cbd.cbd(make_model, tiny.subset(slice(0)), QUICK, generator=generator)
    bare = lambda source: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
        cbd.cbd(bare, tiny, QUICK, generator=generator)


@pytest.mark.parametrize(
    ("values", "where"), [({"biased_lr": 1e30}, "f_B"), ({"lr": 1e30, "mi_weight": 0.0}, "f_C"), ({"lr": 1e30}, "f_C")]
)
def test_a_loss_that_is_no_number_is_an_error(tiny, generator, values, where):
    with pytest.raises(FloatingPointError, match=rf"loss became (nan|inf) in epoch 1 of CBD's {where}"):
        cbd.cbd(make_model, tiny, replace(QUICK, **values), generator=generator)
