"""Steps replayed on a GPU do what the steps themselves do; on a CPU nothing here but Adam and the root changes a bit."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bdlib import gpu, train
from bdlib.attacks import input_aware
from bdlib.attacks.attacker import Attacker
from bdlib.defenses import anp, awm, cbd, ft_sam
from bdlib.explain import SynthesisConfig, WithEmbedding, synthesize_trigger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_on_a_cpu_all_of_it_is_plain_pytorch(generator):
    step = lambda x: x
    assert gpu.replayed(step, CPU) is step
    assert gpu.generator_on(CPU, generator) is generator
    weight = nn.Parameter(torch.ones(2))
    for made, kind, fused in (
        (gpu.sgd([weight], CPU, lr=0.5), torch.optim.SGD, None),
        (gpu.adam([weight], CPU, lr=0.5), torch.optim.Adam, True),
    ):
        group = made.param_groups[0]
        assert type(made) is kind and group["lr"] == 0.5 and group["fused"] is fused and not group.get("capturable")
    assert gpu.compiled(weight, CPU, gpu.LONG, 8) is weight
    called = []
    assert gpu.side_by_side(CPU, lambda: called.append(1) or "a", lambda: called.append(2) or "b") == ("a", "b")
    assert called == [1, 2]
    with gpu.fastest_convolutions(CPU, gpu.LONG):
        assert not torch.backends.cudnn.benchmark
    with gpu.half(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_roots_are_exact_so_that_they_are_the_same_on_every_cpu(generator):
    values = torch.rand(20_000, generator=generator)
    assert np.array_equal(gpu.root(values).numpy(), np.sqrt(values.numpy()))
    values = values[:9].requires_grad_(True)
    (slope,) = torch.autograd.grad(gpu.root(values).sum(), values)
    assert torch.allclose(slope, 0.5 / values.detach().sqrt()) and slope.dtype == torch.float32


def test_all_of_bdlib_takes_this_adam():
    package = Path(gpu.__file__).parent
    callers = [path.name for path in package.rglob("*.py") if re.search(r"optim\.Adam\w*\(", path.read_text())]
    assert callers == ["gpu.py"]


def test_keys_tell_apart_what_computes_otherwise(monkeypatch):
    assert gpu.arithmetic(CUDA) != "cuda"
    monkeypatch.delenv("MKL_CBWR", raising=False)
    assert gpu.arithmetic(CPU) == "cpu"
    for name, value in gpu.SAME_BITS.items():
        monkeypatch.setenv(name, value)
    assert gpu.arithmetic(CPU) not in ("cpu", gpu.arithmetic(CUDA))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert gpu.arithmetic(CPU) == "cpu"


def test_a_gradient_lies_in_memory_as_its_weight_does():
    weight = nn.Parameter(torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last))
    gradient = torch.rand(4, 3, 2, 2)
    gpu.set_gradients({"w": weight}, {"w": gradient})
    assert torch.equal(weight.grad, gradient) and weight.grad.stride() == weight.stride()
    gpu.set_gradients({"w": weight}, {"w": weight.detach()})
    assert weight.grad.data_ptr() == weight.data_ptr()  # no copy where none is needed


def descend(weight, optimizer, images):
    loss = (images @ weight).square().mean() + weight.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@needs_gpu
@pytest.mark.parametrize("make", [gpu.sgd, gpu.adam])
def test_replays_do_what_the_step_does_for_every_shape_and_rate(make):
    batches = [torch.rand(size, 3, device=CUDA) for size in (5, 5, 2) * 6]
    ends = []
    for replay in (False, True):
        weight = torch.ones(3, device=CUDA, requires_grad=True)
        optimizer = make([weight], CUDA, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        step = lambda images: descend(weight, optimizer, images)  # noqa: B023
        step = gpu.replayed(step, CUDA) if replay else step
        losses = []
        for images in batches:
            losses.append(step(images).clone())
            scheduler.step()
        ends.append((weight.detach(), torch.stack(losses)))
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-6) and torch.allclose(ends[0][1], ends[1][1], atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("make", [gpu.sgd, gpu.adam])
def test_fused_optimizers_do_what_plain_ones_do_where_channels_lie_last(make):
    start, images = torch.rand(6, 4, 3, 3), torch.rand(2, 4, 8, 8)
    ends = []
    for device in (CPU, CUDA):
        weight = start.to(device, memory_format=torch.channels_last).requires_grad_(True)
        optimizer = make([weight], device, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.conv2d(images.to(device, torch.float64), weight.double()).square().mean().backward()
            optimizer.step()
        ends.append(weight.detach().cpu())
    assert torch.allclose(*ends, atol=1e-5) and not torch.allclose(ends[0], start, atol=1e-3)


@needs_gpu
def test_replays_draw_new_numbers(generator):
    source = gpu.generator_on(CUDA, generator)
    step = gpu.replayed(lambda x: x + torch.rand(3, generator=source, device=CUDA), CUDA, [source])
    drawn = torch.stack([step(torch.zeros(3, device=CUDA)).clone() for _ in range(12)])
    assert len(drawn.unique()) == 36
    again = gpu.generator_on(CUDA, torch.Generator().manual_seed(generator.initial_seed()))
    assert torch.allclose(drawn, torch.stack([torch.rand(3, generator=again, device=CUDA) for _ in range(12)]))


@needs_gpu
def test_the_critics_norm():
    matrix = torch.rand(64, 128, device=CUDA)
    expected = torch.linalg.matrix_norm(matrix, 2).item()
    assert cbd.largest_singular_value(matrix).item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def placed(network):
    network[3].p = 0.0  # what dropout drops is another draw in a recording
    return network.to(CUDA)


@pytest.fixture
def float32(monkeypatch):
    """float32 all the way, so that nothing but what is compared differs."""
    monkeypatch.setattr(gpu, "half", lambda device: torch.autocast("cuda", enabled=False))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@needs_gpu
@pytest.mark.parametrize("method", ["fit", "ft_sam", "anp", "awm", "synthesis", "cbd", "input_aware"])
def test_replayed_methods_end_where_plain_ones_do(tiny, placed, float32, monkeypatch, method):
    plain = lambda step, device, generators=(): step
    replayed = run(method, tiny, placed)
    monkeypatch.setattr(gpu, "replayed", plain)
    expected = run(method, tiny, placed)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(replayed, expected, strict=True))


def run(method, tiny, network, watch=iter):
    """What the method leaves: weights, masks or a trigger."""
    source = torch.Generator().manual_seed(5)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    if method == "fit":
        config = train.TrainConfig(epochs=3, batch_size=8, lr=0.01, drop_last=False)
        left = train.fit(network, tiny, config, generator=source, watch=watch).state_dict()
        left = [value.clone() for value in left.values()]
        network.load_state_dict(start)
        return left
    if method == "ft_sam":
        tuned = ft_sam.ft_sam(network, tiny, ft_sam.FtSamConfig(epochs=3, batch_size=8), generator=source)
        return list(tuned.state_dict().values())
    masks = {
        "anp": lambda: anp.learn_masks(network, tiny, anp.AnpConfig(steps=9, batch_size=8), generator=source),
        "awm": lambda: awm.run(network, tiny, awm.AwmConfig(outer_epochs=2, batch_size=8), generator=source).masks,
    }
    if method in masks:
        return list(masks[method]().values())
    if method == "synthesis":
        found = synthesize_trigger(network, tiny, 1, SynthesisConfig(steps=9, batch_size=8), generator=source)
        return [found.mask, found.pattern]
    if method == "input_aware":
        # Not the pattern network: from a change of the last bit Adam makes .02 there, and 1e-4 in the others.
        trigger = input_aware_attack(tiny, network, start)
        return [*trigger.classifier.state_dict().values(), *trigger.mask.state_dict().values()]
    fresh = lambda generator: clone(network, start)
    # At the critic's own rate of .2 Adam makes 5e-3 of the last bit of its gradients; a critic that stands still differs by .03 here.
    config = cbd.CbdConfig(
        batch_size=8, biased_epochs=2, epochs=3, lr=0.01, biased_lr=0.01, critic_lr=0.01, critic_dropout=0.0
    )
    result = cbd.run(fresh, tiny, config, generator=source, watch=watch)
    return [*result.model.state_dict().values(), result.weights, result.critic]


def input_aware_attack(tiny, network, start):
    """The attack's three networks, trained for a few steps."""
    attacker = Attacker(
        train=tiny, wanted=torch.zeros_like, target_label=0, poison_rate=0.25, fresh_model=lambda _: clone(network, start),
        clean_model=lambda: network, training=train.TrainConfig(epochs=3, batch_size=8), quick=True, device=CUDA,
        generator=lambda use: torch.Generator().manual_seed(len(use)),
    )  # fmt: skip
    trigger = input_aware.build(attacker)
    input_aware.fit(trigger, attacker)
    return trigger


def clone(network, start):
    twin = copy.deepcopy(network)
    twin.load_state_dict(start)
    return twin.train().requires_grad_(True)


@needs_gpu
@pytest.mark.parametrize("method", ["fit", "cbd"])
def test_a_long_training_is_compiled_and_ends_where_a_plain_one_does(tiny, placed, float32, monkeypatch, method):
    expected = run(method, tiny, placed)
    compiled, compile_, tried = [], torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled.append(type(model)) or compile_(model, **how))
    monkeypatch.setattr(gpu, "LONG", 3 * len(tiny))
    watch = lambda epochs: (tried.append(torch.backends.cudnn.benchmark) or epoch for epoch in epochs)
    found = run(method, tiny, placed, watch=watch)
    assert [kind for kind in compiled if issubclass(kind, nn.Module)] == {
        "fit": [type(placed)],
        "cbd": [WithEmbedding, WithEmbedding],
    }[method]
    assert tried == {"fit": [True] * 3, "cbd": [False] * 2 + [True] * 3}[method] and not torch.backends.cudnn.benchmark
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found, expected, strict=True))


@needs_gpu
def test_side_by_side_gives_what_one_after_the_other_does():
    many = [torch.rand(300, 300, device=CUDA) for _ in range(2)]
    step = lambda *given: gpu.side_by_side(CUDA, *(lambda x=x: (x @ x).sin() @ x for x in given))
    replay = gpu.replayed(step, CUDA)
    for _ in range(8):
        assert all(torch.equal(a, (x @ x).sin() @ x) for a, x in zip(replay(*many), many, strict=True))
        many = [x.flip(0) for x in many]


@needs_gpu
def test_without_a_compiler_training_goes_on(placed, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(gpu, "_can_compile", gpu._can_compile.__wrapped__)
    assert gpu.compiled(placed, CUDA, gpu.LONG, 8) is placed
    assert "Failed to find C compiler" in capsys.readouterr().out


@needs_gpu
def test_training_in_bfloat16_learns(tiny, placed, generator):
    train.fit(placed, tiny, train.TrainConfig(epochs=20, batch_size=12, lr=0.1), generator=generator)
    assert train.accuracy(placed, tiny) > 0.9
    assert all(weight.dtype == torch.float32 for weight in placed.parameters())
