"""FT-SAM: one test for each numbered step that fails when its line is broken, then the contract of every defense."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.defenses import ft_sam
from bdlib.defenses.ft_sam import FtSamConfig
from tests.conftest import same, state

QUICK = FtSamConfig(epochs=2, batch_size=12, rho=0.5)


@pytest.fixture
def batch(tiny):
    return tiny.floats(), tiny.labels


@pytest.fixture
def steady(network):
    """The network without dropout, so that two passes of one batch agree."""
    network[3] = nn.Identity()
    return network


def loss_by_hand(logits, labels, smoothing):
    """The true class has 1 - s, every other s / (C - 1)."""
    log_probability = logits - logits.exp().sum(1, keepdim=True).log()
    true = log_probability[torch.arange(len(labels)), labels]
    others = log_probability.sum(1) - true
    return -((1 - smoothing) * true + smoothing / (logits.shape[1] - 1) * others).mean()


def gradients_by_hand(model, images, labels, smoothing):
    """Gradient at the weights of this very model, by backward(); its batch-norm statistics move if it is in train()."""
    model.zero_grad()
    loss_by_hand(model(images), labels, smoothing).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def moved(model, step):
    """A copy of the model whose weights are w + step."""
    nearby = copy.deepcopy(model)
    for name, parameter in nearby.named_parameters():
        parameter.data += step[name]
    return nearby


def perturbation_by_hand(weights, gradients, rho, adaptive):
    scale = {name: weight.detach().abs() if adaptive else weight.detach() * 0 + 1 for name, weight in weights.items()}
    norm = math.sqrt(sum(((scale[name] * gradients[name]) ** 2).sum().item() for name in weights))
    return {name: rho * scale[name] ** 2 * gradients[name] / norm for name in weights}


def run_by_hand(model, batches, config, factors):
    """All of Alg. 1 on these batches: a model whose weights and batch-norm statistics are those to expect."""
    model = copy.deepcopy(model).requires_grad_(True).train()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for (images, labels), factor in zip(batches, factors, strict=True):
        weights = dict(model.named_parameters())
        gradients = gradients_by_hand(model, images, labels, config.label_smoothing)
        if config.rho:
            eps = perturbation_by_hand(weights, gradients, config.rho, config.adaptive)
            gradients = gradients_by_hand(moved(model, eps), images, labels, config.label_smoothing)
        for name, weight in weights.items():
            velocity[name] = config.momentum * velocity[name] + gradients[name] + config.weight_decay * weight.detach()
            weight.data -= config.lr * factor * velocity[name]
    return model


def watched_run(monkeypatch, model, clean, config, seed=0):
    """The defended model, and the batches that step 1 saw."""
    batches, real = [], ft_sam.loss_and_gradients
    monkeypatch.setattr(
        ft_sam,
        "loss_and_gradients",
        lambda m, images, labels, c: (batches.append((images, labels)), real(m, images, labels, c))[1],
    )
    return ft_sam.ft_sam(model, clean, config, generator=torch.Generator().manual_seed(seed)), batches


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothing_leaves_the_true_class_the_rest(smoothing):
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 3.0, 0.0, 0.0]])
    total = [sum(math.exp(v) for v in row) for row in logits.tolist()]
    log_p = [[v - math.log(s) for v in row] for row, s in zip(logits.tolist(), total, strict=True)]
    first = -(1 - smoothing) * log_p[0][2] - smoothing / 3 * (log_p[0][0] + log_p[0][1] + log_p[0][3])
    second = -(1 - smoothing) * log_p[1][1] - smoothing / 3 * (log_p[1][0] + log_p[1][2] + log_p[1][3])
    loss = ft_sam.smoothed_loss(logits, torch.tensor([2, 1]), smoothing)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_step_1_is_the_gradient_at_the_weights(network, batch):
    network.eval()
    loss, gradients = ft_sam.loss_and_gradients(network, *batch, FtSamConfig(label_smoothing=0.3))
    by_hand = copy.deepcopy(network)
    expected = gradients_by_hand(by_hand, *batch, 0.3)
    assert loss.item() == pytest.approx(loss_by_hand(network(batch[0]), batch[1], 0.3).item(), rel=1e-5)
    assert not loss.requires_grad and gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-6) for name in expected)
    assert gradients["0.weight"].abs().sum() > 0 and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("rho", [2.0, 0.3])
def test_step_2_goes_far_along_large_weights_with_one_norm_over_all(rho):
    weights = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([[0.5]])}
    gradients = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[-10.0]])}
    eps = ft_sam.perturbation(weights, gradients, FtSamConfig(rho=rho))
    norm = math.sqrt(3**2 + 8**2 + 5**2)
    assert eps["a"].tolist() == pytest.approx([rho * 9 * 1 / norm, rho * 16 * 2 / norm])
    assert eps["b"].tolist() == [[pytest.approx(rho * 0.25 * -10 / norm)]]


def test_step_2_of_plain_sam_ignores_the_weights():
    weights = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([0.5])}
    gradients = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([-2.0])}
    eps = ft_sam.perturbation(weights, gradients, FtSamConfig(rho=0.6, adaptive=False))
    assert eps["a"].tolist() == pytest.approx([0.2, 0.4]) and eps["b"].tolist() == pytest.approx([-0.4])


def test_step_2_without_a_gradient_stays_where_it_is():
    eps = ft_sam.perturbation({"a": torch.ones(3)}, {"a": torch.zeros(3)}, FtSamConfig())
    assert eps["a"].tolist() == [0, 0, 0]


def test_step_2_is_uphill(steady, batch):
    steady.eval()
    config = FtSamConfig(rho=0.5)
    loss, gradients = ft_sam.loss_and_gradients(steady, *batch, config)
    eps = ft_sam.perturbation(dict(steady.named_parameters()), gradients, config)
    assert loss_by_hand(moved(steady, eps)(batch[0]), batch[1], 0.1) > loss + 0.001
    assert not any(step.requires_grad for step in eps.values())


def test_step_3_is_the_gradient_at_the_perturbed_weights(network, batch):
    network.eval()
    source = torch.Generator().manual_seed(0)
    eps = {name: 0.3 * torch.randn(p.shape, generator=source) for name, p in network.named_parameters()}
    before = state(network)
    gradients = ft_sam.gradients_nearby(network, eps, *batch, FtSamConfig(label_smoothing=0.3))
    expected = gradients_by_hand(moved(network, eps), *batch, 0.3)
    here = gradients_by_hand(copy.deepcopy(network), *batch, 0.3)
    assert gradients.keys() == expected.keys() and same(before, state(network))
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.allclose(here["0.weight"], expected["0.weight"], atol=1e-3)


def test_batch_norm_statistics_move_in_step_1_alone(steady, batch):
    steady.train()
    start = state(steady)
    eps = {name: torch.full_like(p, 0.1) for name, p in steady.named_parameters()}
    ft_sam.gradients_nearby(steady, eps, *batch, FtSamConfig())
    assert same(start, state(steady))
    channel_means = steady[0](batch[0]).mean((0, 2, 3))
    ft_sam.loss_and_gradients(steady, *batch, FtSamConfig())
    assert torch.allclose(steady[1].running_mean, 0.1 * channel_means, atol=1e-6)
    assert steady[1].num_batches_tracked == 1


def test_step_3_uses_the_statistics_of_the_batch(steady, batch):
    steady.train()
    eps = {name: torch.zeros_like(p) for name, p in steady.named_parameters()}
    gradients = ft_sam.gradients_nearby(steady, eps, *batch, FtSamConfig())
    in_train = gradients_by_hand(copy.deepcopy(steady), *batch, 0.1)
    in_eval = gradients_by_hand(copy.deepcopy(steady).eval(), *batch, 0.1)
    assert torch.allclose(gradients["7.weight"], in_train["7.weight"], atol=1e-6)
    assert not torch.allclose(in_eval["7.weight"], in_train["7.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        FtSamConfig(epochs=2, batch_size=12, lr=0.2, rho=1.0, weight_decay=0.1, label_smoothing=0.3),
        FtSamConfig(epochs=2, batch_size=12, lr=0.2, rho=0.05, adaptive=False, momentum=0.5, label_smoothing=0.0),
        FtSamConfig(epochs=2, batch_size=12, lr=0.2, rho=0.0, weight_decay=0.1),
    ],
    ids=["adaptive", "plain", "rho 0"],
)
@pytest.mark.parametrize("schedule", ["cosine_100", "cosine", "constant"])
def test_step_4_and_the_whole_run_by_hand(tiny, steady, monkeypatch, config, schedule):
    config = replace(config, schedule=schedule)
    steady.eval()  # the run has to turn it to train() by itself
    tuned, batches = watched_run(monkeypatch, steady, tiny, config)
    factors = {
        "cosine_100": [0.5 + 0.5 * math.cos(math.pi * t / 100) for t in range(6)],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * t / 6) for t in range(6)],
        "constant": [1.0] * 6,
    }[schedule]
    expected, result = state(run_by_hand(steady, batches, config, factors)), state(tuned)
    for name, value in expected.items():
        assert torch.allclose(result[name], value, atol=1e-4, rtol=1e-4), name
    assert result["1.num_batches_tracked"] == 6  # of twelve passes where rho is above 0
    assert (expected["7.weight"] - steady[7].weight).abs().max() > 0.05


def test_rho_0_asks_for_no_second_gradient(tiny, network, generator, monkeypatch):
    taken, real = [], ft_sam.gradients_nearby
    monkeypatch.setattr(ft_sam, "gradients_nearby", lambda *a: (taken.append(1), real(*a))[1])
    ft_sam.ft_sam(network, tiny, replace(QUICK, rho=0.0), generator=generator)
    assert taken == []
    ft_sam.ft_sam(network, tiny, QUICK, generator=generator)
    assert taken != []


def test_every_image_is_seen_once_an_epoch_augmented_as_the_dataset_allows(tiny, network, monkeypatch):
    watched, epochs = [], []
    real = ft_sam.loss_and_gradients
    monkeypatch.setattr(ft_sam, "loss_and_gradients", lambda *a: (watched.append(a[1:3]), real(*a))[1])
    config = replace(QUICK, batch_size=16)
    generator = torch.Generator().manual_seed(0)
    ft_sam.ft_sam(network, tiny, config, generator=generator, watch=lambda of: (epochs.extend(of), iter(epochs))[1])
    assert [len(labels) for _, labels in watched] == [16, 16, 4] * 2 and epochs == [0, 1]
    assert torch.cat([labels for _, labels in watched[:3]]).bincount().tolist() == [12, 12, 12]
    originals = {image.numpy().tobytes() for image in tiny.floats()}
    seen = {image.numpy().tobytes() for images, _ in watched for image in images}
    assert len(seen - originals) > 36  # crops and flips


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine_100", {0: 1, 25: 0.853553, 50: 0.5, 100: 0, 150: 0.5, 200: 1, 300: 0}),
        ("cosine", {0: 1, 100: 0.853553, 200: 0.5, 300: 0.146447, 400: 0}),
        ("constant", {0: 1, 100: 1, 400: 1}),
    ],
)
def test_schedules(schedule, expected):
    factor = ft_sam.lr_factor(FtSamConfig(schedule=schedule), steps=400)
    assert {step: factor(step) for step in expected} == pytest.approx(expected, abs=1e-5)


def test_it_learns_and_frozen_weights_learn_too(tiny, network, generator):
    network.requires_grad_(False)
    config = FtSamConfig(epochs=12, batch_size=12, lr=0.1, rho=0.2)
    tuned = ft_sam.ft_sam(network, tiny, config, generator=generator)
    assert (tuned(tiny.floats()).argmax(1) == tiny.labels).float().mean() > 0.8
    after = dict(tuned.named_parameters())
    assert not any(torch.equal(after[name], before) for name, before in network.named_parameters())


class Hole(nn.Module):
    """One weight, whose loss on images of class 0 is a slope down to 0 with a narrow hole at 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.02]))

    def forward(self, images):
        height = 4 * (1 - torch.exp(-200 * (self.w - 1) ** 2)) + self.w.square()
        return torch.stack([0 * height, height], 1).expand(len(images), 2)


def test_it_leaves_a_narrow_minimum_in_which_fine_tuning_stays():
    images = torch.zeros(8, 1, 2, 2, dtype=torch.uint8)
    clean = Dataset("hole", images, torch.zeros(8, dtype=torch.long), ("a", "b"))
    config = FtSamConfig(
        epochs=120, lr=1e-3, momentum=0.0, weight_decay=0.0, adaptive=False, label_smoothing=0.0, schedule="constant"
    )
    run = lambda rho: ft_sam.ft_sam(Hole(), clean, replace(config, rho=rho), generator=torch.Generator())
    assert abs(run(0.0).w.item() - 1) < 0.01 and run(0.2).w.item() < 0.93


def test_input_model_is_as_it_was(tiny, network, generator, untouched):
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    before = state(network)
    tuned = ft_sam.ft_sam(network, tiny, QUICK, generator=generator)
    assert same(before, state(network)) and network.training and not network[1].training
    assert not any(module.training for module in tuned.modules())
    assert not network[0].weight.requires_grad and network[4].weight.requires_grad
    assert (network[7].weight.grad == 1).all() and network[4].weight.grad is None
    assert not torch.equal(tuned[0].weight, network[0].weight)


def test_same_generator_same_weights(tiny, network):
    run = lambda seed: state(ft_sam.ft_sam(network, tiny, QUICK, generator=torch.Generator().manual_seed(seed)))
    assert same(run(0), run(0)) and not same(run(0), run(1))


def test_dropout_does_not_follow_the_global_random_state(tiny, network):
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(state(ft_sam.ft_sam(network, tiny, QUICK, generator=torch.Generator().manual_seed(0))))
    assert same(*results)


def test_defaults_are_the_official_codes():
    config = FtSamConfig()
    assert (config.epochs, config.batch_size, config.lr, config.momentum, config.weight_decay) == (
        100,
        256,
        0.01,
        0.9,
        5e-4,
    )
    assert (config.rho, config.adaptive, config.label_smoothing, config.schedule) == (2.0, True, 0.1, "cosine_100")


@pytest.mark.parametrize(
    ("count", "size"), [(50000, 256), (2500, 250), (2560, 256), (500, 50), (501, 51), (320, 32), (100, 32), (10, 32)]
)
def test_the_recipe_takes_a_tenth_of_the_images_a_batch(count, size):
    assert ft_sam.recipe(count) == FtSamConfig(batch_size=size)


@pytest.mark.parametrize(
    ("count", "steps", "factor"),
    [
        (2500, 1000, 1), (500, 1000, 1), (289, 1000, 1), (288, 900, 0), (250, 800, 1), (200, 700, 0), (100, 400, 1), (50, 200, 1),
        (10, 100, 0),
    ],
)  # fmt: skip
def test_the_recipes_rate_ends_where_the_number_of_batches_says(count, steps, factor):
    config = ft_sam.recipe(count)
    assert config.epochs * math.ceil(count / min(config.batch_size, count)) == steps
    assert ft_sam.lr_factor(config, steps)(steps) == pytest.approx(factor, abs=1e-9)


def test_the_papers_variant_has_plain_cross_entropy():
    assert ft_sam.paper_variant(FtSamConfig(rho=8.0)) == FtSamConfig(rho=8.0, label_smoothing=0.0, schedule="cosine")


def test_the_ablation_adds_one_difference_at_a_time():
    config = FtSamConfig(epochs=7, batch_size=9)
    base = dict(epochs=7, batch_size=9)
    assert ft_sam.ablation(config) == {
        "FT, as many steps": FtSamConfig(**base, rho=0.0, label_smoothing=0.0, schedule="cosine"),
        "+ label smoothing": FtSamConfig(**base, rho=0.0, schedule="cosine"),
        "+ cosine per batch": FtSamConfig(**base, rho=0.0),
        "+ SAM, rho .05": FtSamConfig(**base, rho=0.05, adaptive=False),
        "+ SAM, rho .5": FtSamConfig(**base, rho=0.5, adaptive=False),
        "paper's text": FtSamConfig(**base, label_smoothing=0.0, schedule="cosine"),
        "rho=1": FtSamConfig(**base, rho=1.0),
        "rho=4": FtSamConfig(**base, rho=4.0),
        "rho=8": FtSamConfig(**base, rho=8.0),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"lr": -0.1}, "lr must be above 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"rho": -1.0}, "rho must not be negative, got -1.0"),
        ({"momentum": -0.9}, "momentum must not be negative, got -0.9"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative, got -0.0001"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 0.5\], got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\], got -0.1"),
        ({"schedule": "linear"}, "schedule must be one of cosine_100, cosine, constant, got 'linear'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FtSamConfig(**values)


def test_no_clean_image_is_an_error(tiny, network, generator):
    with pytest.raises(ValueError, match="at least one image"):
        ft_sam.ft_sam(network, tiny.subset(slice(0)), QUICK, generator=generator)


def test_a_loss_that_is_no_number_is_an_error(tiny, network, generator):
    network[0].weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 1 of FT-SAM"):
        ft_sam.ft_sam(network, tiny, QUICK, generator=generator)


def test_a_loss_that_explodes_later_names_its_epoch(tiny, steady, generator):
    config = FtSamConfig(epochs=5, batch_size=36, lr=1e25, momentum=0.0, rho=0.0, schedule="constant")
    with pytest.raises(FloatingPointError, match="in epoch [2345] of FT-SAM"):
        ft_sam.ft_sam(steady, tiny, config, generator=generator)
